// All pictures as points on a canvas; drawn only when something changed, found again by a grid.

import { get, thumbnail } from "./api.js";
import { $, make } from "./dom.js";

const canvas = $("#map canvas");
const peek = $("#peek");
const CELLS = 64;
const THUMBNAILS = 60;  // at most so many points in sight, and they are shown as pictures
const pictures = new Map();
let library = "";
let points = { ids: [], x: [], y: [] };
let cells = [];
let found = new Set();
let view = { scale: 1, x: 0.5, y: 0.5 };  // what is in the middle, and how large
let isDue = false;
let timer = 0;
let actions = {};

export const listen = (given) => { actions = given; };
export const isShown = () => !$("#map").hidden;

export async function show(name) {
  library = name;
  clearTimeout(timer);
  const answer = await get("/api/map", { library });
  if (!answer.ready) {
    $("#map-status").textContent = answer.message ?? "The map is being drawn; this takes a moment the first time …";
    if (!answer.message) timer = setTimeout(() => isShown() && show(name), 1500);
    return;
  }
  points = answer;
  cells = Array.from({ length: CELLS * CELLS }, () => []);
  for (let at = 0; at < points.ids.length; at += 1) cells[cell(points.x[at], points.y[at])].push(at);
  $("#map-status").textContent = `${points.ids.length.toLocaleString()} pictures; those that show alike lie together`;
  draw();
  if (answer.drawing) timer = setTimeout(() => isShown() && show(name), 1500);  // there are newer pictures
}

export function highlight(ids) {
  found = new Set(ids);
  draw();
}

const bounded = (value) => Math.max(0, Math.min(CELLS - 1, Math.floor(value * CELLS)));
const cell = (x, y) => bounded(y) * CELLS + bounded(x);
const side = () => Math.min(canvas.clientWidth, canvas.clientHeight) * 0.94 * view.scale;
const toScreen = (x, y) => [
  canvas.clientWidth / 2 + (x - view.x) * side(), canvas.clientHeight / 2 + (y - view.y) * side(),
];
const toMap = (left, top) => [
  view.x + (left - canvas.clientWidth / 2) / side(), view.y + (top - canvas.clientHeight / 2) / side(),
];

function draw() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => { isDue = false; paint(); });
}

function inSight() {
  const [left, top] = toMap(0, 0);
  const [right, bottom] = toMap(canvas.clientWidth, canvas.clientHeight);
  const seen = [];
  for (let row = bounded(top); row <= bounded(bottom); row += 1) {
    for (let column = bounded(left); column <= bounded(right); column += 1) {
      for (const at of cells[row * CELLS + column] ?? []) {
        const x = points.x[at], y = points.y[at];
        if (x >= left && x <= right && y >= top && y <= bottom) seen.push(at);
      }
    }
  }
  return seen;
}

function paint() {
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const style = getComputedStyle(document.documentElement);
  const seen = inSight();
  const size = Math.min(9, 2.2 * Math.sqrt(view.scale) + (points.ids.length < 1000 ? 2 : 0));
  const scale = side(), left = width / 2 - view.x * scale, top = height / 2 - view.y * scale;
  const asPictures = seen.length <= THUMBNAILS;
  context.fillStyle = style.getPropertyValue("--soft");
  context.globalAlpha = 0.55;
  for (const at of seen) {
    if (!found.has(points.ids[at])) {
      context.fillRect(left + points.x[at] * scale - size / 2, top + points.y[at] * scale - size / 2, size, size);
    }
  }
  context.globalAlpha = 1;
  context.fillStyle = style.getPropertyValue("--accent");
  for (const at of seen) {
    if (!found.has(points.ids[at])) continue;
    context.beginPath();
    context.arc(left + points.x[at] * scale, top + points.y[at] * scale, size + 2, 0, 2 * Math.PI);
    context.fill();
  }
  if (asPictures) for (const at of seen) paintPicture(context, at, style);
}

