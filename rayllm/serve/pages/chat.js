// The chat page: conversations, and what the user does with them. What is shown follows from `state`.

import { announceEnd } from "./answer.js";
import { Composer } from "./composer.js";
import { addAnswer, addLane, addTurn, hasText, keepLane, leaveOutBefore, newConversation, nextToLeaveOut, shownAnswer, toMarkdown } from "./conversation.js";
import { askKey, setUpDialogs } from "./dialogs.js";
import { announce, byId, fillIcons, h, themeToggle, toast } from "./dom.js";
import { Models } from "./models.js";
import { interrupted, Run } from "./run.js";
import { SettingsDrawer } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Transcript } from "./transcript.js";

const SUGGESTIONS = ["What is RayLLM?", "What is continuous batching?", "Write a short story about a lighthouse.", "What can you do?"];
const FIGURES_MS = 150;

const state = { conversations: store.loadAll(), current: newConversation() };
const runs = new Map(); // answer -> Run
const runOf = (answer) => runs.get(answer) ?? null;
const runsOf = (conversation) => [...runs.values()].filter((run) => run.conversation === conversation);

const models = new Models({
  onLoaded: () => {
    chooseServed();
    showHead();
    showEmpty();
    showContext();
  },
  onRefused: (error) => askKey(error.message, () => models.load()),
});
const transcript = new Transcript(
  {
    deleteTurn,
    resend,
    regenerate: (turn, lane) => regenerate(turn, lane),
    showVariant,
    sendResults: (results) => ask({ kind: "tools", results }),
    leaveOut,
    shorten: (turn) => (turn.kind === "user" ? transcript.edit(turn) : editLast()),
    startAnew,
    askKey: (turn, lane) => askKey(shownAnswer(turn, lane).error.message, () => (models.load(), regenerate(turn, lane))),
  },
  runOf,
);
const sidebar = new Sidebar({ open: openConversation, rename, remove: removeConversation });
const settings = new SettingsDrawer(() => state.current, () => (keep(), showHead()));
const composer = new Composer({ onSend: send, onStop: stopAll, onEditLast: editLast });

// ------------------------------------------------------------------------------------------------- what is shown

function showHead() {
  models.renderPickers(state.current, {
    choose: (lane, model) => {
      state.current.lanes[lane].model = model;
      keep();
      showContext();
    },
    settings: (lane) => settings.open(lane),
  });
  byId("compare").setAttribute("aria-pressed", String(state.current.lanes.length > 1));
  document.title = state.current.title ? `${state.current.title} · RayLLM` : "RayLLM chat";
}

function showSidebar() {
  sidebar.render(state.conversations, state.current, (conversation) => runsOf(conversation).length > 0);
}

function showEmpty() {
  const isEmpty = state.current.turns.length === 0;
  byId("empty").hidden = !isEmpty;
  const length = models.contextOf(models.first);
  byId("empty-hint").textContent = models.first ? `${models.first} answers${length ? `, within ${length.toLocaleString("en")} tokens` : ""}.` : "";
}

function showContext() {
  const { turns, lanes } = state.current;
  const lane = lanes.findIndex((_, i) => turns.length && runOf(shownAnswer(turns.at(-1), i)));
  const answer = turns.length ? shownAnswer(turns.at(-1), Math.max(0, lane)) : null;
  composer.showContext(answer, models.contextOf(lanes[Math.max(0, lane)].model));
}

function showAll() {
  transcript.show(state.current);
  composer.setRunning(runsOf(state.current).length > 0);
  showHead();
  showSidebar();
  showEmpty();
  showContext();
}

/** Stores the conversation that is shown, once it says anything. */
function keep(conversation = state.current) {
  if (!conversation.turns.length) return;
  if (!state.conversations.includes(conversation)) state.conversations.unshift(conversation);
  saveOrTell(conversation);
}

let isFullTold = false;

function saveOrTell(conversation) {
  if (!state.conversations.includes(conversation)) return false; // deleted meanwhile
  const isSaved = store.save(conversation);
  if (!isSaved && !isFullTold) toast("This browser's storage is full: export chats and delete some. This one is not kept.");
  isFullTold = !isSaved;
  return isSaved;
}

// ----------------------------------------------------------------------------------------------------- answering

function send(text) {
  if (!state.current.lanes.every((lane) => lane.model)) {
    toast("There is no model yet; the message waits in the box.");
    return false;
  }
  ask({ kind: "user", text });
  return true;
}

function ask(content) {
  const turn = addTurn(state.current, content);
  byId("empty").hidden = true;
  state.conversations = [state.current, ...state.conversations.filter((other) => other !== state.current)];
  for (let lane = 0; lane < state.current.lanes.length; lane++) startAnswer(turn, lane);
  transcript.append(turn);
  afterStart();
}

