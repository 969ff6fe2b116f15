// Audits' reports, two beside each other.

import { Failure, hasKey, json, text } from "./api.js";
import { el, prose, say, working } from "./dom.js";
import { state } from "./state.js";

const SIDES = ["left", "right"];
const open = { left: null, right: null };

/** Build the view. */
export function showRuns(view) {
  const list = el("div", { class: "card" });
  const sides = el("div", { class: "reports" });
  view.replaceChildren(list, sides);
  const reload = () => showList(list, sides, reload);
  reload();
}

async function showList(list, sides, reload) {
  const head = el("div", { class: "card-head" }, el("h2", { text: "Runs" }));
  list.replaceChildren(head);
  if (!state.info.runs) {
    list.append(
      el("p", {}, prose("No folder of audits is shown. Start the server with `--runs FOLDER`.")),
    );
    return;
  }
  head.append(el("button", { type: "button", text: "Reload", on: { click: reload } }));
  const bar = working("Looking for runs");
  list.append(bar);
  let runs;
  try {
    ({ runs } = await json("demur/runs"));
  } catch (error) {
    list.append(failure(error, reload));
    return;
  } finally {
    bar.remove();
  }
  if (!runs.length) {
    list.append(el("p", {}, prose("The folder holds no audit yet. `demur audit MODEL --out FOLDER` makes one.")));
    return;
  }
  const rows = runs.map((run) =>
    el(
      "tr",
      { "data-run": run.name },
      el("th", { scope: "row", text: run.name }),
      el("td", { class: "when", text: run.when.replace("T", " ").replace(/:\d\d\+00:00$/, " UTC") }),
      el("td", { text: run.verdict || "–" }),
      el(
        "td",
        { class: "buttons" },
        run.report
          ? SIDES.map((side) =>
              el("button", {
                type: "button",
                text: side === "left" ? "Open left" : "Open right",
                "aria-label": `Open ${run.name} on the ${side}`,
                on: { click: () => show(sides, side, run.name) },
              }),
            )
          : el("span", { class: "quiet", text: "no report" }),
      ),
    ),
  );
  list.append(
    el(
      "div",
      { class: "scroll", tabindex: 0, role: "group", "aria-label": "Runs" },
      el(
        "table",
        { class: "runs" },
        el(
          "thead",
          {},
          el("tr", {}, ["Run", "When", "Verdict", "Report"].map((words) => el("th", { scope: "col", text: words }))),
        ),
        el("tbody", {}, rows),
      ),
    ),
  );
}

function failure(error, again) {
  const own = error instanceof Failure ? error : new Failure(error.message, "Reload the page.");
  return el(
    "div",
    { class: "failure", role: "alert" },
    el("p", {}, el("b", {}, prose(own.message))),
    el("p", {}, prose(own.advice)),
    el("button", { type: "button", text: "Try again", on: { click: again } }),
  );
}

function close(sides, side) {
  if (open[side]?.url) URL.revokeObjectURL(open[side].url);
  open[side]?.own.remove();
  open[side] = null;
  sides.classList.toggle("two", SIDES.every((one) => open[one]));
}

/** Put a report where it can run and reach nothing. */
async function show(sides, side, name) {
  close(sides, side);
  const body = el("div", { class: "report-body" }, working(`Opening ${name}`));
  const shut = el("button", {
    type: "button",
    text: "Close",
    "aria-label": `Close ${name} on the ${side}`,
    on: { click: () => close(sides, side) },
  });
  const own = el(
    "section",
    { class: `report card ${side}`, "aria-label": `Report on the ${side}` },
    el("div", { class: "card-head" }, el("h2", { text: name }), shut),
    body,
  );
  const entry = { own, url: null };
  open[side] = entry;
  if (side === "left") sides.prepend(own);
  else sides.append(own);
  sides.classList.toggle("two", SIDES.every((one) => open[one]));
  try {
    const path = `demur/runs/${encodeURIComponent(name)}/report`;
    const page = await text(path);
    if (open[side] !== entry) return;
    // A frame sends no key. Of a page made here links to its own sections do not work (Chromium
    // takes them for local files), so that it is the second choice.
    if (hasKey()) {
      entry.url = URL.createObjectURL(new Blob([page], { type: "text/html;charset=utf-8" }));
    }
    body.replaceChildren(
      el("iframe", {
        sandbox: "",
        referrerpolicy: "no-referrer",
        title: `Report of ${name}`,
        src: entry.url ?? path,
      }),
    );
    say(`The report of ${name} is open on the ${side}.`);
    // With a long list above it, the report would open out of sight.
    if (own.getBoundingClientRect().top > 0.6 * window.innerHeight) own.scrollIntoView();
  } catch (error) {
    body.replaceChildren(failure(error, () => show(sides, side, name)));
  }
}
