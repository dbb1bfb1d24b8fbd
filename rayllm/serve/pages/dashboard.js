// The dashboard: /metrics each second, what runs where every few, shown as tiles, charts and tables.

import { ApiError, getJson, getText, postJson } from "./api.js";
import { LineChart } from "./charts.js";
import { askKey, setUpDialogs } from "./dialogs.js";
import { byId, fillIcons, h, icon, themeToggle, toast } from "./dom.js";
import { Errors, FaultGaps } from "./errors.js";
import { History, LATENCIES, parseMetrics } from "./metrics.js";
import { hintScrolling } from "./scroll_hint.js";
import { local } from "./storage.js";

const PERIOD_MS = 1000;
const STATE_PERIOD_MS = 5000;
const RATE_MS = 3000;
const WINDOW_MS = 60_000;
const RANGES_MIN = [1, 15, 60];
const RANGE = "rayllm.dashboard-range";
const MAX_KINDS = 5; // rows of errors: about as high as the facts beside them
const QUANTILES = [0.5, 0.9, 0.99];

const history = new History();
const errors = new Errors(history);
const gaps = new FaultGaps(history);
let range_min = RANGES_MIN.find((minutes) => String(minutes) === local.getItem(RANGE)) ?? 15;
const SPAN_S = 60 * range_min;
let killed = null; // {rank, pid}, until the engine goes on
let isPaused = false;
let timer = null;
let isAsking = false;
let stateAt = -Infinity;

const count = (value) => (value >= 10_000 ? `${(value / 1000).toFixed(value >= 100_000 ? 0 : 1)}k` : value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1));
const percent = (value) => `${(value * 100).toFixed(value < 0.1 && value > 0 ? 1 : 0)}%`;
const time = (value) => (value < 0.0995 ? `${+(value * 1000).toPrecision(2)} ms` : `${+value.toPrecision(value < 10 ? 2 : 3)} s`);

const percentileChart = (title, idle) =>
  new LineChart({
    title, idle, format: time, span_s: SPAN_S, floor: 0.001,
    series: [{ name: "p50", color: 1 }, { name: "p90", color: 2 }, { name: "p99", color: 3 }],
  });

const IDLE = "No answers in the last minute";
const charts = {
  requests: new LineChart({ title: "Requests", format: count, span_s: SPAN_S, floor: 3, series: [{ name: "running", color: 1 }, { name: "waiting", color: 2 }] }),
  tokens: new LineChart({ title: "Tokens per second", format: count, span_s: SPAN_S, floor: 3, series: [{ name: "generated", color: 1 }, { name: "prompt", color: 2 }] }),
  cache: new LineChart({ title: "KV cache", format: percent, span_s: SPAN_S, max: 1, num_ticks: 4, series: [{ name: "in use", color: 1 }, { name: "prefix hits", color: 2 }] }),
  ttft: percentileChart("Time to first token", IDLE),
  itl: percentileChart("Between tokens", IDLE),
  e2e: percentileChart("Whole request", IDLE),
  errors: new LineChart({ title: "Errors in a minute", format: count, span_s: SPAN_S, floor: 3, series: [{ name: "refused", color: 1 }, { name: "failed", color: 2 }, { name: "faults", color: 3 }] }),
  gap: new LineChart({ title: "Gap after a fault", idle: "No fault in this range", format: time, span_s: SPAN_S, floor: 0.1, bars: true, series: [{ name: "gap", color: 2 }, { name: "noticed after", color: 1 }] }),
};

const TILES = [
  ["Running", () => history.value("vllm:num_requests_running"), count],
  ["Waiting", () => history.value("vllm:num_requests_waiting"), count],
  ["Generated tokens/s", () => history.rate("vllm:generation_tokens_total", RATE_MS), count],
  ["Prompt tokens/s", () => history.rate("vllm:prompt_tokens_total", RATE_MS), count],
  ["KV cache in use", () => history.value("vllm:kv_cache_usage_perc"), percent],
  ["Prefix cache hits", prefixHits, percent],
];

const FAULTS = [
  ["Worker crashes and hangs", () => countOf("rayllm:worker_faults_total"), count],
  ["Drivers replaced", () => countOf("rayllm:driver_restarts_total"), count],
  ["Requests and sequences replayed", () => sum("rayllm:sequences_replayed_total", "rayllm:requests_replayed_total"), count],
  ["Tokens computed again", () => sum("rayllm:recomputed_tokens_total", "rayllm:ingress_recomputed_tokens_total"), count],
  ["Fault noticed after, median", () => history.quantileOfAll("rayllm:fault_detection_seconds", 0.5), time],
  ["Gap after a fault, median", () => history.quantileOfAll("rayllm:fault_gap_seconds", 0.5), time],
  ["Preemptions", () => countOf("vllm:num_preemptions_total"), count],
  ["Workers idle before a step, p99", () => history.percentiles("rayllm:step_gap_seconds", [0.99], WINDOW_MS)?.[0] ?? null, time],
];

