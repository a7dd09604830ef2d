// Building the page: elements, icons, small helpers. Nothing here (or anywhere in the page) parses HTML from a string.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props` are attributes; `class`, `text`, `on` and `data` are read specially. Children may be nested arrays. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name === "on") for (const [event, heard] of Object.entries(value)) node.addEventListener(event, heard);
    else if (typeof value === "boolean") node.setAttribute(name, "");
    else node.setAttribute(name, String(value));
  }
  append(node, children);
  return node;
}

/** Append strings, nodes and nested arrays of them, in order. */
export function append(node, children) {
  const waiting = [children];
  while (waiting.length) {
    const item = waiting.pop();
    if (Array.isArray(item)) for (let i = item.length - 1; i >= 0; i--) waiting.push(item[i]);
    else if (item !== null && item !== undefined && item !== false) node.append(item);
  }
  return node;
}

/** One of the drawings in index.html, as decoration. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon and says its label to screen readers and on hovering. */
export function iconButton(name, label, press, props = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click: press }, ...props }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Put text on the clipboard; also where the page is not a secure context, as over plain HTTP in a local network. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not allowed: the old way may still be
    }
  }
  const before = document.activeElement;
  const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  (before?.closest("dialog") ?? document.body).append(area);
  area.select();
  let copied = false;
  try {
    copied = document.execCommand("copy");
  } finally {
    area.remove();
    before?.focus?.({ preventScroll: true });
  }
  return copied;
}

/** A name nobody else has; `crypto.randomUUID` is missing outside secure contexts. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
