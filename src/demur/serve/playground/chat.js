// Two columns of replies to the same questions.

import { Failure, patiently, stream } from "./api.js";
import { counted, el, fresh, number, prose, say } from "./dom.js";
import { COLUMNS, changed, changes, demurOf, messagesOf, state, words } from "./state.js";

const NAMES = { plain: "Plain", edited: "Edited" };

/** Build the view. */
export function showChat(view) {
  const empty = about();
  const turns = el("div", { class: "turns" });
  const id = fresh("question");
  const question = el("textarea", {
    id,
    rows: 2,
    placeholder: "Write a message; both columns answer.",
    "aria-describedby": `${id}-help`,
  });
  const harmful = el("input", { type: "checkbox", id: `${id}-harmful` });
  const send = el("button", { type: "submit", class: "main", text: "Send" });
  const stop = el("button", { type: "button", text: "Stop", hidden: true });
  const clear = el("button", { type: "button", text: "Clear", disabled: true });
  const form = el(
    "form",
    { class: "composer card" },
    el("label", { for: id, class: "unseen", text: "Message" }),
    question,
    el(
      "div",
      { class: "row" },
      el(
        "span",
        { class: "check" },
        harmful,
        el("label", { for: `${id}-harmful`, text: "harmful: fold its replies" }),
      ),
      el("span", { id: `${id}-help`, class: "quiet help", text: "Enter sends, Shift+Enter breaks the line, Esc stops" }),
      el("span", { class: "buttons" }, clear, stop, send),
    ),
  );
  const running = new Set();
  const refresh = () => {
    stop.hidden = running.size === 0;
    send.disabled = running.size > 0;
    clear.disabled = state.turns.length === 0;
    empty.hidden = state.turns.length > 0;
  };
  const run = async (turn, column) => {
    const controller = new AbortController();
    running.add(controller);
    refresh();
    try {
      await write(turn, column, controller.signal);
    } finally {
      running.delete(controller);
      refresh();
      changed("turns");
    }
  };
  const halt = () => running.forEach((controller) => controller.abort());

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (!text || running.size) return;
    const turn = {
      id: fresh("turn"),
      question: text,
      harmful: harmful.checked,
      replies: Object.fromEntries(COLUMNS.map((column) => [column, blank(column)])),
    };
    state.turns.push(turn);
    turns.append(shown(turn, run));
    question.value = "";
    harmful.checked = false;
    for (const column of COLUMNS) run(turn, column);
    turns.lastElementChild.scrollIntoView({ block: "nearest", behavior: gentle() });
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    } else if (event.key === "Escape" && running.size) {
      halt();
    }
  });
  stop.addEventListener("click", () => {
    halt();
    question.focus();
  });
  clear.addEventListener("click", () => {
    halt();
    state.turns.length = 0;
    turns.replaceChildren();
    refresh();
    changed("turns");
    say("The conversation is cleared.");
    question.focus();
  });
  view.replaceChildren(empty, turns, form);
  for (const turn of state.turns) turns.append(shown(turn, run));
  refresh();
}

function gentle() {
  return window.matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
}

/** What stands where no conversation is yet. */
function about() {
  const { info } = state;
  const rows = [
    ["Model", `${info.model}: ${counted(info.layers, "block")} of width ${info.d_model}, ${info.dtype}`],
    [
      "Directions",
      info.directions.length
        ? info.directions.map((one) => `${one.name} (${one.site})`).join(", ")
        : "none; load one with `--direction FILE`",
    ],
    [
      "Guard",
      info.guard
        ? `reads ${info.guard.site}; flags above ${number(info.guard.threshold.value)} nats`
        : "none; load one with `--guard FILE`",
    ],
    [
      "Anchor",
      info.anchor
        ? `${info.anchor.sites.length} sites at strength ${number(info.anchor.strength)}` +
          (info.anchor.gate ? `; its gate opens above ${number(info.anchor.gate.threshold.value)} nats` : "")
        : "none; load one with `--anchor FILE`",
    ],
  ];
  return el(
    "div",
    { class: "card about" },
    el("h2", { text: "The same question, twice" }),
    el("p", {
      text:
        "The left column is the model as it is served, the right one the model under the edits of" +
        " the panel, with the same draws. Each column keeps its own conversation, in this tab only.",
    }),
    el("dl", { class: "facts-list" }, rows.map(([name, value]) => [el("dt", { text: name }), el("dd", {}, prose(value))])),
  );
}

function blank(column) {
  return { column, text: "", demur: null, done: false, element: null };
}