/** A counter whose samples come into being with what they count. */
function countOf(name) {
  return history.value(name) ?? (history.isEmpty ? null : 0);
}

function prefixHits() {
  return history.share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", WINDOW_MS);
}

function sum(...names) {
  return history.isEmpty ? null : names.reduce((total, name) => total + countOf(name), 0);
}

// -------------------------------------------------------------------------------------------------------- showing

/** Pairs of a name and a value that are written anew each time. */
function factList(root, facts) {
  const nodes = facts.map(([label, read, format]) => {
    const value = h("dd", {}, "–");
    root.append(h("div", {}, h("dt", {}, label), value));
    return { value, read, format };
  });
  return () => {
    for (const { value, read, format } of nodes) {
      const now = read();
      value.textContent = now === null ? "–" : format(now);
    }
  };
}

const showTiles = factList(byId("tiles"), TILES);
const showFaults = factList(byId("faults"), FAULTS);

function showMetrics() {
  const at = performance.now() / 1000;
  showTiles();
  showFaults();
  charts.requests.add(at, [history.value("vllm:num_requests_running"), history.value("vllm:num_requests_waiting")]);
  charts.tokens.add(at, [history.rate("vllm:generation_tokens_total", RATE_MS), history.rate("vllm:prompt_tokens_total", RATE_MS)]);
  charts.cache.add(at, [history.value("vllm:kv_cache_usage_perc"), prefixHits()]);
  for (const [name, histogram] of Object.entries(LATENCIES)) {
    charts[name].add(at, history.percentiles(histogram, QUANTILES, WINDOW_MS) ?? [null, null, null]);
  }
  errors.note(at);
  charts.errors.add(at, errors.inLast(60, at));
  const gap = gaps.next();
  charts.gap.add(at, gap);
  if (gap[0] !== null && killed) {
    toast(`Worker rank ${killed.rank} is replaced: ${time(gap[0])} lay between the steps round its death.`);
    killed = null;
  }
  showErrors(at);
  showEnds();
}

function bars(rows, idle) {
  const largest = Math.max(1, ...rows.map(({ num }) => num));
  const row = ({ name, num, text, isBad }) => {
    const bar = h("i", { class: isBad ? "bar bad" : "bar" });
    bar.style.setProperty("width", `${(100 * num) / largest}%`);
    return h("li", {}, h("span", {}, name), h("b", {}, text ?? count(num)), bar);
  };
  return rows.length ? h("ul", { class: "bars" }, rows.map(row)) : h("p", { class: "hint" }, idle);
}

function showErrors(at) {
  const rows = errors.byKind(60 * range_min, at, MAX_KINDS).map(({ kind, num, total }) => ({ name: kind, num, text: `${count(num)} of ${count(total)}`, isBad: true }));
  byId("errors-range").textContent = `last ${range_min} min, of all since the start`;
  byId("errors").replaceChildren(bars(rows, "Nothing was refused and nothing failed."));
}

function showEnds() {
  const rows = history.byLabel("vllm:request_success_total", "finished_reason").map(([name, num]) => ({ name: `ended: ${name}`, num, isBad: name === "error" }));
  byId("ends").replaceChildren(bars(rows, "Nothing has ended yet."));
}

function showState(state) {
  const pill = byId("state");
  const isRecovering = history.value("rayllm:engine_recovering") === 1;
  const isHealthy = history.value("rayllm:engine_healthy") !== 0;
  const [word, look] = !state.ready ? [state.stage, "warn"] : isRecovering ? ["Recovering", "warn"] : isHealthy ? ["Ready", "good"] : ["Not healthy", "bad"];
  pill.textContent = word;
  pill.className = `pill ${look}`;
  byId("model").replaceChildren(...modelWords(state));
  document.title = state.model ? `${state.model.name} · RayLLM dashboard` : "RayLLM dashboard";
  showProcesses(state.processes, state.fault_injection);
}

function modelWords({ model, engine, version }) {
  if (!model) return [`RayLLM ${version}`];
  const facts = [
    model.dtype,
    model.device === "cuda" ? "GPU" : "CPU",
    `${model.max_model_len.toLocaleString("en")} tokens of context`,
    `up to ${count(model.max_num_seqs)} sequences at once`,
    model.tensor_parallel_size > 1 ? `tensor parallel ${model.tensor_parallel_size}` : null,
    engine ? `KV cache of ${(engine.num_blocks * model.block_size).toLocaleString("en")} tokens` : null,
    `RayLLM ${version}`,
  ];
  return [h("b", {}, model.name), ` ${facts.filter(Boolean).join(" · ")}`];
}

