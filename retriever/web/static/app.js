// The page: what is asked becomes the address, the address becomes answers.

import { Problem, get, send, thumbnail } from "./api.js";
import * as box from "./box.js";
import { $, debounced, make } from "./dom.js";
import * as filter from "./filter.js";
import * as grid from "./grid.js";
import * as map from "./map.js";
import * as address from "./state.js";

const PAGE = 40;
let state = address.read();
let libraries = [];
let pending = null;
let last = "";  // what the answers on show were asked by

// ── asking ──────────────────────────────────────────────────────────────────────────────────────

const library = () => state.library || libraries[0]?.name || "";
const pictures = () => state.uploads.map((number) => address.upload(number).file);

function ask(offset, signal) {
  if (!address.isQuery(state)) {
    return get("/api/items", { where: state.where, library: state.library, k: PAGE, offset }, signal);
  }
  const wanted = { ...address.asked(state), k: PAGE, offset, all: state.all };
  return state.uploads.length
    ? send("/api/search", wanted, pictures(), signal)
    : get("/api/search", wanted, signal);
}

async function search() {
  const wanted = JSON.stringify([address.asked(state), state.uploads, state.all]);
  if (wanted === last) return;
  pending?.abort();
  pending = new AbortController();
  const { signal } = pending;
  last = wanted;
  const slow = setTimeout(grid.stale, 150);
  try {
    const answer = await ask(0, signal);
    clearTimeout(slow);
    if (signal.aborted) return;
    tell(answer);
    grid.show(answer.hits, state.library, next(answer, signal));
    if (map.isShown()) map.highlight(address.isQuery(state) ? answer.hits.map((hit) => hit.id) : []);
    await captionsOfUpload(signal);
  } catch (error) {
    clearTimeout(slow);
    if (error.name === "AbortError") return;
    last = "";
    $("#notes").replaceChildren();
    $("#caption-answers").hidden = true;
    // A filter is wrong most of the time that someone types it.
    if (document.activeElement === $("#where")) grid.stale();
    else grid.show([], state.library, null);
    say(error instanceof Problem ? error.message : "The server does not answer. Is `retriever serve` still running?", true);
  }
}

function next(answer, signal) {
  if (!answer.more) return null;
  let isAsked = false;
  return async () => {
    if (isAsked) return;
    isAsked = true;
    try {
      const more = await ask(answer.offset + PAGE, signal);
      if (!signal.aborted) grid.add(more.hits, next(more, signal));
    } catch (error) {
      if (error.name !== "AbortError") say(error.message, true);
    }
  };
}

function tell(answer) {
  const isQuery = address.isQuery(state);
  $("#notes").replaceChildren(...(answer.notes ?? []).map((note) => make("li", { dir: "auto" }, forPage(note))));
  if (!answer.hits.length) {
    const total = libraries.find((one) => one.name === library())?.items;
    say(total === 0 ? "The library has no pictures yet: `retriever index FOLDER` takes them in."
      : isQuery || state.where ? "No picture fulfils all that was asked for." : "", isQuery);
  } else if (answer.message) {
    say(answer.message, true);
  } else if (isQuery) {
    const by = { image: "pictures", caption: "captions", words: "words", hybrid: "pictures, captions and words" };
    const milliseconds = Math.max(1, Math.round(1000 * answer.seconds));
    say(`Found by ${by[answer.mode]} in ${milliseconds} ms`);
  } else {
    say(`${answer.total.toLocaleString()} ${answer.total === 1 ? "picture" : "pictures"}`);
  }
}

// What the server says it says as to a shell.
const forPage = (note) => note.replace("--without THING", "The box “Without”").replace("--without", "without");

function say(sentence, isWarning = false) {
  $("#status").textContent = sentence;
  $("#status").classList.toggle("code", sentence.includes("\n"));  // it points at a place in what was typed
  $("#status").classList.toggle("no-match", isWarning);
}

async function captionsOfUpload(signal) {
  const section = $("#caption-answers");
  if (state.q || state.like.length || state.uploads.length !== 1) {
    section.hidden = true;
    return;
  }
  const { hits } = await send("/api/captions", { library: state.library, where: state.where, k: 5 }, pictures(), signal);
  section.hidden = !hits.length;
  section.replaceChildren(make("strong", {}, "Captions that fit the picture"), make("ol", {}, ...hits.map(
    (one) => make("li", { dir: "auto" }, one.caption),
  )));
}

