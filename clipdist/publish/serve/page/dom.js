// Elements from data. What the service says reaches the page as text and attributes, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// An element with attributes (true: present; false, null: absent; a function: a listener) and strings or nodes inside.
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

export function icon(name) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS(SVG, tag));
  svg.classList.add("icon");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function card(title, note, ...children) {
  return el("section", { class: "card pad" }, el("div", { class: "heading" }, el("h2", {}, title), note), ...children);
}

export const hint = (...words) => el("span", { class: "hint" }, ...words);

// For screen readers: what has just appeared.
export const announce = (words) => byId("announce").replaceChildren(words);

// What is wrong, in an element that is hidden while nothing is.
export function complain(id, words) {
  byId(id).hidden = !words;
  byId(id).replaceChildren(words || "");
}

export const count = (number) => number.toLocaleString("en-GB");
export const score = (number) => number.toFixed(3);
export const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);

export function bytes(number) {
  const [size, unit] = number >= 2 ** 20 ? [number / 2 ** 20, "MiB"] : [number / 2 ** 10, "KiB"];
  return `${size.toLocaleString("en-GB", { maximumFractionDigits: size < 100 ? 1 : 0 })} ${unit}`;
}
