// Conversations in this browser's storage, one key each, and their way out and in again as JSON.

import { MAX_LANES, newId, titleOf } from "./conversation.js";
import { readSettings } from "./fields.js";
import { local } from "./storage.js";

const PREFIX = "rayllm.chat.";
const FORMAT = "rayllm-conversations";
const VERSION = 1;
const STATUSES = new Set(["done", "stopped", "failed"]);

/** All conversations, the newest first. One that cannot be read is passed over and kept. */
export function loadAll() {
  const found = [];
  for (let i = 0; i < local.length; i++) {
    const key = local.key(i);
    if (!key.startsWith(PREFIX)) continue;
    try {
      found.push(readConversation(JSON.parse(local.getItem(key)), key.slice(PREFIX.length)));
    } catch {
      console.info(`${key} is not a conversation of this version`);
    }
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** False where the storage is full. */
export function save(conversation) {
  try {
    local.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export const remove = (id) => local.removeItem(PREFIX + id);

/** Calls back when another tab has changed a conversation. */
export function onOtherTab(listener) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) listener();
  });
}

export const toJson = (conversations) => JSON.stringify({ format: FORMAT, version: VERSION, conversations }, null, 2);

/** The conversations of an export, under new ids. Throws an `Error` that says what is wrong with it. */
export function fromJson(text) {
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (body?.format !== FORMAT || body.version !== VERSION || !Array.isArray(body.conversations)) {
    throw new Error(`The file is not an export of this page: it must say "format": "${FORMAT}", "version": ${VERSION}.`);
  }
  return body.conversations.map((conversation) => readConversation(conversation, newId()));
}

function readConversation(value, id) {
  if (typeof value !== "object" || value === null || !Array.isArray(value.turns)) throw new Error("A conversation without turns.");
  const lanes = list(value.lanes).slice(0, MAX_LANES).map((lane) => ({ model: text(lane?.model), settings: readSettings(lane?.settings) }));
  if (!lanes.length) throw new Error("A conversation without a model.");
  const turns = value.turns.map((turn) => readTurn(turn, lanes.length));
  const first = turns.find((turn) => turn.kind === "user");
  return { id, title: text(value.title) || (first ? titleOf(first.text) : ""), updated: number(value.updated) ?? Date.now(), lanes, turns };
}

function readTurn(value, numLanes) {
  const answers = Array.from({ length: numLanes }, (_, lane) => list(value?.answers?.[lane]).map(readAnswer));
  const shown = answers.map((variants, lane) => Math.min(Math.max(0, number(value?.shown?.[lane]) ?? 0), Math.max(0, variants.length - 1)));
  const turn = { id: newId(), answers, shown, ...(value?.beginsSent === true && { beginsSent: true }) };
  if (value?.kind !== "tools") return { ...turn, kind: "user", text: text(value?.text) };
  const results = list(value.results).map((result) => ({ tool_call_id: text(result?.tool_call_id), content: text(result?.content) }));
  return { ...turn, kind: "tools", results };
}

function readAnswer(value) {
  const error = value?.error && { message: text(value.error.message), status: number(value.error.status) ?? 0, code: text(value.error.code) };
  const usage = value?.usage && {
    prompt_tokens: number(value.usage.prompt_tokens) ?? 0,
    completion_tokens: number(value.usage.completion_tokens) ?? 0,
  };
  return {
    text: text(value?.text),
    reasoning: text(value?.reasoning),
    toolCalls: list(value?.toolCalls).map((call) => ({ id: text(call?.id), name: text(call?.name), arguments: text(call?.arguments) })),
    finish: text(value?.finish) || null,
    error: error || null,
    usage: usage || null,
    model: text(value?.model),
    ttft_s: number(value?.ttft_s),
    elapsed_s: number(value?.elapsed_s),
    decode_s: number(value?.decode_s),
    status: STATUSES.has(value?.status) ? value.status : "stopped",
  };
}

const text = (value) => (typeof value === "string" ? value : "");
const list = (value) => (Array.isArray(value) ? value : []);
const number = (value) => (Number.isFinite(value) ? value : null);
