// How an answer looks: reasoning, text, tool calls, error, figures, buttons. Grows while the answer does.

import { announce, copyButton, h, icon, iconButton } from "./dom.js";
import { GrowingMarkdown } from "./markdown.js";

const SHORTEST_S = 0.02;
const SILENT_S = 2; // a worker is being replaced, perhaps; the answer will go on
const FINISHES = { length: "cut at the token limit", content_filter: "filtered", tool_calls: "calls tools", abort: "ended by the server" };

/** `actions`: regenerate, showVariant(step), askKey, sendResults(results), canLeaveOut, leaveOut, shorten, startAnew; `isTold`: whether tool results may be sent. */
export class AnswerView {
  #isReasoningTouched = false;

  constructor(actions, { label }) {
    this.actions = actions;
    this.reasoning = new GrowingMarkdown(h("div", { class: "md" }));
    this.summary = h("summary");
    this.fold = h("details", { class: "reasoning", hidden: true }, this.summary, this.reasoning.root);
    this.summary.addEventListener("click", () => (this.#isReasoningTouched = true));
    this.body = new GrowingMarkdown(h("div", { class: "md answer-text" }));
    this.waiting = h("div", { class: "waiting", "aria-hidden": "true" }, h("i"), h("i"), h("i"));
    this.calls = h("div", { class: "calls" });
    this.problem = h("div", { class: "problem", role: "alert", hidden: true });
    this.figures = h("span", { class: "figures" });
    this.buttons = h("span", { class: "answer-buttons" });
    this.root = h(
      "section",
      { class: "answer", "aria-label": label },
      label.length > "Answer".length ? h("div", { class: "answer-label" }, label) : null,
      this.fold, this.body.root, this.waiting, this.calls, this.problem,
      h("div", { class: "answer-foot" }, this.buttons, this.figures),
    );
  }

  /** `run` is null where the answer has ended. `variants` is `{number, count}`; `canTell`: no later turn follows. */
  update(answer, { run, variants, canTell }) {
    const isRunning = run !== null;
    this.root.setAttribute("aria-busy", String(isRunning));
    this.root.classList.toggle("running", isRunning);
    this.#showReasoning(answer, isRunning);
    this.body.update(answer.text, !isRunning);
    this.waiting.hidden = !isRunning || Boolean(answer.text || answer.toolCalls.length);
    this.#showCalls(answer, !isRunning && canTell);
    this.#showProblem(answer, run);
    this.figures.textContent = figuresOf(answer, run);
    this.#showButtons(answer, isRunning, variants);
  }

  #showReasoning(answer, isRunning) {
    this.fold.hidden = !answer.reasoning;
    if (!answer.reasoning) return;
    const isThinking = isRunning && !answer.text && !answer.toolCalls.length;
    this.summary.textContent = isThinking ? "Thinking…" : "Reasoning";
    if (!this.#isReasoningTouched) this.fold.open = isThinking;
    this.reasoning.update(answer.reasoning, !isRunning);
  }

  #showCalls(answer, canTell) {
    const shown = JSON.stringify([answer.toolCalls, canTell]);
    if (shown === this.shownCalls) return;
    this.shownCalls = shown;
    const fields = answer.toolCalls.map((call, i) => (canTell ? resultField(call, i) : null));
    const nodes = answer.toolCalls.map((call, i) => callCard(call, fields[i]));
    if (canTell && nodes.length) {
      const send = () =>
        this.actions.sendResults(answer.toolCalls.map((call, i) => ({ tool_call_id: call.id, content: fields[i].querySelector("textarea").value })));
      nodes.push(h("button", { type: "button", class: "button", onclick: send }, "Send results"));
    }
    this.calls.replaceChildren(...nodes);
  }

  #showProblem(answer, run) {
    const key = run?.isLinkLost ? "lost" : answer.error ? JSON.stringify(answer.error) : "";
    if (key === this.shownProblem) return;
    this.shownProblem = key;
    this.problem.hidden = !key;
    this.problem.classList.toggle("mild", key === "lost");
    if (!key) return;
    if (key === "lost") {
      this.problem.replaceChildren("The connection was lost. Reconnecting; the answer goes on where it was…");
      return;
    }
    const { message, status, code } = answer.error;
    const source = [status > 200 ? `HTTP ${status}` : null, code].filter(Boolean).join(" · ");
    const buttons = this.#waysOut(status, code).map(([label, run]) => h("button", { type: "button", class: "button", onclick: run }, label));
    this.problem.replaceChildren(h("p", {}, message), h("div", { class: "problem-foot" }, h("span", {}, source), h("div", { class: "problem-buttons" }, buttons)));
  }