/** Kills a worker, for whoever wants to see what comes of it. */
async function killWorker(rank) {
  try {
    killed = await postJson("admin/kill_worker", { rank });
    toast(`Worker rank ${killed.rank} (pid ${killed.pid}) was killed.`);
    stateAt = -Infinity;
  } catch (error) {
    toast(error.message);
  }
}

const killButton = (rank) =>
  h("button", { type: "button", class: "button small", "aria-label": `Kill worker rank ${rank}`, onclick: () => killWorker(rank) }, "Kill");

function showProcesses(processes, canKill) {
  byId("kill-head").hidden = !canKill;
  const nodes = [...new Set(processes.map(({ node, host }) => node || host))];
  const engine = processes.filter(({ role }) => role === "driver").length;
  const ranks = processes.filter(({ role }) => role === "worker").length;
  const words = [engine && `${engine} ${engine === 1 ? "replica" : "replicas"}`, ranks && `${ranks} ${ranks === 1 ? "rank" : "ranks"}`];
  byId("nodes").textContent = words.filter(Boolean).join(" · ");
  const row = ({ role, rank, pid, node, host, devices }) =>
    h("tr", {}, h("td", {}, role), h("td", {}, rank === null ? "–" : String(rank)), h("td", {}, `pid ${pid}`), h("td", { title: node }, nodes.length > 1 && node ? `${host} (${node.slice(0, 6)})` : host), h("td", {}, devices.join(", ") || "–"), canKill ? h("td", {}, role === "worker" ? killButton(rank) : null) : null);
  const focused = byId("processes").contains(document.activeElement) ? document.activeElement.ariaLabel : null;
  byId("processes").replaceChildren(...processes.map(row));
  if (focused) byId("processes").querySelector(`[aria-label="${focused}"]`)?.focus();
}

function showProblem(text) {
  const banner = byId("banner");
  if (banner.textContent !== text) banner.textContent = text;
  banner.hidden = !text;
  if (text) {
    byId("state").textContent = "No answer";
    byId("state").className = "pill bad";
  }
}

// --------------------------------------------------------------------------------------------------------- asking

async function ask() {
  if (isAsking) return;
  isAsking = true;
  const started = performance.now();
  try {
    const text = await getText("metrics");
    if (text) {
      history.add(performance.now(), parseMetrics(text));
      showMetrics();
    }
    if (started - stateAt >= STATE_PERIOD_MS || !text) {
      stateAt = started;
      showState(await getJson("dashboard/state"));
    }
    showProblem("");
  } catch (error) {
    onProblem(error);
  }
  isAsking = false;
  schedule(Math.max(0, PERIOD_MS - (performance.now() - started)));
}

function onProblem(error) {
  stateAt = -Infinity;
  if (!(error instanceof ApiError)) console.info(error);
  showProblem(error.message);
  if (error.status !== 401) return;
  setPaused(true);
  askKey(error.message, () => setPaused(false));
}

function schedule(ms) {
  clearTimeout(timer);
  if (!isPaused && !document.hidden) timer = setTimeout(ask, ms);
}

function setPaused(value) {
  isPaused = value;
  const button = byId("pause");
  const label = isPaused ? "Go on" : "Pause";
  button.setAttribute("aria-pressed", String(isPaused));
  button.setAttribute("aria-label", label);
  button.title = label;
  button.replaceChildren(icon(isPaused ? "play" : "pause"));
  schedule(0);
}

function showRange(minutes) {
  range_min = minutes;
  local.setItem(RANGE, String(minutes));
  for (const button of byId("ranges").children) button.setAttribute("aria-pressed", String(button.dataset.minutes === String(minutes)));
  for (const chart of Object.values(charts)) chart.show(60 * minutes);
  if (!history.isEmpty) showErrors(performance.now() / 1000);
}

byId("ranges").append(
  ...RANGES_MIN.map((minutes) => {
    const button = h("button", { type: "button", class: "button small", onclick: () => showRange(minutes) }, `${minutes} min`);
    button.dataset.minutes = minutes;
    return button;
  }),
);
showRange(range_min);
fillIcons();
setUpDialogs();
themeToggle(byId("theme"));
hintScrolling(document.querySelector(".table-scroll"));
byId("charts").append(...Object.values(charts).map((chart) => chart.root));
byId("pause").addEventListener("click", () => setPaused(!isPaused));
byId("open-key").addEventListener("click", () => askKey("", () => setPaused(false)));
document.addEventListener("visibilitychange", () => schedule(0));
setPaused(false);