// ── what is asked, on show ──────────────────────────────────────────────────────────────────────

function chip(label, picture, onRemove, ...more) {
  const image = picture ? make("img", { src: picture, alt: "" }) : null;
  const remove = make("button", { type: "button", "aria-label": `Remove: ${label.textContent ?? label}` }, "×");
  remove.addEventListener("click", onRemove);
  return make("li", {}, image, label, ...more, remove);
}

function weights() {
  const select = make("select", { "aria-label": "Weight of the picture" });
  for (const weight of ["0.25", "0.5", "1", "2", "4"]) {
    select.append(make("option", { value: weight, selected: weight === (state.weight || "1") }, `× ${weight}`));
  }
  select.addEventListener("change", () => go({ weight: select.value === "1" ? "" : select.value }));
  return state.q ? select : null;
}

function without(list, one) {
  return list.filter((other) => other !== one);
}

function render() {
  const fields = { q: state.q, where: state.where, mode: state.mode };
  for (const [name, value] of Object.entries(fields)) {
    const input = $(`#${name}`);
    if (input.value !== value && document.activeElement !== input) input.value = value;
  }
  $("#library").value = library();
  const chips = [
    ...state.like.map((id) => chip("like this", thumbnail(id, state.library, 160), () => go({ like: without(state.like, id) }), weights())),
    ...state.uploads.map((number) => chip("like your picture", address.upload(number).url, () => go({ uploads: without(state.uploads, number) }), weights())),
    ...state.unlike.map((id) => chip(make("span", { className: "less" }, "not like this"), thumbnail(id, state.library, 160), () => go({ unlike: without(state.unlike, id) }))),
    ...state.without.map((text) => chip(make("span", { className: "less", dir: "auto" }, text), null, () => go({ without: without(state.without, text) }))),
    ...(state.all ? [chip("near-duplicates too", null, () => go({ all: false }))] : []),
  ];
  $("#chips").replaceChildren(...chips);
  $("#chips").hidden = !chips.length;
  const isMap = state.view === "map";
  $("#map").hidden = !isMap;
  $("#results").hidden = isMap;
  $("#show-map").setAttribute("aria-pressed", String(isMap));
  $("#show-grid").setAttribute("aria-pressed", String(!isMap));
  document.title = state.q ? `${state.q} · Retriever` : "Retriever";
  if (state.item) {
    if (!box.isOpen() || box.current() !== state.item) box.open(state.item, state);
  } else {
    box.close();
  }
}

async function showMap() {
  try {
    await map.show(state.library);
    map.highlight(address.isQuery(state) ? grid.all().map((hit) => hit.id) : []);
  } catch (error) {
    $("#map-status").textContent = error.message;
  }
}

// Changes what is asked, and the address with it.
function go(changes, options) {
  const wasMap = state.view === "map";
  state = { ...state, ...changes };
  address.write(state, options);
  render();
  if (state.view === "map" && !wasMap) showMap();
  return search();
}

addEventListener("popstate", () => {
  const before = state;
  state = address.read();
  render();
  $("#q").value = state.q;
  $("#where").value = state.where;
  if (state.view === "map" && (before.view !== "map" || before.library !== state.library)) showMap();
  search();
});

// ── input ───────────────────────────────────────────────────────────────────────────────────────

// While someone types, the address follows without a new entry for every letter.
let typedFrom = null;
const typed = debounced(() => {
  const isNew = typedFrom === null;
  typedFrom = state.q;
  go({ q: $("#q").value.trim(), where: $("#where").value.trim(), item: "" }, { replace: !isNew });
}, 160);
$("#q").addEventListener("input", (event) => { if (!event.isComposing) typed(); });
$("#q").addEventListener("compositionend", typed);
$("#q").addEventListener("blur", () => { typedFrom = null; });
// A filter is seldom complete before its last letter: wait longer.
$("#where").addEventListener("input", debounced(() => typed(), 350));
$("#search").addEventListener("submit", (event) => {
  event.preventDefault();
  typed.cancel();
  typedFrom = null;
  const shunned = $("#without").value.trim();
  $("#without").value = "";
  go({
    q: $("#q").value.trim(), where: $("#where").value.trim(), item: "",
    without: shunned && !state.without.includes(shunned) ? [...state.without, shunned] : state.without,
  });
});
$("#without").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  $("#search").requestSubmit();
});
$("#mode").addEventListener("change", () => go({ mode: $("#mode").value }));
$("#library").addEventListener("change", () => {
  go({ ...address.empty(), q: state.q, view: state.view, library: $("#library").value });
  filter.load(state.library);
  if (state.view === "map") showMap();
});
$("#home").addEventListener("click", (event) => {
  event.preventDefault();
  $("#q").value = $("#where").value = "";
  go({ ...address.empty(), library: state.library });
});
$("#show-grid").addEventListener("click", () => go({ view: "" }));
$("#show-map").addEventListener("click", () => go({ view: "map" }));
$("#show-help").addEventListener("click", () => $("#help").showModal());

