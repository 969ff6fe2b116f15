// Where a conversation stands along a direction, token by token and layer by layer.

import { Failure, json, patiently } from "./api.js";
import { choice, el, fresh, number, prose, round, say, svg, working } from "./dom.js";
import { COLUMNS, changes, demurOf, messagesOf, state, words } from "./state.js";

const ROW = 19; // CSS pixels of a token.
const PAUSE = 250; // Milliseconds after the last change before the model is asked.
const MUTED = 0.3; // Share of its colour that a cell within the null band keeps.
const SPAN_WORDS = {
  template: "template",
  earlier: "earlier turns",
  instruction: "instruction",
  post_instruction: "post-instruction",
  response: "reply",
};

/** A token as people can see it: no line breaks, no control characters. */
function visible(text) {
  const marks = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
  // eslint-disable-next-line no-control-regex
  return text.replace(/[\u0000-\u001f\u007f]/g, (one) => marks[one] ?? String.fromCharCode(0x2400 + (one.charCodeAt(0) & 0x1f)));
}

/** Colours as they are now, light or dark. */
function palette(probe) {
  const read = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  };
  return { rise: read("--rise"), fall: read("--fall"), card: read("--card") };
}

/** Build the view. */
export function showHeat(view) {
  const { info } = state;
  if (!info.limits.trace || !info.directions.length) {
    const why = info.limits.trace
      ? "No direction is loaded, so there is nothing to project on. Start the server with `--direction FILE`."
      : "This server does not let activations be read. Ask whoever runs it.";
    view.replaceChildren(el("div", { class: "card" }, el("h2", { text: "Heat map" }), el("p", {}, prose(why))));
    return;
  }
  new Heat(view);
}

let old = new AbortController(); // Of the listeners of a view that is built anew.

class Heat {
  constructor(view) {
    old.abort();
    old = new AbortController();
    this.view = view;
    this.direction = state.info.directions[0].name;
    this.source = "own";
    this.under = "panel";
    this.root = true;
    this.nulls = "covariance";
    this.own = { question: "Name three kinds of trees.", reply: "" };
    this.found = null;
    this.cell = null; // Of the keyboard: row (token) and column (site).
    this.hover = null;
    this.limits = new Map(); // By text and direction, so that an edit does not change the scale.
    this.build();
    const { signal } = old;
    changes.addEventListener("edits", () => this.under === "panel" && this.soon(), { signal });
    changes.addEventListener("turns", () => this.sources(true), { signal });
    changes.addEventListener("view", () => this.stale && this.soon(0), { signal });
    changes.addEventListener("theme", () => this.draw(), { signal });
    new ResizeObserver(() => this.draw()).observe(this.view);
    this.sources(true);
    this.soon(0);
  }

  // What is on the page ---------------------------------------------------------------------------