function paintPicture(context, at, style) {
  const id = points.ids[at];
  let image = pictures.get(id);
  if (!image) {
    image = new Image();
    image.addEventListener("load", draw);
    image.src = thumbnail(id, library, 160);
    pictures.set(id, image);
    if (pictures.size > 400) pictures.delete(pictures.keys().next().value);
  }
  if (!image.complete || !image.naturalWidth) return;
  const large = 72, ratio = Math.min(large / image.naturalWidth, large / image.naturalHeight);
  const width = image.naturalWidth * ratio, height = image.naturalHeight * ratio;
  const [x, y] = toScreen(points.x[at], points.y[at]);
  context.drawImage(image, x - width / 2, y - height / 2, width, height);
  if (found.has(id)) {
    context.lineWidth = 3;
    context.strokeStyle = style.getPropertyValue("--accent");
    context.strokeRect(x - width / 2, y - height / 2, width, height);
  }
}

function nearest(left, top, reach = 24) {
  const [x, y] = toMap(left, top);
  const far = reach / side();
  let best = -1, least = far * far;
  for (let row = bounded(y - far); row <= bounded(y + far); row += 1) {
    for (let column = bounded(x - far); column <= bounded(x + far); column += 1) {
      for (const at of cells[row * CELLS + column] ?? []) {
        const distance = (points.x[at] - x) ** 2 + (points.y[at] - y) ** 2;
        if (distance < least) [best, least] = [at, distance];
      }
    }
  }
  return best;
}

function zoom(factor, left = canvas.clientWidth / 2, top = canvas.clientHeight / 2) {
  const [x, y] = toMap(left, top);
  const scale = Math.max(0.8, Math.min(200, view.scale * factor));
  const share = 1 - view.scale / scale;
  view = { scale, x: view.x + (x - view.x) * share, y: view.y + (y - view.y) * share };
  peek.hidden = true;
  draw();
}

function shift(right, down) {
  view = { ...view, x: view.x + right / side(), y: view.y + down / side() };
  peek.hidden = true;
  draw();
}

function look(left, top) {
  const at = nearest(left, top);
  canvas.style.cursor = at < 0 ? "grab" : "pointer";
  peek.hidden = at < 0;
  if (at < 0) return;
  const id = points.ids[at];
  if (peek.dataset.id !== String(id)) {
    peek.dataset.id = id;
    const image = make("img", { src: thumbnail(id, library), alt: "" });
    peek.firstElementChild.replaceWith(image);
    peek.lastElementChild.textContent = "";
    get(`/api/items/${id}`, { library }).then((facts) => {
      if (peek.dataset.id === String(id)) peek.lastElementChild.textContent = facts.captions[0]?.text ?? facts.name;
    }).catch(() => {});
  }
  const [x, y] = toScreen(points.x[at], points.y[at]);
  peek.style.left = `${Math.min(x + 14, canvas.clientWidth - 200)}px`;
  peek.style.top = `${Math.max(4, Math.min(y + 14, canvas.clientHeight - 210))}px`;
}

// One pointer drags, two pinch.
const pointers = new Map();
let moved = 0;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  moved = 0;
});
canvas.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) {
    look(event.offsetX, event.offsetY);
    return;
  }
  const right = event.offsetX - before.offsetX, down = event.offsetY - before.offsetY;
  moved += Math.abs(right) + Math.abs(down);
  if (pointers.size === 2) {
    const [other] = [...pointers.values()].filter((one) => one.pointerId !== event.pointerId);
    const distance = (one) => Math.hypot(one.offsetX - other.offsetX, one.offsetY - other.offsetY);
    zoom(distance(event) / Math.max(1, distance(before)), (event.offsetX + other.offsetX) / 2, (event.offsetY + other.offsetY) / 2);
  } else {
    shift(-right, -down);
  }
  pointers.set(event.pointerId, event);
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => {
    pointers.delete(event.pointerId);
    if (name === "pointercancel" || moved > 6) return;
    const at = nearest(event.offsetX, event.offsetY);
    if (at >= 0) actions.open(points.ids[at]);
  });
}
canvas.addEventListener("pointerleave", () => { peek.hidden = true; });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
}, { passive: false });
canvas.addEventListener("keydown", (event) => {
  const far = 60;
  const keys = {
    ArrowLeft: () => shift(-far, 0), ArrowRight: () => shift(far, 0),
    ArrowUp: () => shift(0, -far), ArrowDown: () => shift(0, far),
    "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5),
    Enter: () => {
      const at = nearest(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity);
      if (at >= 0) actions.open(points.ids[at]);
    },
  };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    const factor = Number(button.dataset.zoom);
    if (factor) zoom(factor);
    else { view = { scale: 1, x: 0.5, y: 0.5 }; draw(); }
  });
}
new ResizeObserver(draw).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
