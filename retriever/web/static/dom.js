// Elements made of names, properties and children; text is only ever set as text.

export const $ = (selector) => document.querySelector(selector);

export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const percent = (share) => {
  const whole = Math.round(100 * share);
  return whole < 1 ? "<1 %" : whole > 99 ? ">99 %" : `${whole} %`;
};

export function debounced(action, milliseconds) {
  let timer = 0;
  const later = (...values) => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds, ...values);
  };
  later.cancel = () => clearTimeout(timer);
  return later;
}