function startAnswer(turn, lane, conversation = state.current) {
  const answer = addAnswer(turn, lane, conversation.lanes[lane].model);
  follow({ conversation, turn, lane, answer });
}

/** Runs an answer from its beginning, or on from `eventId`. */
function follow({ conversation, turn, lane, answer, eventId = null }) {
  const run = new Run({
    conversation, turn, lane, answer,
    save: saveOrTell,
    onChange: () => transcript.touch(answer),
    onEnd: () => {
      runs.delete(answer);
      transcript.touch(answer);
      announceEnd(answer);
      if (conversation === state.current) composer.setRunning(runsOf(conversation).length > 0);
      showSidebar();
      showContext();
      if (answer.error?.status === 401) {
        askKey(answer.error.message, () => (models.load(), regenerate(turn, lane, conversation, true)));
      }
    },
  });
  runs.set(answer, run);
  run.start(eventId);
}

function afterStart() {
  keep();
  composer.setRunning(true);
  showHead();
  showSidebar();
  announce("Answering");
}

/** A new variant of an answer; what came after it goes, and can be brought back. `isReplaced`: the old one goes too. */
function regenerate(turn, lane, conversation = state.current, isReplaced = false) {
  const index = conversation.turns.indexOf(turn);
  if (index < 0 || runOf(shownAnswer(turn, lane))) return;
  const undo = snapshot(conversation);
  const dropped = conversation.turns.splice(index + 1);
  const old = shownAnswer(turn, lane);
  if (old && (isReplaced || !hasText(old))) turn.answers[lane].splice(turn.shown[lane], 1);
  startAnswer(turn, lane, conversation);
  if (conversation === state.current) {
    if (dropped.length) transcript.refresh();
    else transcript.replace(turn);
    transcript.follow();
    afterStart();
  }
  if (dropped.length) toast("The turns after this answer were removed.", undo);
}

function resend(turn, text) {
  const index = state.current.turns.indexOf(turn);
  stopAll();
  const undo = snapshot(state.current);
  const isMuch = state.current.turns.length - index > 1;
  state.current.turns.splice(index);
  transcript.refresh();
  ask({ kind: "user", text });
  composer.focus();
  if (isMuch) toast("The turns after this message were removed.", undo);
}

/** Asks again without the oldest turns, which stay in sight. */
function leaveOut(turn, lane) {
  const first = nextToLeaveOut(state.current, turn);
  if (!first) return;
  leaveOutBefore(state.current, first);
  transcript.refresh();
  regenerate(turn, lane);
}

/** The message alone, in a new chat. */
function startAnew(turn) {
  newChat();
  if (turn.kind === "user") composer.fill(turn.text);
}

function showVariant(turn, lane, step) {
  const last = turn.answers[lane].length - 1;
  turn.shown[lane] = Math.min(last, Math.max(0, turn.shown[lane] + step));
  transcript.replace(turn);
  keep();
}

function deleteTurn(turn) {
  for (const run of runsOf(state.current)) if (run.turn === turn) run.stop();
  const undo = snapshot(state.current);
  state.current.turns.splice(state.current.turns.indexOf(turn), 1);
  transcript.refresh();
  showEmpty();
  showContext();
  if (state.current.turns.length) keep();
  else store.remove(state.current.id);
  toast("Message deleted.", undo);
  composer.focus();
}

/** An action for a toast that puts the conversation back as it is now. */
function snapshot(conversation) {
  const turns = [...conversation.turns];
  const answers = turns.map((turn) => ({ answers: turn.answers.map((variants) => [...variants]), shown: [...turn.shown] }));
  const run = () => {
    for (const running of runsOf(conversation)) running.stop();
    conversation.turns = turns;
    turns.forEach((turn, i) => Object.assign(turn, answers[i]));
    keep(conversation);
    if (conversation === state.current) showAll();
  };
  return { label: "Undo", run };
}

function stopAll() {
  for (const run of runsOf(state.current)) run.stop();
}

function editLast() {
  const turn = state.current.turns.findLast((candidate) => candidate.kind === "user");
  if (turn) transcript.edit(turn);
}

// ------------------------------------------------------------------------------------------------- conversations

/** What was begun with a model that is not here (any more) goes on with one that is. */
function chooseServed() {
  for (const lane of state.current.lanes) if (models.first && !models.has(lane.model)) lane.model = models.first;
}

function openConversation(conversation) {
  state.current = conversation;
  chooseServed();
  sidebar.close();
  showAll();
  composer.focus();
}

function newChat() {
  const [{ model, settings: chosen }] = state.current.lanes;
  openConversation(newConversation(models.has(model) ? model : models.first, chosen));
}

function rename(conversation, title) {
  conversation.title = title;
  keep(conversation);
  showHead();
  showSidebar();
}

