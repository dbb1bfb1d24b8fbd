// A conversation as data, and what is sent of it.
//
// conversation: {id, title, updated, lanes: [{model, settings}], turns}
// turn:         {id, kind: "user", text, answers} or {id, kind: "tools", results: [{tool_call_id, content}], answers}
//               answers: one list of variants for each lane; shown: which of them
// answer:       {text, reasoning, toolCalls, finish, error, usage, model, ttft_s, elapsed_s, decode_s, status}
//               status: "running", "done", "stopped" or "failed"

export const MAX_LANES = 2;
const TITLE_CHARACTERS = 60;

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36)).join("");

export function newConversation(model = "", settings = {}) {
  return { id: newId(), title: "", updated: Date.now(), lanes: [{ model, settings: { ...settings } }], turns: [] };
}

export function newAnswer(model) {
  return {
    text: "", reasoning: "", toolCalls: [], finish: null, error: null, usage: null, model,
    ttft_s: null, elapsed_s: null, decode_s: null, status: "running",
  };
}

export function addTurn(conversation, content) {
  const turn = { id: newId(), ...content, answers: conversation.lanes.map(() => []), shown: conversation.lanes.map(() => 0) };
  conversation.turns.push(turn);
  if (!conversation.title && turn.kind === "user") conversation.title = titleOf(turn.text);
  conversation.updated = Date.now();
  return turn;
}

export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > TITLE_CHARACTERS ? `${line.slice(0, TITLE_CHARACTERS - 1)}…` : line;
}

/** Adds an answer of a lane and shows it; those before stay as variants. */
export function addAnswer(turn, lane, model) {
  const answer = newAnswer(model);
  turn.answers[lane].push(answer);
  turn.shown[lane] = turn.answers[lane].length - 1;
  return answer;
}

export const shownAnswer = (turn, lane) => turn.answers[lane]?.[turn.shown[lane]] ?? null;

export function addLane(conversation) {
  const { model, settings } = conversation.lanes[0];
  conversation.lanes.push({ model, settings: { ...settings } });
  for (const turn of conversation.turns) {
    turn.answers.push([]);
    turn.shown.push(0);
  }
}

/** Goes on with one lane alone. */
export function keepLane(conversation, lane) {
  conversation.lanes = [conversation.lanes[lane]];
  for (const turn of conversation.turns) {
    turn.answers = [turn.answers[lane]];
    turn.shown = [turn.shown[lane]];
  }
}

export const hasText = (answer) => Boolean(answer && (answer.text || answer.toolCalls.length));

/** Where what is sent begins: turns before it were left out by the user. */
export const firstSent = (conversation) => Math.max(0, conversation.turns.findIndex(({ beginsSent }) => beginsSent));

/**
 * The turn that what is sent may begin with next, so that about half of the turns before `turn` are left out; null where
 * there is nothing more to leave out. It is a user's: results of tools need the calls before them.
 */
export function nextToLeaveOut(conversation, turn) {
  const [from, last] = [firstSent(conversation), conversation.turns.indexOf(turn)];
  const later = [...conversation.turns.entries()].filter(([i, { kind }]) => i > from && i <= last && kind === "user");
  return (later.find(([i]) => i >= from + (last - from) / 2) ?? later.at(-1))?.[1] ?? null;
}

export function leaveOutBefore(conversation, turn) {
  for (const other of conversation.turns) delete other.beginsSent;
  turn.beginsSent = true;
}

/** The messages of a lane up to and with `turn`'s question. Turns that were never answered are left out. */
export function messagesFor(conversation, lane, turn) {
  const messages = [];
  const system = conversation.lanes[lane].settings.system?.trim();
  if (system) messages.push({ role: "system", content: system });
  const last = conversation.turns.indexOf(turn);
  for (let i = Math.min(firstSent(conversation), last); i <= last; i++) {
    const answer = i < last ? shownAnswer(conversation.turns[i], lane) : null;
    if (i < last && !hasText(answer)) continue;
    messages.push(...questionMessages(conversation.turns[i]));
    if (answer) messages.push(answerMessage(answer, conversation.turns[i + 1]?.kind === "tools"));
  }
  return messages;
}

function questionMessages(turn) {
  if (turn.kind === "user") return [{ role: "user", content: turn.text }];
  return turn.results.map(({ tool_call_id, content }) => ({ role: "tool", tool_call_id, content }));
}

/** Calls are told only where their results follow: servers refuse calls that nobody answered. */
function answerMessage(answer, isAnsweredByTools) {
  if (!isAnsweredByTools || !answer.toolCalls.length) return { role: "assistant", content: answer.text };
  const calls = answer.toolCalls.map(({ id, name, arguments: args }) => ({
    id, type: "function", function: { name, arguments: args },
  }));
  return { role: "assistant", content: answer.text || null, tool_calls: calls };
}

/** Takes a chunk of a stream into the answer; true where it brought text, reasoning or a call. */
export function takeChunk(answer, chunk) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  if (choice.finish_reason) answer.finish = choice.finish_reason;
  const delta = choice.delta ?? {};
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  answer.text += delta.content ?? "";
  answer.reasoning += reasoning;
  for (const part of delta.tool_calls ?? []) takeToolPart(answer.toolCalls, part);
  return Boolean(delta.content || reasoning || delta.tool_calls?.length);
}

function takeToolPart(calls, part) {
  const index = Number.isInteger(part.index) ? Math.min(part.index, calls.length) : calls.length;
  calls[index] ??= { id: "", name: "", arguments: "" };
  if (part.id) calls[index].id = part.id;
  calls[index].name += part.function?.name ?? "";
  calls[index].arguments += part.function?.arguments ?? "";
}

export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}`];
  conversation.lanes.forEach(({ model, settings }, lane) => {
    if (settings.system?.trim()) parts.push(`**System${laneName(conversation, lane)}** (${model})\n\n${settings.system.trim()}`);
  });
  for (const turn of conversation.turns) {
    const asked = turn.kind === "user" ? turn.text : turn.results.map(({ content }) => fenced(content)).join("\n\n");
    parts.push(`## ${turn.kind === "user" ? "User" : "Tool results"}\n\n${asked}`);
    conversation.lanes.forEach((_, lane) => {
      const answer = shownAnswer(turn, lane);
      if (answer) parts.push(answerMarkdown(answer, laneName(conversation, lane)));
    });
  }
  return `${parts.join("\n\n")}\n`;
}

const laneName = (conversation, lane) => (conversation.lanes.length > 1 ? ` ${"AB"[lane]}` : "");

const fenced = (text, language = "") => `~~~~${language}\n${text}\n~~~~`;

function answerMarkdown(answer, name) {
  const parts = [`## Assistant${name} (${answer.model})`];
  if (answer.reasoning) parts.push(`<details><summary>Reasoning</summary>\n\n${answer.reasoning}\n\n</details>`);
  if (answer.text) parts.push(answer.text);
  for (const call of answer.toolCalls) parts.push(`Calls \`${call.name}\`:\n\n${fenced(call.arguments, "json")}`);
  if (answer.error) parts.push(`Error: ${answer.error.message}`);
  return parts.join("\n\n");
}
