// The panel: what is done to the edited column.

import { choice, el, fresh, prose } from "./dom.js";
import { RANGES, SPANS, changed, changes, directionEdits, state, untouched } from "./state.js";

const KINDS = { off: "off", ablate: "ablate", add: "add", clamp: "clamp" };

let old = new AbortController();

/** Build the panel anew from what the server has loaded. */
export function showPanel(panel) {
  const { info } = state;
  const wide = window.matchMedia("(min-width: 60rem)");
  const count = el("span", { class: "count" });
  const box = el(
    "details",
    { class: "card panel", open: wide.matches },
    el("summary", {}, el("span", { text: "Edits" }), count),
  );
  wide.addEventListener("change", () => (box.open = wide.matches));
  const rows = info.directions.map((one) => directionRow(one));
  const anchor = info.anchor ? anchorRow() : null;
  const refresh = () => {
    for (const row of rows) row.refresh();
    anchor?.refresh();
    changed("edits");
  };
  const tell = () => {
    const n = directionEdits().length;
    const anchored = info.anchor && (state.anchor.on || !info.limits.opt_out);
    const told = n ? `${n} in force` : anchored ? "only the anchor" : "none in force";
    count.textContent = n && anchored ? `${told}, and the anchor` : told;
  };
  tell();
  old.abort(); // The panel is built anew when the server comes back.
  old = new AbortController();
  changes.addEventListener("edits", tell, { signal: old.signal });
  const inner = el("div", { class: "panel-body" });
  const editable = info.edit_kinds.some((kind) => kind !== "anchor");
  if (editable || anchor) inner.append(presets(refresh));
  if (!editable) inner.append(el("p", { class: "quiet" }, prose(whyNoEdits(info))));
  else inner.append(...rows.map((row) => row.own));
  if (anchor) inner.append(anchor.own);
  inner.append(sampling());
  box.append(inner);
  panel.replaceChildren(box);
}

function whyNoEdits(info) {
  if (!info.limits.edits) return "This server does not take edits: both columns are the same.";
  return "No direction is loaded, so there is nothing to edit. Start the server with `--direction FILE`.";
}

function presets(refresh) {
  const { info } = state;
  const editable = info.edit_kinds.some((kind) => kind !== "anchor");
  const clear = () => {
    for (const name of state.edits.keys()) state.edits.set(name, untouched());
  };
  const made = [["No edits", clear]];
  for (const { name } of editable ? info.directions.slice(0, 3) : []) {
    for (const [kind, verb] of [
      ["ablate", "ablated"],
      ["add", "added"],
    ]) {
      made.push([
        `${name} ${verb}`,
        () => {
          clear();
          state.edits.get(name).kind = kind;
        },
      ]);
    }
  }
  if (info.anchor && info.limits.opt_out) {
    for (const on of [true, false]) {
      made.push([`Anchor ${on ? "on" : "off"}`, () => (state.anchor.on = on)]);
    }
  }
  return el(
    "div",
    { class: "presets", role: "group", "aria-label": "Presets" },
    made.map(([words, act]) =>
      el("button", {
        type: "button",
        text: words,
        on: {
          click: () => {
            act();
            refresh();
          },
        },
      }),
    ),
  );
}

/** A slider with its number beside it, which can be typed as well. */
function slider(label, get, set) {
  const id = fresh("slider");
  const range = el("input", { type: "range", id });
  const typed = el("input", { type: "number", class: "typed", "aria-label": `${label}, as a number` });
  const unit = el("span", { class: "quiet unit" });
  const take = (from) => {
    const value = Number(from.value);
    if (from.value === "" || !Number.isFinite(value)) return;
    set(Math.max(-1000, Math.min(1000, value)));
    for (const one of [range, typed]) if (one !== from) one.value = from.value;
    changed("edits");
  };
  range.addEventListener("input", () => take(range));
  typed.addEventListener("change", () => take(typed));
  const own = el(
    "div",
    { class: "slider" },
    el("label", { for: id, text: label }),
    range,
    typed,
    unit,
  );
  const refresh = ({ low, high, step, unit: words }) => {
    for (const one of [range, typed]) Object.assign(one, { step });
    Object.assign(range, { min: low, max: high });
    for (const one of [range, typed]) one.value = get();
    unit.textContent = words;
  };
  return { own, refresh };
}

/** Two ends of a band of blocks, on one track. */
function band(name, get, set) {
  const last = state.info.layers - 1;
  const ends = ["First", "Last"].map((words) =>
    el("input", {
      type: "range",
      min: 0,
      max: last,
      step: 1,
      "aria-label": `${words} block that ${name} is edited at`,
    }),
  );
  const words = el("output", { class: "band-words" });
  const lit = el("span", { class: "lit" });
  const track = el("div", { class: "band" }, el("span", { class: "track" }), lit, ends);
  const own = el("div", { class: "band-row" }, track, words);
  const refresh = () => {
    const found = get();
    own.hidden = found === null;
    if (found === null) return;
    ends.forEach((one, i) => {
      one.value = found[i];
      one.setAttribute("aria-valuetext", `block ${found[i]}`);
    });
    words.textContent = `blocks ${found[0]}–${found[1]}`;
    lit.style.left = `${(100 * found[0]) / Math.max(last, 1)}%`;
    lit.style.right = `${100 - (100 * found[1]) / Math.max(last, 1)}%`;
    // Where both ends meet, the one that can still move lies on top.
    ends[0].classList.toggle("above", found[0] > last / 2);
  };
  ends.forEach((one, i) =>
    one.addEventListener("input", () => {
      const found = [...get()];
      found[i] = Number(one.value);
      if (found[0] > found[1]) found[i] = found[1 - i];
      set(found);
      refresh();
      changed("edits");
    }),
  );
  return { own, refresh };
}

