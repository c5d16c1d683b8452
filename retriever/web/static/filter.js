// Completion of a filter from what the library holds: a field, then a comparison, then a value.

import { get } from "./api.js";
import { $, make } from "./dom.js";

const input = $("#where");
const list = $("#completions");
const OPERATORS = {
  text: ["=", "!=", "like", "contains", "words", "in ("],
  extra: ["=", "!=", "like", "contains", ">", "<", "in ("],
  number: [">", "<", ">=", "<=", "="],
  time: [">=", "<", "="],
  place: ["near (", "in box("],
};
const TESTS = ["has captions", "has gps", "has taken", "has camera", "portrait", "landscape", "square", "not "];
let fields = [];
let chosen = -1;

export async function load(library) {
  fields = (await get("/api/fields", { library })).fields;
}

const quoted = (value) => (/^[^\s()'"“”`,=<>!]+$/.test(value) && !/^(and|or|not)$/i.test(value)
  ? value : `"${value.replaceAll('"', '""')}"`);
const spelled = (name) => (/^[\w.-]+$/.test(name) ? name : `\`${name}\``);

// [text before what is being typed, what is typed, candidates]
function candidates() {
  const text = input.value.slice(0, input.selectionStart);
  const [, before, typed] = /^(.*?)((?:"[^"]*|[^\s(),]*))$/s.exec(text) ?? ["", text, ""];
  const words = before.match(/"[^"]*"|`[^`]*`|<>|[=!<>]=?|[^\s"`=!<>(),]+|[(),]/g) ?? [];
  const last = words.at(-1)?.toLowerCase();
  const named = (word) => fields.find((one) => spelled(one.name).toLowerCase() === word?.toLowerCase());
  let several;
  if (!last || ["and", "or", "not", "("].includes(last) && !named(words.at(-3))) {
    several = [...fields.map((one) => `${spelled(one.name)} `), ...TESTS];
  } else if (last === "has") {
    several = fields.map((one) => spelled(one.name));
  } else if (named(words.at(-1))) {
    several = OPERATORS[named(words.at(-1)).type];
  } else {
    const field = named(words.at(-2)) ?? named(words.at(-3));
    several = field && !["and", "or"].includes(words.at(-2)?.toLowerCase())
      ? field.values.map(quoted) : ["and ", "or "];
    if (!several.length) several = [];
  }
  const start = typed.replace(/^"/, "").toLowerCase();
  const fit = several.filter((one) => {
    const plain = one.replace(/^"/, "").toLowerCase();
    return plain.includes(start) && plain.trim() !== start;
  });
  fit.sort((one, other) => other.toLowerCase().startsWith(start) - one.toLowerCase().startsWith(start));
  return [before, typed, fit.slice(0, 12)];
}

function update() {
  const [, , several] = candidates();
  chosen = -1;
  list.replaceChildren(...several.map((text, at) => make("li", { role: "option", id: `way-${at}`, "aria-selected": "false" }, text)));
  const isOpen = several.length > 0 && document.activeElement === input;
  list.hidden = !isOpen;
  input.setAttribute("aria-expanded", String(isOpen));
  input.removeAttribute("aria-activedescendant");
}

function close() {
  list.hidden = true;
  input.setAttribute("aria-expanded", "false");
  input.removeAttribute("aria-activedescendant");
}

function take(text) {
  const [before, typed] = candidates();
  const rest = input.value.slice(input.selectionStart);
  const space = /[\s(]$/.test(text) || rest.startsWith(" ") ? "" : " ";
  input.value = before + text + space + rest;
  const place = (before + text + space).length;
  input.setSelectionRange(place, place);
  input.dispatchEvent(new Event("input", { bubbles: true }));
  return typed;
}

input.addEventListener("input", update);
input.addEventListener("focus", update);
input.addEventListener("click", update);
input.addEventListener("blur", close);
input.addEventListener("keydown", (event) => {
  if (list.hidden) return;
  const several = [...list.children];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) {
    event.preventDefault();
    several[chosen]?.setAttribute("aria-selected", "false");
    chosen = (chosen + step + several.length + (chosen < 0 && step < 0 ? 1 : 0)) % several.length;
    several[chosen].setAttribute("aria-selected", "true");
    several[chosen].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", several[chosen].id);
  } else if ((event.key === "Enter" || event.key === "Tab") && chosen >= 0) {
    event.preventDefault();
    take(several[chosen].textContent);
  } else if (event.key === "Escape") {
    event.stopPropagation();
    close();
  }
});
// Before the input loses its focus.
list.addEventListener("pointerdown", (event) => {
  const way = event.target.closest("li");
  if (!way) return;
  event.preventDefault();
  take(way.textContent);
});
