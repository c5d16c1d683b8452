// What is asked, as the address bar has it, so that it can be kept as a bookmark and "back" works.
// Pictures that were dropped have no address: they are kept here, under a number.

const NAMES = ["q", "where", "mode", "library", "weight", "view", "item"];
const LISTS = ["like", "without", "unlike"];
const uploads = new Map();

export const empty = () => ({
  q: "", where: "", mode: "", library: "", weight: "", view: "", item: "", all: false,
  like: [], without: [], unlike: [], uploads: [],
});

export function read() {
  const query = new URLSearchParams(location.search);
  const state = empty();
  for (const name of NAMES) state[name] = query.get(name) ?? "";
  for (const name of LISTS) state[name] = query.getAll(name);
  for (const name of ["like", "unlike"]) state[name] = state[name].filter((id) => /^[1-9]\d*$/.test(id));
  if (!/^[1-9]\d*$/.test(state.item)) state.item = "";
  state.all = query.has("all");
  state.uploads = query.getAll("upload").filter((number) => uploads.has(number));
  return state;
}

// Whether the address names pictures that a reload has dropped.
export const hasLost = () => new URLSearchParams(location.search).getAll("upload").some((number) => !uploads.has(number));

export function write(state, { replace = false } = {}) {
  const query = new URLSearchParams();
  for (const name of NAMES) if (state[name]) query.set(name, state[name]);
  for (const name of LISTS) for (const one of state[name]) query.append(name, one);
  for (const number of state.uploads) query.append("upload", number);
  if (state.all) query.set("all", "");
  const text = query.toString();
  const address = text ? `?${text}` : location.pathname;
  if (address === (location.search || location.pathname)) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
}

export function keep(file) {
  const number = String(uploads.size + 1);
  uploads.set(number, { file, url: URL.createObjectURL(file) });
  return number;
}

export const upload = (number) => uploads.get(number);

// The same as the server is asked.
export const asked = (state) => ({
  q: state.q, where: state.where, mode: state.mode, library: state.library,
  image: state.like, image_weight: state.weight, without: state.without, without_image: state.unlike,
});

export const isQuery = (state) => Boolean(state.q || state.like.length || state.uploads.length);
