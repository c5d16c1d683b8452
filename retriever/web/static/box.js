// One picture, large, with all that is known of it and why it was found.

import { get, heat, picture, thumbnail } from "./api.js";
import { $, make, percent } from "./dom.js";
import { asked, isQuery } from "./state.js";

const box = $("#box");
const large = $("#large");
let state = null;
let id = "";
let actions = {};
let pending = null;

export const isOpen = () => box.open;
export const current = () => id;
export const listen = (given) => { actions = given; };

export async function open(item, given) {
  state = given;
  id = String(item);
  pending?.abort();
  pending = new AbortController();
  const { signal } = pending;
  const library = state.library;
  $("#heat").setAttribute("aria-pressed", "false");
  $("#heat").hidden = !isQuery(state) || state.uploads.length > 0;
  large.src = thumbnail(id, library, 640);  // likely there already
  const whole = new Image();
  whole.addEventListener("load", () => { if (!signal.aborted && !showsHeat()) large.src = whole.src; });
  whole.src = picture(id, library);
  for (const part of ["#captions", "#said", "#why", "#about"]) $(part).replaceChildren();
  box.classList.remove("is-gone");
  if (!box.open) box.showModal();
  try {
    const facts = await get(`/api/items/${id}`, { library }, signal);
    fill(facts);
    if (isQuery(state) && !state.uploads.length) {
      const reason = await get(`/api/items/${id}/why`, asked(state), signal);
      $("#why").replaceChildren(...explained(reason));
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    $("#about").replaceChildren(make("dd", {}, error.message));
    box.classList.toggle("is-gone", error.status === 404);
  }
}

function fill(facts) {
  $("#name").textContent = facts.name;
  $("#name").dir = "auto";
  large.alt = facts.captions[0]?.text ?? facts.name;
  $("#path").textContent = facts.path;
  $("#original").href = picture(id, state.library);
  if (facts.captions.length) {
    $("#captions").replaceChildren(make("h3", {}, "Captions"), make("ul", {}, ...facts.captions.map(
      (one) => make("li", { dir: "auto", title: one.source }, one.text),
    )));
  }
  const rows = [
    ["Size", `${facts.width} × ${facts.height}, ${(facts.size / 1e6).toFixed(facts.size < 1e6 ? 2 : 1)} MB`],
    ["Taken", facts.taken?.replace("T", " ")],
    ["Camera", facts.camera],
    ["Place", facts.latitude === null ? null : `${facts.latitude.toFixed(5)}, ${facts.longitude.toFixed(5)}`],
    ...Object.entries(facts.extras).map(([key, values]) => [key, values.join(", ")]),
  ];
  $("#about").replaceChildren(...rows.filter(([, value]) => value).flatMap(
    ([name, value]) => [make("dt", {}, name), make("dd", { dir: "auto" }, String(value))],
  ));
}

function explained(reason) {
  const parts = [make("h3", {}, "Why it was found")];
  const channels = Object.entries(reason.channels);
  if (channels.length > 1) {
    for (const [name, one] of channels) {
      const meter = make("meter", { min: 0, max: 1, value: one.share, "aria-label": `share of ${name}` });
      parts.push(make("div", { className: "bar" }, make("span", {}, name), meter, make("span", {}, percent(one.share))));
    }
  }
  if (reason.words.length) {
    const most = Math.max(...reason.words.map((one) => Math.abs(one.change)), 1e-6);
    const line = make("p", { dir: "auto", title: "how much the score falls without the word" });
    for (const { word, change } of reason.words) {
      const shown = make("span", { className: change > 0 ? "word for" : "word against", title: change.toFixed(3) }, word);
      shown.style.setProperty("--much", `${Math.round(45 * Math.max(0, change) / most)}%`);
      line.append(shown, " ");
    }
    parts.push(line);
  }
  if (reason.caption_score !== null && reason.caption) {
    parts.push(make("p", { dir: "auto" }, make("small", {}, `nearest caption, ${reason.caption_score.toFixed(3)}: `), reason.caption));
  }
  if (reason.percentile !== null) {
    parts.push(make("p", {}, make("small", {}, reason.percentile < 1
      ? `above ${Math.floor(100 * reason.percentile)} % of what unrelated texts find here`
      : "above all that unrelated texts find here")));
  }
  return parts;
}

export async function captions() {
  const target = $("#said");
  target.replaceChildren(make("h3", {}, "Captions that fit"), make("p", {}, "…"));
  try {
    const { hits } = await get("/api/captions", { id, library: state.library, k: 6 }, pending.signal);
    const lines = hits.map((one) => make("li", { dir: "auto" }, `${one.caption} `, make("small", {}, one.score.toFixed(3))));
    target.lastChild.replaceWith(lines.length ? make("ol", {}, ...lines) : make("p", {}, "The library has no captions."));
  } catch (error) {
    if (error.name !== "AbortError") target.lastChild.textContent = error.message;
  }
}

const showsHeat = () => $("#heat").getAttribute("aria-pressed") === "true";

export function toggleHeat() {
  if ($("#heat").hidden) return;
  const isOn = !showsHeat();
  $("#heat").setAttribute("aria-pressed", String(isOn));
  large.classList.add("is-stale");  // it takes a while
  large.src = isOn ? heat(id, asked(state)) : picture(id, state.library);
}

for (const event of ["load", "error"]) large.addEventListener(event, () => large.classList.remove("is-stale"));

async function copy() {
  const button = $("#copy");
  try {
    await navigator.clipboard.writeText($("#path").textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("#path"));
    button.textContent = "Selected: copy it";
  }
  setTimeout(() => { button.textContent = "Copy path"; }, 1500);
}

$("#alike").addEventListener("click", () => actions.alike(id));
$("#shun").addEventListener("click", () => actions.shun(id));
$("#say").addEventListener("click", captions);
$("#heat").addEventListener("click", toggleHeat);
$("#copy").addEventListener("click", copy);
for (const one of box.querySelectorAll(".turn")) {
  one.addEventListener("click", () => actions.turn(Number(one.dataset.step)));
}
box.addEventListener("close", () => { pending?.abort(); large.removeAttribute("src"); actions.closed(); });
box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
export const close = () => { if (box.open) box.close(); };
for (const button of document.querySelectorAll("dialog .close")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
box.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = {
    ArrowLeft: () => actions.turn(-1), ArrowRight: () => actions.turn(1),
    l: () => actions.alike(id), c: captions, h: toggleHeat,
  };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