function withPictures(files) {
  const shown = [...files].filter((file) => file.type.startsWith("image/")).slice(0, 8);
  if (!shown.length) {
    say("That is no picture.", true);
    return;
  }
  go({ uploads: shown.map(address.keep), like: [], item: "" });
}
$("#file").addEventListener("change", () => { withPictures($("#file").files); $("#file").value = ""; });
let depth = 0;  // a drag enters and leaves every element on its way
const isFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragenter", (event) => {
  if (!isFiles(event)) return;
  event.preventDefault();
  depth += 1;
  $("#drop").hidden = false;
});
addEventListener("dragover", (event) => { if (isFiles(event)) event.preventDefault(); });
addEventListener("dragleave", () => {
  depth = Math.max(0, depth - 1);
  if (!depth) $("#drop").hidden = true;
});
addEventListener("drop", (event) => {
  depth = 0;
  $("#drop").hidden = true;
  if (!isFiles(event)) return;
  event.preventDefault();
  withPictures(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return;
  event.preventDefault();
  withPictures(files);
});

const openItem = (id, options) => go({ item: String(id) }, options);
const alike = (id) => {
  box.close();
  $("#q").value = "";
  window.scrollTo({ top: 0 });
  return go({ like: [String(id)], uploads: [], q: "", item: "" });
};
grid.onOpen((hit) => openItem(hit.id));
map.listen({ open: openItem });
box.listen({
  alike,
  shun: (id) => go({ unlike: [...without(state.unlike, id), id], item: "" }),
  closed: () => {
    const id = state.item;
    if (id) go({ item: "" }, { replace: true });  // or "back" would open it again
    if (state.view !== "map") grid.focus(id);
  },
  turn: (step) => {
    const hits = grid.all();
    const at = hits.findIndex((hit) => String(hit.id) === state.item);
    const next = hits[at + step];
    if (next) openItem(next.id, { replace: true });
  },
});

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const hit = grid.selected();
  const keys = {
    "/": () => $("#q").focus(),
    "?": () => $("#help").showModal(),
    m: () => go({ view: state.view === "map" ? "" : "map" }),
    l: hit && (() => alike(hit.id)),
    c: hit && (async () => { await openItem(hit.id); box.captions(); }),
    h: hit && (async () => { await openItem(hit.id); box.toggleHeat(); }),
  };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});

// ── start ───────────────────────────────────────────────────────────────────────────────────────

function follow() {
  const source = new EventSource(`/api/progress?library=${encodeURIComponent(library())}`);
  let isFirst = true;
  source.addEventListener("library", (event) => {
    const one = libraries.find((other) => other.name === library());
    if (one) one.items = JSON.parse(event.data).items;
    // While someone indexes, what is there without a question grows before the eyes.
    if (!isFirst && !address.isQuery(state) && !state.item && scrollY < 50) { last = ""; search(); }
    isFirst = false;
  });
}

async function start() {
  render();
  try {
    ({ libraries } = await get("/api/libraries"));
  } catch (error) {
    say(error.message, true);
    return;
  }
  const unknown = libraries.some((one) => one.name === state.library) ? "" : state.library;
  if (unknown) state.library = "";
  const select = $("#library");
  select.replaceChildren(...libraries.map((one) => make("option", { value: one.name }, one.name)));
  select.hidden = libraries.length < 2;
  render();
  filter.load(state.library).catch(() => {});
  if (state.view === "map") showMap();
  await search();
  if (unknown) say(`There is no library “${unknown}” here; this is “${library()}”.`, true);
  else if (address.hasLost()) say("The picture that you asked with has no address: drop or choose it again.", true);
  follow();
  if (!state.item && matchMedia("(pointer: fine)").matches) $("#q").focus();
}

start();