  build() {
    const pick = (label, name, options) =>
      choice(label, options, this[name], (value) => {
        this[name] = value;
        this.soon(0);
      });
    this.sourceField = choice("Text", [["own", "own text"]], "own", (value) => {
      this.source = value;
      this.chosen = true;
      this.sources(false);
      this.soon(0);
    });
    this.fields = el(
      "div",
      { class: "fields" },
      this.sourceField,
      pick("Direction", "direction", state.info.directions.map((one) => [one.name, one.name])),
      pick("Edits", "under", [
        ["panel", "those of the panel"],
        ["none", "none"],
      ]),
      pick("Null", "nulls", [
        ["covariance", "like the text's own variation"],
        ["isotropic", "alike in all directions"],
      ]),
      choice("Colours", [["root", "square root"], ["linear", "linear"]], "root", (value) => {
        this.root = value === "root";
        this.draw();
      }),
    );
    const area = (label, name, placeholder) => {
      const id = fresh("own");
      const input = el("textarea", { id, rows: 2, placeholder, spellcheck: "false" });
      input.value = this.own[name];
      input.addEventListener("input", () => {
        this.own[name] = input.value;
        this.soon();
      });
      return el("span", { class: "field tall" }, el("label", { for: id, text: label }), input);
    };
    this.ownFields = el(
      "div",
      { class: "fields own-text" },
      area("Question", "question", "What the user says"),
      area("Reply", "reply", "What the model is read on; may be empty"),
    );
    const unfold = fresh("unfold");
    this.unfold = el("input", { type: "checkbox", id: unfold });
    this.unfold.addEventListener("change", () => this.show());
    this.folding = el(
      "p",
      { class: "check", hidden: true },
      this.unfold,
      el("label", { for: unfold, text: "show the words of this folded reply" }),
    );
    this.state = el("div", { class: "heat-state" });
    this.told = el("p", { class: "quiet told" });

    this.axis = el("div", { class: "axis", "aria-hidden": "true" });
    this.labels = el("ol", { class: "labels", "aria-label": "Tokens" });
    this.canvas = el("canvas", {
      tabindex: 0,
      role: "application",
      "aria-roledescription": "heat map",
      "aria-label": "Projections by token (up and down) and layer (left and right)",
    });
    this.ring = el("div", { class: "ring", hidden: true });
    this.stripe = el("div", { class: "stripe", hidden: true });
    this.cells = el("div", { class: "cells" }, this.canvas, this.stripe, this.ring);
    this.grid = el(
      "div",
      { class: "heat-scroll" },
      el("div", { class: "heat-grid" }, el("div", { class: "corner quiet", text: "token ╲ layer" }), this.axis, this.labels, this.cells),
    );
    this.readout = el("p", { class: "readout" });
    this.legend = el("div", { class: "legend" });
    this.line = el("figure", { class: "line" });
    this.probe = el("span", { class: "unseen", "aria-hidden": "true" });
    this.result = el(
      "div",
      { class: "heat-result", hidden: true },
      el("div", { class: "card map" }, this.readout, this.grid, this.legend, keyOf()),
      el("div", { class: "card one" }, el("h2", { text: "One token over the layers" }), this.line),
    );
    this.view.replaceChildren(
      el("div", { class: "card" }, el("h2", { text: "Projection on a direction" }), this.fields, this.ownFields, this.folding, this.told, this.state),
      this.result,
      this.probe,
    );
    this.canvas.addEventListener("pointermove", (event) => this.over(event));
    this.canvas.addEventListener("pointerleave", () => this.enter(null));
    this.canvas.addEventListener("click", (event) => {
      this.cell = this.at(event);
      this.moved();
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.moved(true));
    this.labels.addEventListener("click", (event) => {
      const item = event.target.closest("li");
      if (!item || !window.getSelection().isCollapsed) return; // Words are being selected.
      this.cell = { row: [...this.labels.children].indexOf(item), column: this.cell?.column ?? 0 };
      this.moved();
    });
  }

  /** The texts that can be read: each reply of the conversation, and one's own. */
  sources(latest) {
    const select = this.sourceField.querySelector("select");
    const options = [];
    state.turns.forEach((turn, i) => {
      for (const column of COLUMNS) {
        const reply = turn.replies[column];
        // While it is written it changes with each token.
        if (reply.element?.own.getAttribute("aria-busy") === "true") continue;
        options.push([`${turn.id}/${column}`, `turn ${i + 1}, ${column}`]);
      }
    });
    options.push(["own", "own text"]);
    select.replaceChildren(...options.map(([value, text]) => el("option", { value, text })));
    const known = options.some(([value]) => value === this.source);
    if (latest && (!this.chosen || !known)) {
      this.chosen = this.chosen && known;
      const last = state.turns.at(-1);
      const wanted = last ? `${last.id}/edited` : "own";
      this.source = options.some(([value]) => value === wanted) ? wanted : options[0][0];
      this.soon();
    }
    select.value = this.source;
    this.ownFields.hidden = this.source !== "own";
  }

  /** Messages and reply of the text that is chosen. */
  text() {
    if (this.source === "own") {
      const messages = [{ role: "user", content: this.own.question }];
      if (state.sampling.system.trim()) messages.unshift({ role: "system", content: state.sampling.system });
      return { messages, reply: this.own.reply, folded: false };
    }
    const [id, column] = this.source.split("/");
    const turn = state.turns.find((one) => one.id === id);
    const reply = turn.replies[column];
    return { messages: messagesOf(turn, column), reply: reply.text, folded: Boolean(turn.harmful || turn.flagged) };
  }

  // Asking ----------------------------------------------------------------------------------------

  soon(pause = PAUSE) {
    this.stale = true;
    clearTimeout(this.timer);
    if (this.view.hidden) return;
    this.timer = setTimeout(() => this.read(), pause);
  }

  async read() {
    this.stale = false;
    this.asking?.abort();
    const own = new AbortController();
    this.asking = own;
    const { messages, reply, folded } = this.text();
    if (!messages.at(-1).content.trim()) {
      this.state.replaceChildren(el("p", { class: "quiet", text: "Write a question to read." }));
      this.result.hidden = true;
      return;
    }
    const { edits, anchor } = this.under === "panel" ? demurOf("edited") : { edits: [], anchor: false };
    const body = { messages, direction: this.direction, edits, null: this.nulls };
    if (state.info.anchor && anchor === false) body.anchor = false;
    if (reply) body.reply = reply;
    const bar = working("Reading the model");
    // Short readings would only make the page flicker.
    const late = setTimeout(() => this.state.replaceChildren(bar), 150);
    this.grid.setAttribute("aria-busy", "true");
    try {
      const found = await patiently(
        () => json("demur/trace", { method: "POST", body, signal: own.signal }),
        own.signal,
        (left) => {
          clearTimeout(late);
          this.state.replaceChildren(el("p", { class: "quiet", text: `Server busy; asking again in ${left} s` }));
        },
      );
      if (this.asking !== own) return;
      this.found = found;
      this.folded = folded;
      this.unfold.checked = this.unfold.checked && folded && this.shownText === reply;
      this.shownText = reply;
      this.edits = edits;
      this.scaleKey = JSON.stringify([messages, reply, this.direction]);
      this.state.replaceChildren();
      this.show();
      say(`The heat map shows ${found.tokens.length} tokens at ${found.sites.length} layers.`);
    } catch (error) {
      if (error.name === "AbortError" || this.asking !== own) return;
      const failure = error instanceof Failure ? error : new Failure(`the page failed: ${error.message}`, "Reload it.");
      this.state.replaceChildren(
        el(
          "div",
          { class: "failure", role: "alert" },
          el("p", {}, el("b", {}, prose(failure.message))),
          el("p", {}, prose(failure.advice)),
          el("button", { type: "button", text: "Try again", on: { click: () => this.soon(0) } }),
        ),
      );
      if (!(error instanceof Failure)) throw error;
    } finally {
      clearTimeout(late);
      if (this.asking === own) this.grid.removeAttribute("aria-busy");
    }
  }

  // Drawing ---------------------------------------------------------------------------------------

  /** What is found, on the page. */
  show() {
    const { found } = this;
    const hidden = this.folded && !this.unfold.checked;
    this.folding.hidden = !this.folded;
    this.names = found.tokens.map((one) => (hidden && one.span === "response" ? "•••" : visible(one.text)));
    this.labels.replaceChildren(
      ...found.tokens.map((one, i) => {
        const own = el("li", { class: `${one.span}${one.t_inst ? " t_inst" : ""}` }, el("code", { text: this.names[i] }));
        if (one.t_inst) own.append(el("span", { class: "tag", text: "t_inst" }));
        return own;
      }),
    );
    const made = this.edits.length ? this.edits.map(words).join("; ") : "no edits";
    const { gate, opened_at: at, by } = found.anchor;
    const where = at ? `token ${at} of the reply` : "the question";
    const anchored = { open: ` The gate opened at ${where}, by ${by}.`, shut: " The gate stayed shut.", none: "" }[gate];
    this.told.textContent = `${found.tokens.length} tokens × ${found.sites.length} block boundaries, with ${made}; ${found.direction} was read at ${found.site}.${anchored}`;
    const rows = found.tokens.length;
    if (!this.cell || this.shownKey !== this.scaleKey || this.cell.row >= rows) {
      const column = Math.max(0, found.sites.indexOf(found.site));
      this.cell = { row: found.tokens.findIndex((one) => one.t_inst), column };
    }
    this.result.hidden = false;
    this.limit = this.limitOf();
    this.draw();
    if (this.shownKey !== this.scaleKey) {
      // Another text: show where it ends and the reply begins.
      this.shownKey = this.scaleKey;
      const { grid } = this;
      grid.scrollTop = this.cell.row * ROW - grid.clientHeight / 2;
    }
  }

  /** The value that has the full colour. */
  limitOf() {
    const { values, null: band, tokens } = this.found;
    const sizes = [];
    for (const row of values) {
      row.forEach((value, i) => {
        // A first token that takes all attention is far larger than everything else.
        if (i > 0 || tokens.length < 3) sizes.push(Math.abs(value));
      });
    }
    sizes.sort((a, b) => a - b);
    const typical = sizes[Math.floor(0.99 * (sizes.length - 1))];
    const halves = band.high.map((high, i) => (high - band.low[i]) / 2).sort((a, b) => a - b);
    const now = Math.max(typical, halves[Math.floor(halves.length / 2)], 1e-6);
    const kept = this.limits.get(this.scaleKey);
    // An ablation would show its rounding errors in full colour, had it a scale of its own.
    const limit = kept === undefined || kept < now ? now : kept;
    this.limits.set(this.scaleKey, limit);
    return limit;
  }

  within(row, column) {
    const { values, null: band } = this.found;
    const value = values[column][row];
    return value >= band.low[column] && value <= band.high[column];
  }

  draw() {
    if (!this.found || this.view.hidden || this.result.hidden) return;
    const { values, sites, tokens } = this.found;
    const label = this.labels.offsetWidth;
    const room = this.grid.clientWidth - label;
    this.width = Math.max(6, Math.min(26, Math.floor(room / sites.length)));
    const width = this.width * sites.length;
    const height = ROW * tokens.length;
    // Canvases have a largest size.
    const scale = Math.min(window.devicePixelRatio || 1, 16000 / height);
    const { canvas } = this;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const { rise, fall, card } = palette(this.probe);
    this.colours = { rise, fall, card };
    for (let column = 0; column < sites.length; column += 1) {
      for (let row = 0; row < tokens.length; row += 1) {
        const value = values[column][row];
        const muted = this.within(row, column);
        pen.fillStyle = this.colour(value, muted);
        pen.fillRect(column * this.width, row * ROW, this.width - 1, ROW - 1);
      }
    }
    this.ticks();
    this.explain();
    this.moved(true);
  }

  /** From -1 to 1, as the colours have it. */
  share(value) {
    const part = Math.max(-1, Math.min(1, value / this.limit));
    return this.root ? Math.sign(part) * Math.sqrt(Math.abs(part)) : part;
  }

  colour(value, muted) {
    const { rise, fall, card } = this.colours;
    const own = this.share(value);
    const much = Math.abs(own) * (muted ? MUTED : 1);
    const end = own < 0 ? fall : rise;
    return `rgb(${card.map((from, i) => Math.round(from + (end[i] - from) * much)).join(" ")})`;
  }

  ticks() {
    const { sites, site } = this.found;
    const step = [1, 2, 5, 10, 20].find((one) => one * this.width >= 22) ?? 20;
    this.axis.style.width = `${this.width * sites.length}px`;
    const marks = [];
    sites.forEach((name, i) => {
      const out = i === sites.length - 1;
      if (i % step && !out) return;
      if (!out && (sites.length - 1 - i) * this.width < 24) return;
      const mark = el("span", { text: out ? "out" : name.split(".")[0] });
      mark.style.left = `${(i + 0.5) * this.width}px`;
      marks.push(mark);
    });
    const from = sites.indexOf(site);
    if (from >= 0) {
      const mark = el("span", { class: "from", text: "▾" });
      mark.style.left = `${(from + 0.5) * this.width}px`;
      marks.push(mark);
    }
    this.axis.replaceChildren(...marks);
  }

  explain() {
    const at = (share) => (this.root ? Math.sign(share) * share * share : share) * this.limit;
    const shares = [-1, -0.5, 0, 0.5, 1];
    this.legend.replaceChildren(
      el("div", { class: "ink" }),
      el(
        "div",
        { class: "marks" },
        shares.map((share) => el("span", { text: `${share === -1 ? "≤ " : share === 1 ? "≥ " : ""}${round(at(share))}` })),
      ),
      el("p", { class: "quiet", text: "Projection in residual-stream units. Faded cells lie within the null band: the 5th to 95th percentile of random directions on the same tokens." }),
    );
  }

  // Moving about ----------------------------------------------------------------------------------

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / ROW);
    const column = Math.floor((event.clientX - box.left) / this.width);
    const { tokens, sites } = this.found;
    return {
      row: Math.max(0, Math.min(tokens.length - 1, row)),
      column: Math.max(0, Math.min(sites.length - 1, column)),
    };
  }

  over(event) {
    if (this.found) this.enter(this.at(event));
  }

  enter(cell) {
    this.hover = cell;
    this.point(cell ?? this.cell);
  }

  key(event) {
    if (!this.found || event.altKey || event.metaKey) return;
    const { tokens, sites } = this.found;
    const last = { row: tokens.length - 1, column: sites.length - 1 };
    const { row, column } = this.cell;
    const moves = {
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      PageUp: [row - 10, column],
      PageDown: [row + 10, column],
      Home: event.ctrlKey ? [0, 0] : [row, 0],
      End: event.ctrlKey ? [last.row, last.column] : [row, last.column],
    };
    const to = moves[event.key];
    if (!to) return;
    event.preventDefault();
    this.hover = null;
    this.cell = {
      row: Math.max(0, Math.min(last.row, to[0])),
      column: Math.max(0, Math.min(last.column, to[1])),
    };
    this.moved();
    say(this.readout.textContent);
  }

  /** The cell of the keyboard is another one, or is drawn anew. */
  moved(still = false) {
    if (!this.found || !this.cell) return;
    const { row } = this.cell;
    this.stripe.hidden = false;
    this.stripe.style.top = `${row * ROW}px`;
    for (const one of this.labels.querySelectorAll(".here")) one.classList.remove("here");
    this.labels.children[row]?.classList.add("here");
    this.point(this.hover ?? this.cell);
    this.drawLine();
    if (still) return;
    const { grid } = this;
    const top = this.axis.offsetHeight;
    const y = row * ROW;
    if (y < grid.scrollTop) grid.scrollTop = y;
    else if (y + ROW + top > grid.scrollTop + grid.clientHeight) grid.scrollTop = y + ROW + top - grid.clientHeight;
    const x = this.cell.column * this.width;
    const seen = grid.clientWidth - this.labels.offsetWidth;
    if (x < grid.scrollLeft) grid.scrollLeft = x;
    else if (x + this.width > grid.scrollLeft + seen) grid.scrollLeft = x + this.width - seen;
  }

  /** Say what a cell holds. */
  point(cell) {
    if (!cell) return;
    const { row, column } = cell;
    const { tokens, sites, values, null: band } = this.found;
    this.ring.hidden = false;
    Object.assign(this.ring.style, {
      left: `${column * this.width - 1}px`,
      top: `${row * ROW - 1}px`,
      width: `${this.width + 1}px`,
      height: `${ROW + 1}px`,
    });
    const token = tokens[row];
    const value = values[column][row];
    const low = band.low[column];
    const high = band.high[column];
    const where = value < low ? "below" : value > high ? "above" : "within";
    this.readout.replaceChildren(
      el("span", { class: "what" }, el("code", { text: this.names[row] }), ` ${token.t_inst ? "t_inst" : SPAN_WORDS[token.span]}, `, el("span", { class: "mono", text: sites[column] }), ": "),
      el("b", { class: "value", text: number(value) }),
      el("span", { class: "quiet", text: ` ${where} the null band ${number(low)} to ${number(high)}` }),
    );
  }

  /** One token over the layers, with the null band. */
  drawLine() {
    const { tokens, sites, values, null: band } = this.found;
    const { row, column } = this.cell;
    const wide = Math.max(260, Math.min(620, this.line.clientWidth || 320));
    const high = 230;
    const left = 46;
    const right = 10;
    const top = 10;
    const bottom = 34;
    const own = values.map((one) => one[row]);
    // The last layers' band is many times wider than all others, and is cut off.
    const middle = (all) => [...all].sort((a, b) => a - b)[Math.floor(all.length / 2)];
    let low = Math.min(0, ...own, 1.3 * middle(band.low));
    let peak = Math.max(0, ...own, 1.3 * middle(band.high));
    if (peak - low < 1e-9) [low, peak] = [-1, 1];
    const steps = nice(low, peak);
    low = Math.min(low, steps[0]);
    peak = Math.max(peak, steps.at(-1));
    const x = (i) => left + ((wide - left - right) * i) / Math.max(1, sites.length - 1);
    const y = (value) => top + ((high - top - bottom) * (peak - value)) / (peak - low);
    const area = [
      ...band.high.map((value, i) => `${x(i)},${y(value)}`),
      ...band.low.map((value, i) => `${x(i)},${y(value)}`).reverse(),
    ];
    const drawing = svg("svg", {
      viewBox: `0 0 ${wide} ${high}`,
      width: wide,
      height: high,
      role: "img",
      "aria-label": `Projection of the token ${this.names[row]} over ${sites.length} layers, from ${number(own[0])} to ${number(own.at(-1))}`,
    });
    for (const step of steps) {
      drawing.append(
        svg("line", { class: step === 0 ? "zero" : "rule", x1: left, x2: wide - right, y1: y(step), y2: y(step) }),
        svg("text", { class: "tick", x: left - 6, y: y(step) + 4, "text-anchor": "end" }, round(step)),
      );
    }
    const every = [1, 2, 5, 10, 20].find((one) => (one * (wide - left - right)) / sites.length >= 26) ?? 20;
    sites.forEach((name, i) => {
      const out = i === sites.length - 1;
      if (!out && (i % every || x(sites.length - 1) - x(i) < 24)) return;
      drawing.append(svg("text", { class: "tick", x: x(i), y: high - bottom + 15, "text-anchor": "middle" }, out ? "out" : name.split(".")[0]));
    });
    drawing.append(
      svg("text", { class: "tick", x: (left + wide - right) / 2, y: high - 4, "text-anchor": "middle" }, "block that reads the stream"),
      svg("clipPath", { id: "line-box" }, svg("rect", { x: left, y: top, width: wide - left - right, height: high - top - bottom })),
      svg("polygon", { class: "null", points: area.join(" "), "clip-path": "url(#line-box)" }),
      svg("line", { class: "here", x1: x(column), x2: x(column), y1: top, y2: high - bottom }),
      svg("polyline", { class: "values", points: own.map((value, i) => `${x(i)},${y(value)}`).join(" ") }),
    );
    own.forEach((value, i) => {
      const inside = this.within(row, i);
      drawing.append(svg("circle", { class: inside ? "dot inside" : "dot", cx: x(i), cy: y(value), r: i === column ? 4.5 : 2.6 }));
    });
    const token = tokens[row];
    this.line.replaceChildren(
      drawing,
      el("figcaption", {}, el("code", { text: this.names[row] }), ` ${token.t_inst ? "t_inst, " : ""}${SPAN_WORDS[token.span]}. The band is the null; hollow points lie within.`),
    );
  }
}

/** A few round values from low to high. */
function nice(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let i = Math.floor(low / step); i * step <= high + step * 0.999; i += 1) {
    found.push(Number((i * step).toPrecision(6)));
  }
  return found;
}

function keyOf() {
  const items = [
    ["instruction", "instruction"],
    ["t_inst", "its last token, t_inst"],
    ["post_instruction", "post-instruction"],
    ["response", "reply"],
    ["template", "template"],
  ];
  return el(
    "ul",
    { class: "key" },
    items.map(([name, text]) => el("li", { class: name }, text)),
    el("li", { class: "plain-key" }, "▾ where the direction was read"),
  );
}
