// The server's routes, and what to do when one of them fails.

let key = null; // In this tab's memory only.

/** Send this key from now on; null sends none. */
export function useKey(value) {
  key = value;
}

/** Whether one is sent. */
export function hasKey() {
  return key !== null;
}

/** A request that failed: what happened, and what to do about it. */
export class Failure extends Error {
  constructor(fact, advice, status = 0, after = null) {
    super(fact);
    this.advice = advice;
    this.status = status;
    this.after = after;
  }
}

const ADVICE = {
  400: "Change what the message names, then try again.",
  401: "Give the key that the server was started with.",
  403: "Leave it out, or ask whoever runs the server to allow it.",
  404: "Reload the list: it may have been moved or removed.",
  413: "Send less: shorten the message, or clear the conversation.",
  422: "Change what the message names, then try again.",
  429: "Wait a moment, then try again.",
  500: "Nothing of the reply was handed out. Try again; if it stays, look at the server's log.",
  503: "Wait until the server is up again, then try again.",
  504: "Ask for fewer tokens, or try again when fewer people ask.",
};

/** The error object in a body of OpenAI's shape. */
function failed(body, status, after = null) {
  const own = body && typeof body === "object" ? body.error : null;
  const fact = own && own.message ? String(own.message) : `the server answered with ${status}`;
  let advice = ADVICE[status] ?? "Try again; if it stays, look at the server's log.";
  if (own && own.code === "context_length_exceeded") {
    advice = "Shorten the message, ask for fewer tokens, or clear the conversation.";
  }
  return new Failure(fact, advice, status, after);
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key !== null) headers.authorization = `Bearer ${key}`;
  if (options.body !== undefined) headers["content-type"] = "application/json";
  let reply;
  try {
    // Relative, so that the page also works below a path.
    reply = await fetch(new URL(path, document.baseURI), {
      ...options,
      headers,
      body: options.body === undefined ? undefined : JSON.stringify(options.body),
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw gone();
  }
  if (reply.ok) return reply;
  let body = null;
  try {
    body = await reply.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  const after = Number(reply.headers.get("retry-after"));
  const found = failed(body, reply.status, Number.isFinite(after) && after > 0 ? after : null);
  if (found.status === 401) window.dispatchEvent(new CustomEvent("demur:key"));
  throw found;
}

function gone() {
  return new Failure(
    "the server does not answer",
    "Start it again with `demur serve`, then try again.",
  );
}

/** What a route answers, as a value. */
export async function json(path, options = {}) {
  const reply = await ask(path, options);
  try {
    return await reply.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw gone();
  }
}

/** What a route answers, as text. */
export async function text(path, options = {}) {
  return (await ask(path, options)).text();
}

const MOST_TRIES = 5;

/**
 * Ask, and ask again while the server is busy.
 *
 * @param {() => Promise} attempt
 * @param {AbortSignal} signal Ends the waiting as well.
 * @param {(left: number, next: number, most: number) => void} waiting Is told each second.
 */
export async function patiently(attempt, signal, waiting) {
  for (let tried = 1; ; tried += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (!(error instanceof Failure) || error.status !== 429 || tried === MOST_TRIES) throw error;
      for (let left = Math.min(error.after ?? 2 ** tried, 30); left > 0; left -= 1) {
        waiting(left, tried + 1, MOST_TRIES);
        await pause(1000, signal);
      }
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((done, fail) => {
    const stop = () => {
      clearTimeout(timer);
      fail(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      done();
    }, milliseconds);
    if (signal.aborted) stop();
    else signal.addEventListener("abort", stop, { once: true });
  });
}

/**
 * The events of a streamed reply, in order.
 *
 * @throws {Failure} Before the first one, or when the stream breaks off before its end.
 */
export async function* stream(path, body, signal) {
  const reply = await ask(path, { method: "POST", body, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError" || signal.aborted) {
          throw new DOMException("stopped", "AbortError");
        }
        throw new Failure(
          "the reply was cut off: the server went away",
          "Start it again with `demur serve`, then try again.",
        );
      }
      if (part.done) break;
      rest += part.value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event
          .split("\n")
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart())
          .join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const value = JSON.parse(data);
        if (value.error) {
          const status = { timeout: 504, server_error: 500 }[value.error.type] ?? 500;
          throw failed(value, status);
        }
        yield value;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Failure("the reply was cut off before its end", "Try again.");
}
