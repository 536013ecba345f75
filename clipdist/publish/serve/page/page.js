// The page of `clipdist serve`: its tabs, and pictures that are dropped or pasted anywhere.

import { newBatch, startBatch } from "./batch.js";
import { startCamera } from "./camera.js";
import { byId, bytes, count, el, score } from "./dom.js";
import { showPicture, startPicture } from "./picture.js";
import { startSentence } from "./sentence.js";
import { request } from "./service.js";

const TABS = ["picture", "sentence", "batch", "model"];
const ASK_AGAIN_MS = 2000;

// The slash keeps the browser from scrolling to the element of that name, and from taking the focus from the tab.
const current = () => TABS.find((name) => location.hash === `#/${name}`) ?? TABS[0];

function showTab() {
  for (const name of TABS) {
    const chosen = name === current();
    byId(name).hidden = !chosen;
    byId(`tab-${name}`).setAttribute("aria-selected", String(chosen));
    byId(`tab-${name}`).tabIndex = chosen ? 0 : -1;
  }
}

function startTabs() {
  for (const [at, name] of TABS.entries()) {
    byId(`tab-${name}`).addEventListener("click", () => { location.hash = `/${name}`; });
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      location.hash = `/${TABS.at(to % TABS.length)}`;
      byId(`tab-${current()}`).focus();
    });
  }
  addEventListener("hashchange", showTab);
  showTab();
}

function take(given) {
  const many = given.length > 1 || current() === "batch";
  location.hash = many ? "/batch" : "/picture";
  if (many) newBatch(given);
  else showPicture(given[0]);
}

function startDropping() {
  const shown = byId("dropping");
  addEventListener("dragover", (event) => {
    event.preventDefault(); // else the browser would open the file in place of this page
    shown.hidden = !event.dataTransfer.types.includes("Files");
  });
  addEventListener("dragleave", (event) => { shown.hidden = shown.hidden || !event.relatedTarget; });
  for (const [kind, field] of [["drop", "dataTransfer"], ["paste", "clipboardData"]]) {
    addEventListener(kind, (event) => {
      shown.hidden = true;
      const given = [...(event[field]?.files ?? [])];
      if (!given.length) return; // text, for a field
      event.preventDefault();
      take(given);
    });
  }
  if (/Mac|iPhone|iPad/.test(navigator.userAgent)) byId("paste-keys").textContent = "⌘V";
}

const AS = { count, bytes, kind: (kind) => kind.replace("_", " "), number: (value) => value.toPrecision(3) };
AS.megapixels = (pixels) => `${count(pixels / 1e6)} megapixels`;

// Puts what the service says about itself where the page has places for it, and hides what needs what is not there.
function fill(about) {
  const has = (name) => (name === "text" ? about.kind === "dual_encoder" : Boolean(about[name]?.length ?? about[name]));
  for (const place of document.querySelectorAll("[data-fill]")) {
    const value = place.dataset.fill.split(".").reduce((inner, name) => inner?.[name], about);
    place.textContent = value ? (AS[place.dataset.as] ?? String)(value) : "none";
  }
  for (const place of document.querySelectorAll("[data-needs]")) place.hidden = !has(place.dataset.needs);
  for (const place of document.querySelectorAll("[data-lacks]")) place.hidden = has(place.dataset.lacks);
  document.title = `${about.name} · clipdist`;
  byId("origin").textContent = location.origin;
  byId("model-classes").replaceChildren(...about.classes.map(({ title }) => el("li", { class: "chip" }, title)));
  byId("scores").replaceChildren(about.scores.length ? scoreTable(about.scores) : "No scores came with this model.");
  byId("served").hidden = false;
}

function scoreTable(scores) {
  const number = (value) => (value > 1 ? count(value) : score(value)); // ranks stand beside shares
  const heads = ["Score", "Value", "95 % interval", "Gallery"].map((name) => el("th", { scope: "col" }, name));
  const rows = scores.map(({ title, value, low, high, gallery }) => {
    const interval = low == null ? "–" : `${number(low)} to ${number(high)}`;
    const cells = [number(value), interval, gallery == null ? "–" : count(gallery)].map((said) => el("td", {}, said));
    return el("tr", {}, el("th", { scope: "row" }, title), cells);
  });
  return el("table", { class: "scores" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows));
}

async function start() {
  let about;
  try {
    about = await (await request("/api/about")).json();
  } catch (error) {
    byId("starting").textContent = `${error.message} Asking again …`; // it may still be loading the weights
    setTimeout(start, ASK_AGAIN_MS);
    return;
  }
  byId("starting").remove();
  fill(about);
  startPicture(about);
  startSentence(about);
  startBatch(about);
  startCamera((file) => take([file]));
  startTabs();
  startDropping();
}

start();
