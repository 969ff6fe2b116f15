// The page's frame: which view is shown, the key, the colours, and whether the server is there.

import { Failure, json, useKey } from "./api.js";
import { showChat } from "./chat.js";
import { el, prose, say, working } from "./dom.js";
import { showPanel } from "./edits.js";
import { showHeat } from "./heat.js";
import { showRuns } from "./runs.js";
import { changed, state } from "./state.js";

const VIEWS = ["chat", "heat", "runs"];
const $ = (id) => document.getElementById(id);

// Colours ------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
let theme = "auto";
try {
  const kept = localStorage.getItem("demur-theme");
  if (THEMES.includes(kept)) theme = kept;
} catch {
  // Without storage the choice lasts as long as the tab.
}

function paint() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Colours: ${theme}`;
  changed("theme");
}

$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try {
    localStorage.setItem("demur-theme", theme);
  } catch {
    // As above.
  }
  paint();
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
paint();

// Views --------------------------------------------------------------------------------------------

function route() {
  const asked = location.hash.slice(1);
  const name = VIEWS.includes(asked) ? asked : "chat";
  for (const one of VIEWS) $(`view-${one}`).hidden = one !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $("frame").dataset.view = name;
  document.title = `${{ chat: "Chat", heat: "Heat map", runs: "Runs" }[name]} · demur playground`;
  changed("view");
}

window.addEventListener("hashchange", route);
$("skip").addEventListener("click", (event) => {
  event.preventDefault(); // The hash names the view.
  $("views").focus();
});

// The key ------------------------------------------------------------------------------------------

function askForKey() {
  $("key-form").hidden = false;
  $("key-button").hidden = false;
  $("key").value = "";
  $("key").focus();
}

window.addEventListener("demur:key", askForKey);
$("key-button").addEventListener("click", () => {
  if ($("key-form").hidden) askForKey();
  else $("key-form").hidden = true;
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  if (!state.info) start();
  else say("The key is used from now on. Try again what failed.");
});

// The server ---------------------------------------------------------------------------------------

function complain(failure) {
  const banner = $("banner");
  banner.replaceChildren(el("p", {}, el("b", {}, prose(failure.message)), " ", prose(failure.advice)));
  if (failure.status !== 401) {
    banner.append(el("button", { type: "button", text: "Try again", on: { click: start } }));
  }
  banner.hidden = false;
}

async function start() {
  $("banner").hidden = true;
  const bar = working("Asking what is served");
  $("views").prepend(bar);
  try {
    state.info = await json("demur/info");
  } catch (error) {
    const known = error instanceof Failure;
    complain(known ? error : new Failure(`the page failed: ${error.message}`, "Reload it."));
    return;
  } finally {
    bar.remove();
  }
  const { info } = state;
  $("served").textContent = `${info.model}, ${info.layers} blocks, ${info.dtype}`;
  $("frame").dataset.ready = "";
  showPanel($("panel"));
  showChat($("view-chat"));
  showHeat($("view-heat"));
  showRuns($("view-runs"));
  route();
}

route();
start();
