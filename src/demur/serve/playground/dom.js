// Elements are made from text, never from markup: what models and users write stays text.

/**
 * An element with its attributes and children. `on` holds listeners, `text` its text; other names
 * are attributes, left out where they are false or null.
 */
export function el(tag, options = {}, ...children) {
  const own = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) own.addEventListener(event, listener);
    } else if (name === "text") {
      own.textContent = value;
    } else if (value === true) {
      own.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      own.setAttribute(name, String(value));
    }
  }
  own.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  return own;
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const own = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) own.setAttribute(name, String(value));
  own.append(...children);
  return own;
}

/** Words with what stands between backticks as code. */
export function prose(words) {
  return String(words)
    .split("`")
    .map((part, i) => (i % 2 ? el("code", { class: "flag", text: part }) : part));
}

let count = 0;

/** A name that no other element has. */
export function fresh(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

/** A labelled choice; `options` are pairs of value and words. */
export function choice(label, options, value, change) {
  const id = fresh("choice");
  const own = el("select", { id, on: { change: () => change(own.value) } });
  for (const [key, words] of options) own.append(el("option", { value: key, text: words }));
  own.value = value;
  return el("span", { class: "field" }, el("label", { for: id, text: label }), own);
}

/** A number as people read it: four digits, a true minus sign. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 0.995 ? 2 : size >= 0.001 ? 3 : 0;
  const text = size < 0.001 ? value.toExponential(1) : value.toFixed(digits);
  return text.replace("-", "−");
}

/** A round number on an axis. */
export function round(value) {
  return Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }).replace("-", "−");
}

/** "1 token", "2 tokens". */
export function counted(n, what) {
  return `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
}

/** Tell people who listen rather than look. */
export function say(words) {
  document.getElementById("status").textContent = words;
}

/** A bar for work of unknown length, with the seconds that it has taken. */
export function working(words) {
  const seconds = el("span", { class: "seconds" });
  const own = el(
    "p",
    { class: "working" },
    el("progress", { "aria-label": words }),
    el("span", { text: words }),
    seconds,
  );
  const began = performance.now();
  const clock = setInterval(() => {
    if (!own.isConnected) return clearInterval(clock);
    seconds.textContent = `${Math.round((performance.now() - began) / 1000)} s`;
  }, 1000);
  return own;
}
