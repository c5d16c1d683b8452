// The pictures found, page after page as they come into sight; tiles have one size, so nothing jumps.

import { thumbnail } from "./api.js";
import { $, make, percent } from "./dom.js";

const list = $("#results");
let hits = [];
let library = "";
let onMore = null;

const watcher = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting) && onMore) onMore();
}, { rootMargin: "800px" });
watcher.observe($("#end"));

function tile(hit, place) {
  const picture = make("img", { src: thumbnail(hit.id, library), alt: "", loading: "lazy", decoding: "async" });
  picture.addEventListener("error", () => { picture.hidden = true; }, { once: true });
  const frame = make("span", { className: "frame" }, picture);
  if (hit.confidence !== null && hit.confidence !== undefined) {
    const sure = percent(hit.confidence);
    frame.append(make("span", { className: "badge sure", title: `${sure} sure` }, sure));
  }
  if (hit.duplicates) {
    frame.append(make("span", { className: "badge copies", title: "near-duplicates" }, `+${hit.duplicates} alike`));
  }
  const text = hit.caption ?? hit.name;
  const words = make("span", { className: hit.caption ? "words" : "words name", dir: "auto" }, text);
  return make("li", {}, make("a", {
    className: "tile", href: "#", tabIndex: place === 0 ? 0 : -1, title: text,
  }, frame, words));
}

export function show(found, name, more) {
  hits = [...found];
  library = name;
  onMore = more;
  list.replaceChildren(...hits.map(tile));
  list.classList.remove("is-stale");
  again();
}

export function add(found, more) {
  const begin = hits.length;
  hits.push(...found);
  onMore = more;
  list.append(...found.map((hit, at) => tile(hit, begin + at)));
  again();
}

// An observer tells only of changes: while the end stays in sight, it has to look anew.
function again() {
  watcher.unobserve($("#end"));
  if (onMore) watcher.observe($("#end"));
}

export const stale = () => list.classList.add("is-stale");
export const all = () => hits;
export const selected = () => {
  const tiles = [...list.querySelectorAll(".tile")];
  const at = tiles.indexOf(document.activeElement);
  return at < 0 ? null : hits[at];
};

export function focus(id) {
  const at = Math.max(0, hits.findIndex((hit) => String(hit.id) === String(id)));
  const tiles = list.querySelectorAll(".tile");
  if (tiles[at]) choose(tiles, at);
}

function choose(tiles, at) {
  for (const one of tiles) one.tabIndex = -1;
  tiles[at].tabIndex = 0;
  tiles[at].focus();
}

list.addEventListener("keydown", (event) => {
  const tiles = [...list.querySelectorAll(".tile")];
  const at = tiles.indexOf(document.activeElement);
  const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const sideways = getComputedStyle(list).direction === "rtl" ? -1 : 1;
  const steps = { ArrowRight: sideways, ArrowLeft: -sideways, ArrowDown: columns, ArrowUp: -columns };
  const goal = event.key === "Home" ? 0 : event.key === "End" ? tiles.length - 1 : at + (steps[event.key] ?? NaN);
  if (at < 0 || !(goal >= 0 && goal < tiles.length)) return;
  event.preventDefault();
  choose(tiles, goal);
});

export function onOpen(action) {
  list.addEventListener("click", (event) => {
    const link = event.target.closest(".tile");
    if (!link) return;
    event.preventDefault();
    action(hits[[...list.querySelectorAll(".tile")].indexOf(link)]);
  });
}
