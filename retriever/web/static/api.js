// What the server is asked. Every answer is JSON; a problem becomes an Error with its sentence.

export class Problem extends Error {
  constructor(detail, status) {
    super(detail);
    this.status = status;
  }
}

async function read(response) {
  if (response.ok) return response.json();
  let detail = `the server answered ${response.status}`;
  try {
    detail = (await response.json()).detail ?? detail;
  } catch { /* not one of its own answers */ }
  throw new Problem(detail, response.status);
}

function address(path, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "" && one !== false) query.append(name, one);
    }
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

export const get = async (path, parameters = {}, signal) =>
  read(await fetch(address(path, parameters), { signal }));

export async function send(path, parameters, pictures, signal) {
  const body = new FormData();
  for (const one of pictures) body.append("picture", one, "picture");
  return read(await fetch(address(path, parameters), { method: "POST", body, signal }));
}

export const thumbnail = (id, library, size = 320) =>
  address(`/api/items/${id}/thumbnail`, { library, size });
export const picture = (id, library) => address(`/api/items/${id}/picture`, { library });
export const heat = (id, parameters) => address(`/api/items/${id}/heat`, parameters);
