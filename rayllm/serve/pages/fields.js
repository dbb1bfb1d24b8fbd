// The settings of a lane: what they are called here and in a request, and how an entry becomes a value.
// An empty entry is not sent, so that the server's own default holds.

export const FIELDS = [
  { name: "temperature", label: "Temperature", hint: "0 always takes the likeliest token; default: the model's.", kind: "number", min: 0, max: 2, step: 0.1, main: true },
  { name: "max_tokens", label: "Max tokens", hint: "The longest answer, in tokens.", kind: "integer", min: 1, step: 1, main: true },
  { name: "top_p", label: "Top p", hint: "Draws from the likeliest tokens that together have this probability.", kind: "number", min: 0, max: 1, step: 0.05, main: true },
  { name: "seed", label: "Seed", hint: "The same seed gives the same answer.", kind: "integer", step: 1, main: true },
  { name: "top_k", label: "Top k", hint: "Draws from this many likeliest tokens; 0 from all.", kind: "integer", min: 0, step: 1 },
  { name: "min_p", label: "Min p", hint: "Leaves out tokens less likely than this share of the likeliest.", kind: "number", min: 0, max: 1, step: 0.01 },
  { name: "presence_penalty", label: "Presence penalty", hint: "Above 0, turns away from tokens already said.", kind: "number", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "The same, by how often they were said.", kind: "number", min: -2, max: 2, step: 0.1 },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "Above 1, divides the odds of tokens already seen.", kind: "number", min: 0, step: 0.05 },
];

const NAMES = ["system", "stop", "extra", ...FIELDS.map((field) => field.name)];

/** Settings out of storage or a file: known names, texts only. */
export function readSettings(value) {
  const settings = {};
  for (const name of NAMES) if (typeof value?.[name] === "string" && value[name]) settings[name] = value[name];
  return settings;
}

/** What a request carries of the settings. Throws an `Error` for an entry that cannot be sent. */
export function requestFields(settings) {
  const fields = {};
  for (const { name, label, kind } of FIELDS) {
    const entry = (settings[name] ?? "").trim();
    if (!entry) continue;
    const value = Number(entry);
    if (!Number.isFinite(value) || (kind === "integer" && !Number.isInteger(value))) {
      throw new Error(`${label} must be a ${kind === "integer" ? "whole " : ""}number, not “${entry}”.`);
    }
    fields[name] = value;
  }
  const stop = (settings.stop ?? "").split("\n").filter((line) => line);
  if (stop.length) fields.stop = stop;
  return { ...fields, ...extraFields(settings.extra ?? "") };
}

function extraFields(entry) {
  if (!entry.trim()) return {};
  let value;
  try {
    value = JSON.parse(entry);
  } catch (error) {
    throw new Error(`More fields is not JSON: ${error.message}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error("More fields must be a JSON object.");
  return value;
}

/** In a few words, what a lane was set to: for the head of a column. */
export function describeSettings(settings) {
  const parts = FIELDS.filter(({ name }) => settings[name]).map(({ name, label }) => `${label.toLowerCase()} ${settings[name]}`);
  if (settings.system?.trim()) parts.unshift("system prompt");
  if (settings.stop) parts.push("stop");
  if (settings.extra?.trim()) parts.push("more fields");
  return parts.join(" · ") || "default settings";
}
