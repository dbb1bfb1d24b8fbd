// Elements, icons and short messages. Text only ever becomes text nodes: nothing here reads HTML.

import { local } from "./storage.js";

const SVG = "http://www.w3.org/2000/svg";
const MATHML = "http://www.w3.org/1998/Math/MathML";

/** An element. `props` beginning with "on" are listeners, "class" and aria/data names are attributes, others properties. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class" || name.includes("-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An SVG element, all props attributes. */
export const svg = (tag, attributes = {}, ...children) => ofNamespace(SVG, tag, attributes, children);

/** The same of MathML. */
export const math = (tag, attributes = {}, ...children) => ofNamespace(MATHML, tag, attributes, children);

function ofNamespace(namespace, tag, attributes, children) {
  const node = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const PATHS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  settings: "M4 7h8.5M17.5 7H20M4 17h2.5M11.5 17H20M17.5 7a2.5 2.5 0 1 1-5 0a2.5 2.5 0 1 1 5 0M11.5 17a2.5 2.5 0 1 1-5 0a2.5 2.5 0 1 1 5 0",
  compare: "M4 5h7v14H4zM13 5h7v14h-7z",
  share: "M12 15V4M8 8l4-4 4 4M5 14v5h14v-5",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7.5 7.5h9v9h-9z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 13l4.5 4.5L19 7",
  redo: "M19 12a7 7 0 1 1-2-4.9M19 4v4h-4",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  chart: "M4 20V4M4 20h16M8 16v-4M12.5 16V8M17 16v-6",
  sun: "M12 8a4 4 0 1 0 0 8a4 4 0 0 0 0-8M12 3v1.5M12 19.5V21M3 12h1.5M19.5 12H21M5.6 5.6l1.1 1.1M17.3 17.3l1.1 1.1M5.6 18.4l1.1-1.1M17.3 6.7l1.1-1.1",
  moon: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  chat: "M5 5h14v11H10l-5 4z",
  help: "M9.2 9a2.9 2.9 0 1 1 4.2 2.6c-.9.5-1.4 1-1.4 2.1M12 17v.2",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  tool: "M14 6a4.5 4.5 0 0 0-5.7 5.7L4 16v4h4l4.3-4.3A4.5 4.5 0 0 0 18 10l-3 2-3-3z",
  pause: "M8.5 6v12M15.5 6v12",
  play: "M8 5.5v13l10-6.5z",
  key: "M11 12a3.5 3.5 0 1 1-7 0a3.5 3.5 0 1 1 7 0H20v3.5M16 12v2.5",
};

export function icon(name) {
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: PATHS[name] }));
}

/** A button that shows an icon and is named by its label. */
export function iconButton(name, label, onclick, props = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

/** Fills the elements of a page that say which icon they want. */
export function fillIcons(root = document) {
  for (const node of root.querySelectorAll("[data-icon]")) {
    if (!node.querySelector(":scope > .icon")) node.prepend(icon(node.dataset.icon));
  }
}

export const byId = (id) => document.getElementById(id);

/** Tells a screen reader, politely. */
export function announce(text) {
  byId("announcer").textContent = text;
}

const TOAST_MS = 7000;

/** A message at the foot of the page that goes by itself; `action` is `{label, run}`. */
export function toast(text, action = null) {
  const node = h("div", { class: "toast", role: "status" }, h("span", { class: "text" }, text));
  const remove = () => node.remove();
  if (action) {
    const run = () => {
      remove();
      action.run();
    };
    node.append(h("button", { type: "button", class: "button", onclick: run }, action.label));
  }
  byId("toasts").replaceChildren(node);
  setTimeout(remove, TOAST_MS);
}

/** Copies text; where the clipboard is refused (plain http on another host), by the old way. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "visually-hidden", value: text, "aria-hidden": "true" });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copyText(text());
    button.replaceChildren(icon("check"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

const dark = matchMedia("(prefers-color-scheme: dark)");

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : dark.matches;
}

/** Makes a button of `button` that goes from light to dark and back; what is the system's own is not stored. */
export function themeToggle(button) {
  const show = () => {
    const label = isDark() ? "Switch to light theme" : "Switch to dark theme";
    button.replaceChildren(icon(isDark() ? "sun" : "moon"));
    button.title = label;
    button.setAttribute("aria-label", label);
  };
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    const isSystems = (theme === "dark") === dark.matches;
    if (isSystems) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    if (isSystems) local.removeItem("rayllm.theme");
    else local.setItem("rayllm.theme", theme);
    show();
  });
  dark.addEventListener("change", show);
  show();
}