function shown(turn, run) {
  const own = el(
    "article",
    { class: "turn card", id: turn.id, "aria-label": "Turn" },
    el("p", { class: "question" }, turn.question),
  );
  const sides = el("div", { class: "sides" });
  for (const column of COLUMNS) {
    const reply = turn.replies[column];
    reply.element = new Shown(turn, reply, () => run(turn, column));
    sides.append(reply.element.own);
  }
  own.append(sides);
  return own;
}

/** A reply on the page. */
class Shown {
  constructor(turn, reply, again) {
    this.turn = turn;
    this.reply = reply;
    this.again = again;
    this.title = el("h3", { text: NAMES[reply.column] });
    this.made = el("span", { class: "made quiet" });
    this.state = el("span", { class: "state quiet" });
    this.body = el("div", { class: "body" });
    this.foot = el("div", { class: "foot" });
    this.own = el(
      "section",
      { class: `reply ${reply.column}`, "aria-label": NAMES[reply.column] },
      el("div", { class: "head" }, this.title, this.made, this.state),
      this.body,
      this.foot,
    );
    this.begin();
  }

  begin() {
    this.text = el("div", { class: "text" });
    this.body.replaceChildren(this.text);
    this.foot.replaceChildren();
    this.marked = false;
    this.own.classList.remove("failed");
    if (this.turn.harmful) this.fold("You marked the request as harmful");
    else if (this.turn.flagged) this.fold("The guard flagged the request");
  }

  /** Put the reply behind a line that opens it. */
  fold(why) {
    if (this.folded) {
      this.body.replaceChildren(this.folded);
      this.inside.replaceChildren(this.text);
      return;
    }
    this.inside = el("div", {}, this.text);
    this.folded = el(
      "details",
      { class: "folded" },
      el("summary", {}, `${why}: the reply is folded. `, el("span", { class: "quiet", text: "Open to read it." })),
      this.inside,
    );
    this.body.replaceChildren(this.folded);
  }

  edits(edits) {
    const said = edits.map(words).join("; ");
    this.made.textContent = this.reply.column === "edited" ? said || "no edits" : said;
  }

  status(text, busy = false) {
    this.state.textContent = text;
    this.own.setAttribute("aria-busy", String(busy));
  }

  write(text) {
    const last = this.text.lastChild;
    if (last?.nodeType === Node.TEXT_NODE) last.appendData(text);
    else this.text.append(text);
  }

  /** Where in the reply the gate opened. */
  mark(gate) {
    if (this.marked || gate.gate !== "open") return;
    this.marked = true;
    const where = gate.opened_at ? `after ${counted(gate.opened_at, "token")}` : "at the question";
    const by = gate.by ? `, by ${gate.by}` : "";
    this.text.append(
      el("span", { class: "gate-mark", text: `gate opened ${where}${by}` }),
    );
  }

  /** What was written is taken back. */
  anew() {
    const dropped = this.reply.text;
    this.reply.text = "";
    this.text.replaceChildren();
    if (!dropped) return;
    this.text.append(
      el(
        "details",
        { class: "dropped" },
        el("summary", { text: "Dropped when the gate opened; the reply began anew" }),
        el("div", { class: "text", text: dropped }),
      ),
    );
  }

  measures(demur) {
    const parts = [];
    if (demur.guard) parts.push(meter(demur.guard));
    if (demur.anchor && demur.anchor.gate !== "none") parts.push(gateLine(demur.anchor));
    const made = (demur.edits ?? []).filter((one) => one.kind !== "anchor");
    if (made.length) {
      const each = made.map((one) => `${one.direction}: ${counted(one.applied, "time")}`);
      parts.push(el("p", { class: "quiet", text: `Edits acted on ${each.join(", ")}` }));
    }
    this.foot.replaceChildren(...parts);
  }

  fail(failure) {
    this.own.classList.add("failed");
    this.foot.append(
      el(
        "div",
        { class: "failure", role: "alert" },
        el("p", {}, el("b", {}, prose(failure.message))),
        el("p", {}, prose(failure.advice)),
        el("button", { type: "button", text: "Try again", on: { click: this.again } }),
      ),
    );
  }
}

/** The guard's score against its threshold. */
function meter(guard) {
  const { score, threshold, flagged } = guard;
  const low = Math.min(0, score, threshold ?? 0);
  const high = Math.max(score, threshold ?? score, low + 1e-9);
  const top = high + 0.15 * (high - low);
  const at = (value) => `${(100 * (value - low)) / (top - low)}%`;
  const bar = el("span", { class: "fill" });
  bar.style.width = at(score);
  const line = threshold === null ? null : el("span", { class: "threshold" });
  if (line) line.style.left = at(threshold);
  const verdict = flagged ? "flagged" : "passed";
  const text = `${number(score)} of ${threshold === null ? "∞" : number(threshold)} nats`;
  const reads = Object.entries(guard.reads)
    .map(([name, value]) => `${name} ${number(value)}`)
    .join(", ");
  return el(
    "div",
    { class: `guard ${verdict}` },
    el("span", { class: "name", text: "Guard" }),
    el(
      "span",
      {
        class: "meter",
        role: "meter",
        "aria-label": "Guard's score",
        "aria-valuemin": low,
        "aria-valuemax": top,
        "aria-valuenow": score,
        "aria-valuetext": `${text}, ${verdict}`,
      },
      bar,
      line,
    ),
    el("span", { class: "value", text, title: `By ${guard.by}. In standard deviations: ${reads}` }),
    el("span", { class: `badge ${verdict}`, text: verdict }),
  );
}