  /** What can be done about an error: `[label, run]` each. Asking the same again does not make a text shorter. */
  #waysOut(status, code) {
    if (status === 401) return [["Enter API key", this.actions.askKey]];
    if (code !== "context_length_exceeded") return [["Try again", this.actions.regenerate]];
    return [
      this.actions.canLeaveOut() && ["Leave out the oldest turns", this.actions.leaveOut],
      ["Shorten the message", this.actions.shorten],
      ["Start a new chat with it", this.actions.startAnew],
    ].filter(Boolean);
  }

  #showButtons(answer, isRunning, { number, count }) {
    const isEmpty = !answer.text && !answer.toolCalls.length && count === 1; // an error has its own button
    const key = `${isRunning}/${isEmpty}/${number}/${count}`;
    if (key === this.shownButtons) return;
    this.shownButtons = key;
    if (isRunning || (isEmpty && answer.error)) return this.buttons.replaceChildren();
    const steps = count > 1 && [
      iconButton("left", "Earlier answer", () => this.actions.showVariant(-1), { disabled: number === 1 }),
      h("span", { class: "variant" }, `${number}/${count}`),
      iconButton("right", "Later answer", () => this.actions.showVariant(1), { disabled: number === count }),
    ];
    this.buttons.replaceChildren(
      ...(steps || []),
      copyButton("Copy answer", () => answer.text),
      iconButton("redo", "Regenerate answer", this.actions.regenerate),
    );
  }
}

function callCard(call, field) {
  let shown = call.arguments;
  try {
    shown = JSON.stringify(JSON.parse(call.arguments), null, 2);
  } catch {
    // still being written, or not JSON: as it is
  }
  const head = h("div", { class: "call-head" }, icon("tool"), h("b", {}, call.name || "…"), h("span", {}, "tool call"));
  return h("div", { class: "call" }, head, h("pre", { tabIndex: 0, role: "region", "aria-label": `Arguments of ${call.name}` }, h("code", {}, shown)), field);
}

function resultField(call, i) {
  const id = `result-${i}-${call.id}`;
  return h("div", { class: "field" }, h("label", { for: id }, "Result to send back"), h("textarea", { id, rows: 2, placeholder: "What the tool answers" }));
}

/** Tokens a second, from the first token on; null where they came too much at once to tell. */
function tokensPerSecond(answer) {
  const num = (answer.usage?.completion_tokens ?? 0) - 1;
  return num > 0 && answer.decode_s > SHORTEST_S ? num / answer.decode_s : null;
}

const seconds = (value) => (value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`);

export function figuresOf(answer, run) {
  const rate = tokensPerSecond(answer);
  const parts = [];
  const silent_s = run ? run.silent_s : 0;
  if (run && answer.ttft_s === null) parts.push(`waiting ${silent_s.toFixed(1)} s`);
  else if (silent_s > SILENT_S) parts.push(`no token for ${silent_s.toFixed(0)} s`);
  if (rate !== null) parts.push(`${rate < 100 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en")} tokens/s`);
  if (answer.ttft_s !== null) parts.push(`first token ${seconds(answer.ttft_s)}`);
  if (answer.usage?.completion_tokens) parts.push(`${answer.usage.completion_tokens.toLocaleString("en")} tokens`);
  if (answer.status === "stopped") parts.push("stopped");
  else if (FINISHES[answer.finish] && !run) parts.push(FINISHES[answer.finish]);
  return parts.join(" · ");
}

/** Says the end of an answer to a screen reader. */
export function announceEnd(answer) {
  const tokens = answer.usage?.completion_tokens ? `, ${answer.usage.completion_tokens} tokens` : "";
  const ends = { done: `Answer complete${tokens}`, stopped: "Answer stopped", failed: `Answer failed: ${answer.error?.message}` };
  announce(ends[answer.status] ?? "");
}