function directionRow(direction) {
  const { name } = direction;
  if (!state.edits.has(name)) state.edits.set(name, untouched());
  const now = () => state.edits.get(name);
  const block = Number.parseInt(direction.site, 10);
  const kinds = Object.entries(KINDS).filter(
    ([kind]) => kind === "off" || state.info.edit_kinds.includes(kind),
  );
  const kind = choice("Kind of edit", kinds, now().kind, (value) => {
    now().kind = value;
    refresh();
    changed("edits");
  });
  const strength = slider(
    "Strength",
    () => now().strengths[now().kind],
    (value) => (now().strengths[now().kind] = value),
  );
  const where = choice("Layers", [["own", ""], ["band", "a band"]], "own", (value) => {
    now().band = value === "own" ? null : [0, state.info.layers - 1];
    refresh();
    changed("edits");
  });
  const ends = band(
    name,
    () => now().band,
    (value) => (now().band = value),
  );
  const at = choice("Tokens", Object.entries(SPANS), now().at, (value) => {
    now().at = value;
    changed("edits");
  });
  const more = el("div", { class: "more" }, strength.own, where, ends.own, at);
  const own = el(
    "fieldset",
    { class: "direction", "data-direction": name },
    el("legend", { text: name }),
    el("p", {
      class: "quiet about",
      text: `${direction.site}, length ${direction.norm.toPrecision(3)}`,
      title: direction.recipe,
    }),
    kind,
    more,
  );
  function refresh() {
    const edit = now();
    const off = edit.kind === "off";
    kind.querySelector("select").value = edit.kind;
    more.hidden = off;
    own.classList.toggle("on", !off);
    if (off) return;
    strength.refresh(RANGES[edit.kind]);
    const select = where.querySelector("select");
    select.options[0].textContent =
      edit.kind === "ablate" ? "all writers" : `block ${block}, its own`;
    select.value = edit.band === null ? "own" : "band";
    at.querySelector("select").value = edit.at;
    ends.refresh();
  }
  refresh();
  return { own, refresh };
}

function anchorRow() {
  const { info, anchor } = state;
  const free = info.limits.opt_out;
  const own = info.anchor.strength;
  if (!anchor.known) Object.assign(anchor, { strength: own, known: true });
  const id = fresh("anchor");
  const box = el("input", { type: "checkbox", id, disabled: !free });
  const strength = slider(
    "Strength",
    () => anchor.strength,
    (value) => (anchor.strength = free ? value : Math.max(own, value)),
  );
  box.addEventListener("change", () => {
    anchor.on = box.checked;
    refresh();
    changed("edits");
  });
  const row = el(
    "fieldset",
    { class: "direction", "data-direction": "(anchor)" },
    el("legend", { text: "Anchor" }),
    el("p", {
      class: "quiet about",
      text: free
        ? "The plain column goes without it."
        : "It holds both columns: this server lets no request go without it.",
    }),
    el("div", { class: "check" }, box, el("label", { for: id, text: "holds the edited column" })),
    strength.own,
  );
  function refresh() {
    box.checked = anchor.on || !free;
    strength.own.hidden = !box.checked;
    row.classList.toggle("on", box.checked);
    const low = free ? 0 : own;
    strength.refresh({ low, high: Math.max(2 * own, own + 1), step: 0.05, unit: "" });
  }
  refresh();
  return { own: row, refresh };
}

function sampling() {
  const own = state.sampling;
  const { limits } = state.info;
  own.maxTokens = Math.min(own.maxTokens, limits.max_tokens);
  const field = (label, name, attributes) => {
    const id = fresh("sampling");
    const input = el("input", { type: "number", id, ...attributes });
    input.value = own[name];
    input.addEventListener("change", () => {
      const value = Number(input.value);
      const low = Number(attributes.min);
      const high = Number(attributes.max);
      if (input.value !== "" && Number.isFinite(value)) {
        own[name] = Math.max(low, Math.min(high, attributes.step === "any" ? value : Math.round(value)));
      }
      input.value = own[name];
    });
    return el("span", { class: "field" }, el("label", { for: id, text: label }), input);
  };
  const id = fresh("system");
  const system = el("textarea", { id, rows: 2, spellcheck: "false" });
  system.value = own.system;
  system.addEventListener("change", () => {
    own.system = system.value;
    changed("turns");
  });
  return el(
    "details",
    { class: "sampling" },
    el("summary", { text: "Sampling, both columns" }),
    el(
      "div",
      { class: "fields" },
      field("Temperature", "temperature", { min: 0, max: 2, step: "any" }),
      field("Most tokens", "maxTokens", { min: 1, max: limits.max_tokens, step: 1 }),
      field("Seed", "seed", { min: 0, max: 2 ** 31, step: 1 }),
    ),
    limits.client_system
      ? el("span", { class: "field tall" }, el("label", { for: id, text: "System message" }), system)
      : null,
  );
}