function gateLine(gate) {
  const open = gate.gate === "open";
  const scores =
    gate.score === null ? "" : `${number(gate.score)} of ${number(gate.threshold)} nats`;
  const when = !open
    ? ""
    : gate.opened_at
      ? `after ${counted(gate.opened_at, "token")}, by ${gate.by}`
      : `at the question, by ${gate.by}`;
  const anew = gate.begun_anew ? `begun anew ${counted(gate.begun_anew, "time")}` : "";
  return el(
    "div",
    { class: "gate" },
    el("span", { class: "name", text: "Gate" }),
    el("span", { class: `badge ${gate.gate}`, text: gate.gate }),
    el("span", { class: "value", text: [when, scores, anew].filter(Boolean).join("; ") }),
  );
}

/** Ask for one column's reply and write it down as it comes. */
async function write(turn, column, signal) {
  const reply = turn.replies[column];
  const { element } = reply;
  const name = NAMES[column];
  Object.assign(reply, { text: "", demur: null, done: false });
  element.begin();
  const { sampling, info } = state;
  const demur = demurOf(column);
  reply.edits = demur.edits.filter((one) => one.kind !== "anchor");
  element.edits(demur.edits);
  const body = {
    model: info.model,
    messages: messagesOf(turn, column),
    stream: true,
    stream_options: { include_usage: true },
    temperature: sampling.temperature,
    max_tokens: sampling.maxTokens,
    seed: sampling.seed,
    demur,
  };
  const began = performance.now();
  const took = () => `${((performance.now() - began) / 1000).toFixed(1)} s`;
  element.status("reading…", true);
  say(`${name}: waiting for the reply.`);
  let finish = null;
  let usage = null;
  const clock = setInterval(() => {
    if (reply.text) element.status(`writing… ${took()}`, true);
    else if (!reply.waits) element.status(`reading… ${took()}`, true);
  }, 500);
  const take = async () => {
    reply.waits = false;
    for await (const chunk of stream("v1/chat/completions", body, signal)) {
      if (chunk.usage) usage = chunk.usage;
      const own = chunk.demur;
      if (own) {
        reply.demur = { ...reply.demur, ...own };
        if (own.guard?.flagged && !turn.harmful) {
          turn.flagged = true;
          for (const one of Object.values(turn.replies)) {
            if (!one.element.folded) one.element.fold("The guard flagged the request");
          }
        }
        if (own.anew) element.anew();
        if (own.anchor) element.mark(own.anchor);
        element.measures(reply.demur);
      }
      for (const one of chunk.choices) {
        const text = one.delta.content ?? "";
        // A reply that began anew is told apart from what was dropped by its element.
        const more = own?.anew ? text.replace(/^\n\n/, "") : text;
        if (more) {
          if (!reply.text) say(`${name}: writing.`);
          reply.text += more;
          element.write(more);
        }
        finish = one.finish_reason ?? finish;
      }
    }
  };
  try {
    await patiently(take, signal, (left, next, most) => {
      reply.waits = true;
      element.status(`server busy; asking again in ${left} s (${next} of ${most})`, true);
      if (left === 1) say(`${name}: the server is busy; asking again.`);
    });
    const tokens = usage ? `${counted(usage.completion_tokens, "token")}, ` : "";
    const end = { length: ", cut at the most tokens", content_filter: ", refused by the guard" };
    element.status(`${tokens}${took()}${end[finish] ?? ""}`);
    say(`${name}: done, ${tokens}${took()}.`);
    if (!reply.text) element.write("(an empty reply)");
    reply.done = true;
  } catch (error) {
    if (error.name === "AbortError") {
      element.status(`stopped after ${took()}`);
      say(`${name}: stopped.`);
    } else {
      const failure =
        error instanceof Failure ? error : new Failure(`the page failed: ${error.message}`, "Reload it.");
      element.status("failed");
      element.fail(failure);
      if (!(error instanceof Failure)) throw error;
    }
  } finally {
    clearInterval(clock);
    element.own.setAttribute("aria-busy", "false");
  }
}