function removeConversation(conversation) {
  for (const run of runsOf(conversation)) run.stop();
  state.conversations = state.conversations.filter((other) => other !== conversation);
  store.remove(conversation.id);
  if (conversation === state.current) newChat();
  else showSidebar();
  toast("Chat deleted.", {
    label: "Undo",
    run: () => {
      state.conversations.unshift(conversation);
      state.conversations.sort((a, b) => b.updated - a.updated);
      keep(conversation);
      showSidebar();
    },
  });
}

function toggleCompare() {
  if (runsOf(state.current).length) return toast("Wait for the answers, or stop them, before changing sides.");
  if (state.current.lanes.length > 1) {
    const undo = snapshotLanes(state.current);
    keepLane(state.current, 0);
    if (state.current.turns.length) toast("Side A goes on alone.", undo);
  } else {
    addLane(state.current);
    announce("Two sides: choose a model or settings for each");
  }
  keep();
  showAll();
  composer.focus();
}

function snapshotLanes(conversation) {
  const { label, run } = snapshot(conversation);
  const { lanes } = conversation;
  return { label, run: () => ((conversation.lanes = lanes), run()) };
}

// ------------------------------------------------------------------------------------------------ export, import

function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function fileName(extension) {
  const words = (state.current.title || "chat").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return `${words.slice(0, 50) || "chat"}.${extension}`;
}

async function importFile(file) {
  const problem = byId("import-problem");
  problem.hidden = true;
  try {
    const found = store.fromJson(await file.text());
    for (const conversation of found) {
      state.conversations.unshift(conversation);
      saveOrTell(conversation);
    }
    if (found.length) openConversation(found.at(-1));
    byId("share").close();
    toast(`${found.length} ${found.length === 1 ? "chat" : "chats"} imported.`);
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  }
}

function setUpShare() {
  const close = (run) => () => (run(), byId("share").close());
  byId("open-share").addEventListener("click", () => {
    for (const id of ["export-markdown", "export-json"]) byId(id).disabled = !state.current.turns.length;
    byId("export-all").disabled = !state.conversations.length;
    byId("share").showModal();
  });
  byId("export-markdown").addEventListener("click", close(() => download(fileName("md"), toMarkdown(state.current), "text/markdown")));
  byId("export-json").addEventListener("click", close(() => download(fileName("json"), store.toJson([state.current]), "application/json")));
  byId("export-all").addEventListener("click", close(() => download("rayllm-chats.json", store.toJson(state.conversations), "application/json")));
  byId("import-file").addEventListener("change", async (event) => {
    if (event.target.files.length) await importFile(event.target.files[0]);
    event.target.value = "";
  });
}

// ----------------------------------------------------------------------------------------------------- the page

const SHORTCUTS = { KeyN: newChat, KeyR: regenerateLast, KeyC: toggleCompare, KeyS: () => settings.open() };

function regenerateLast() {
  const turn = state.current.turns.at(-1);
  if (turn) state.current.lanes.forEach((_, lane) => regenerate(turn, lane));
}

function onKey(event) {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  const isTyping = event.target.matches?.("input, textarea, select");
  if (event.key === "Escape" && runsOf(state.current).length) stopAll();
  else if (event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code]) SHORTCUTS[event.code]();
  else if (!isTyping && event.key === "/") byId("message").focus();
  else if (!isTyping && event.key === "?") byId("help").showModal();
  else return;
  event.preventDefault();
}

/** Another tab changed something: its conversations are read anew, but for those that answer here. */
function readOthers() {
  const busy = new Set([...runs.values()].map((run) => run.conversation.id));
  const mine = state.conversations.filter(({ id }) => busy.has(id) || id === state.current.id);
  const held = new Set(mine.map(({ id }) => id));
  state.conversations = [...mine, ...store.loadAll().filter(({ id }) => !held.has(id))].sort((a, b) => b.updated - a.updated);
  showSidebar();
}

function setUp() {
  fillIcons();
  setUpDialogs();
  setUpShare();
  themeToggle(byId("theme"));
  byId("new-chat").addEventListener("click", newChat);
  byId("compare").addEventListener("click", toggleCompare);
  byId("open-settings").addEventListener("click", () => settings.open());
  byId("open-key").addEventListener("click", () => askKey("", () => models.load()));
  byId("open-help").addEventListener("click", () => byId("help").showModal());
  byId("suggestions").replaceChildren(
    ...SUGGESTIONS.map((text) => h("button", { type: "button", class: "button", onclick: () => composer.onSend(text) }, text)),
  );
  document.addEventListener("keydown", onKey);
  store.onOtherTab(readOthers);
  setInterval(() => runs.size && !document.hidden && showRunning(), FIGURES_MS);
}

function showRunning() {
  showContext();
  for (const answer of runs.keys()) transcript.touch(answer);
}

setUp();
const left = interrupted(state.conversations);
if (left.length) state.current = left[0].conversation;
for (const found of left) follow(found);
showAll();
models.load();
composer.focus();
