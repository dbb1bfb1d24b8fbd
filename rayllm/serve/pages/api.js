// The server's API: the key, plain requests, and chat streams that survive a lost connection.

import { readEvents } from "./sse.js";
import { session } from "./storage.js";

const KEY = "rayllm.api-key";
const CHAT = "v1/chat/completions";
const HELD_MS = 110_000; // the server holds an answer for 120 s after its connection is lost
const RESUME_DELAYS_MS = [150, 300, 600, 1200, 2500, 5000];
const ASK_TRIES = 6; // with several ingress processes, one of them holds the answer

/** What the server answered, in its own words. `status` is 0 where it could not be reached. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, type = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, type, param });
  }
}

/** The key lives as long as the tab, nowhere else. */
export const apiKey = {
  get: () => session.getItem(KEY) ?? "",
  set: (value) => (value ? session.setItem(KEY, value) : session.removeItem(KEY)),
};

function headers(more = {}) {
  const key = apiKey.get();
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  try {
    const { error } = JSON.parse(text);
    if (error && typeof error.message === "string") return new ApiError(error.message, { ...error, status: response.status });
  } catch {
    // not ours: a proxy on the way, perhaps
  }
  return new ApiError(text.slice(0, 500) || response.statusText || "no reason given", { status: response.status });
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`The server at ${location.host} cannot be reached. Is it running?`, { code: "unreachable" });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

export const getJson = async (path) => (await request(path)).json();

export async function postJson(path, body) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return (await request(path, options)).json();
}

export const getText = async (path) => (await request(path)).text();

export const listModels = async () => (await getJson("v1/models")).data;

/** `{ready, stage}` of the server; needs no key. */
export async function readiness() {
  try {
    const response = await fetch("ready", { cache: "no-store" });
    const body = await response.json();
    return { ready: response.ok, reachable: true, stage: body.stage ?? "", reason: body.reason ?? "" };
  } catch {
    return { ready: false, reachable: false, stage: "not reachable", reason: "" };
  }
}

/**
 * Yields the chunks of an answer as they come, each with `.eventId`. A connection that is lost is taken up again
 * where it was. `resume` continues an answer begun before, at that event id. `onLink` is told "lost" and "found".
 */
export async function* streamChat(body, { signal, resume = null, onLink = () => {} }) {
  const position = { id: resume };
  let response = resume ? await resumed(position.id, signal) : await begun(body, signal);
  for (;;) {
    try {
      for await (const event of readEvents(response.body)) {
        if (event.data === "[DONE]") return;
        const chunk = JSON.parse(event.data);
        if (event.event === "error") throw new ApiError(chunk.error.message, { ...chunk.error, status: 200 });
        if (event.id) position.id = event.id;
        yield { ...chunk, eventId: event.id };
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
    }
    if (signal.aborted) throw new DOMException("stopped", "AbortError");
    await whileHere(); // a page that is left loses its streams; the next one takes them up, not this
    if (!position.id) throw new ApiError("The connection was lost before the answer began.", { code: "connection_lost" });
    onLink("lost");
    response = await resumed(position.id, signal);
    onLink("found");
  }
}

let isLeft = false;
addEventListener("pagehide", () => (isLeft = true));
addEventListener("pageshow", () => (isLeft = false));

const whileHere = () => (isLeft ? new Promise((resolve) => addEventListener("pageshow", resolve, { once: true })) : null);

const begun = (body, signal) =>
  request(CHAT, {
    method: "POST",
    signal,
    headers: { "content-type": "application/json", "x-rayllm-resume": "true" },
    body: JSON.stringify({ ...body, stream: true }),
  });

async function resumed(lastEventId, signal) {
  const deadline = Date.now() + HELD_MS;
  let numUnknown = 0;
  for (let i = 0; ; i++) {
    try {
      return await request(CHAT, { method: "POST", signal, headers: { "last-event-id": lastEventId } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (error.status === 404) numUnknown++;
      const isFinal = error.status === 404 ? numUnknown >= ASK_TRIES : error.status !== 0 && error.status < 500;
      if (isFinal || Date.now() > deadline) {
        throw new ApiError(`The connection was lost, and the answer could not be continued: ${error.message}`, {
          status: error.status,
          code: error.code ?? "connection_lost",
        });
      }
    }
    await pause(RESUME_DELAYS_MS[Math.min(i, RESUME_DELAYS_MS.length - 1)], signal);
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}

/** Ends an answer at the server. Closing its connection is not enough: the server would hold it for our return. */
export async function dropAnswer(answerId) {
  for (let i = 0; i < ASK_TRIES; i++) {
    try {
      await request(`${CHAT}/${encodeURIComponent(answerId)}`, { method: "DELETE", keepalive: true });
      return;
    } catch (error) {
      if (error.status !== 404) return;
    }
  }
}
