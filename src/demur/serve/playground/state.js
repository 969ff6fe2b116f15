// What the views share. Nothing of it is written anywhere: it goes with the tab.

/** Tells of changes: "edits" of the panel, "turns" of the conversation, "theme" of the colours. */
export const changes = new EventTarget();

export function changed(what) {
  changes.dispatchEvent(new Event(what));
}

export const COLUMNS = ["plain", "edited"];

export const state = {
  /** What `/demur/info` says. */
  info: null,
  /** By direction: kind, strengths by kind, band of blocks and tokens. */
  edits: new Map(),
  /** Of the edited column. */
  anchor: { on: true, strength: 1 },
  /** Of all requests. */
  sampling: { temperature: 0, maxTokens: 256, seed: 0, system: "" },
  /** Questions, each with a reply by column. */
  turns: [],
};

export const RANGES = {
  ablate: { low: 0, high: 1, step: 0.05, start: 1, unit: "of it" },
  add: { low: -4, high: 4, step: 0.1, start: 1, unit: "lengths" },
  clamp: { low: -4, high: 4, step: 0.1, start: 0, unit: "lengths" },
};

/** An edit as it is before anyone touches it. */
export function untouched() {
  const strengths = Object.fromEntries(
    Object.entries(RANGES).map(([kind, range]) => [kind, range.start]),
  );
  return { kind: "off", strengths, band: null, at: "all" };
}

/** What the panel asks for, as requests write it. */
export function directionEdits() {
  const found = [];
  for (const [direction, own] of state.edits) {
    if (own.kind === "off") continue;
    found.push({
      direction,
      kind: own.kind,
      strength: own.strengths[own.kind],
      layers: own.band,
      at: own.at,
    });
  }
  return found;
}

/** The `demur` object of a column's requests. */
export function demurOf(column) {
  const { info, anchor } = state;
  const own = { edits: column === "edited" ? directionEdits() : [] };
  if (!info.anchor) return own;
  const free = info.limits.opt_out;
  if (column === "edited" && (anchor.on || !free)) {
    own.edits.push({ kind: "anchor", strength: anchor.strength });
  } else if (free) {
    own.anchor = false;
  }
  return own;
}

/** An edit in a few words. */
export function words(edit) {
  const strength = String(edit.strength).replace("-", "−");
  if (edit.kind === "anchor") return `anchor × ${strength}`;
  const verb = { ablate: "ablated", add: "added", clamp: "clamped" }[edit.kind];
  const much = edit.kind === "clamp" ? ` at ${strength}` : strength === "1" ? "" : ` × ${strength}`;
  const where = edit.layers ? `, blocks ${edit.layers[0]}–${edit.layers[1]}` : "";
  const at = edit.at && edit.at !== "all" ? `, ${SPANS[edit.at].toLowerCase()}` : "";
  return `${edit.direction} ${verb}${much}${where}${at}`;
}

export const SPANS = {
  all: "All tokens",
  instruction: "Instruction",
  post_instruction: "Post-instruction",
  response: "Reply",
};

/** Messages that a column has seen, up to and with that turn's question. */
export function messagesOf(turn, column, system = state.sampling.system) {
  const found = system.trim() ? [{ role: "system", content: system }] : [];
  for (const own of state.turns) {
    if (own === turn) break;
    const reply = own.replies[column];
    // A reply that failed or is empty is left out with its question: the roles must alternate.
    if (!reply.text) continue;
    found.push({ role: "user", content: own.question });
    found.push({ role: "assistant", content: reply.text });
  }
  found.push({ role: "user", content: turn.question });
  return found;
}
