// Inline Markdown: code, strong, emphasis, strikethrough, links. Unclosed marks are shown as they are.

import { h } from "./dom.js";
import { formula } from "./markup.js";

const ESCAPED = /^\\([!-/:-@[-`{-~])/;
const CODE = /^(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/;
const LINK = /^!?\[((?:[^\[\]\\]|\\.|\[[^\[\]]*\]){0,1000})\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+["'(][^"')]*["')])?\s*\)/;
const ANGLE = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/;
const BARE = /^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_~]/;
const PLAIN = /^(?:[^\\`*_~[\]<!\n$h]+|h(?!ttps?:\/\/))+/;
const FORMULA = /^\\\((?!\s*\\\))([\s\S]{1,4000}?)\\\)/;
const DISPLAY_FORMULA = /^(?:\\\[([\s\S]{1,4000}?)\\\]|\$\$(?!\$)([^$]{1,4000}?)\$\$)/;
const DOLLAR_FORMULA = /^\$(?![\s$])((?:[^$\\\n]|\\[^\n]|\n(?!\s*\n)){1,1000}?)(?<![\s\\])\$(?![\d$])/;
const FOOTNOTE = /^\[\^([\w-]{1,30})\]/;
const SIMPLE_TAG = /^<(kbd|sub|sup|mark|ins|del|u|s)>([^<]{1,300})<\/\1>/i;
const BREAK = /^<br\s*\/?>/i;
const MARKS = [
  ["***", "em strong"],
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const MAX_DEPTH = 6;
const SAFE_PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

/** The nodes of a line of text. */
export function renderInline(text, depth = 0) {
  const nodes = [];
  const addText = (value) => {
    if (nodes.length && nodes.at(-1).nodeType === Node.TEXT_NODE) nodes.at(-1).data += value;
    else nodes.push(document.createTextNode(value));
  };
  for (let at = 0; at < text.length; ) {
    const rest = text.slice(at, at + 4000);
    const plain = PLAIN.exec(rest);
    if (plain) {
      addText(plain[0]);
      at += plain[0].length;
      continue;
    }
    const found = readSpan(rest, text[at - 1] ?? " ", depth);
    if (found) {
      if (found.text !== undefined) addText(found.text);
      else nodes.push(found.node);
      at += found.length;
    } else {
      addText(text[at]);
      at++;
    }
  }
  return nodes;
}

function readSpan(rest, before, depth) {
  let match;
  if (rest[0] === "\\" || rest[0] === "$") {
    const found = readFormula(rest, before);
    if (found) return found;
  }
  if ((match = ESCAPED.exec(rest))) return { text: match[1], length: 2 };
  if (rest[0] === "\n") return { node: h("br"), length: 1 };
  if ((match = CODE.exec(rest))) {
    const code = match[2].replace(/^ (.*[^ ].*) $/, "$1");
    return { node: h("code", {}, code), length: match[0].length };
  }
  if ((match = BREAK.exec(rest))) return { node: h("br"), length: match[0].length };
  if (depth >= MAX_DEPTH) return null;
  if ((match = SIMPLE_TAG.exec(rest))) {
    return { node: h(match[1].toLowerCase(), {}, renderInline(match[2], depth + 1)), length: match[0].length };
  }
  if ((match = FOOTNOTE.exec(rest)) && rest[match[0].length] !== "(") return { node: footnoteMark(match[1]), length: match[0].length };
  if ((match = LINK.exec(rest))) return { node: link(match[2], match[1], depth), length: match[0].length };
  if ((match = ANGLE.exec(rest))) return { node: link(match[1], match[1], MAX_DEPTH), length: match[0].length };
  if (!/\w/.test(before) && (match = BARE.exec(rest))) {
    return { node: link(match[0], match[0], MAX_DEPTH), length: match[0].length };
  }
  return readMarks(rest, before, depth);
}

/** `\(…\)`, `\[…\]`, `$$…$$`, and `$…$` where it is not money. */
function readFormula(rest, before) {
  let match;
  if ((match = FORMULA.exec(rest))) return { node: formula(match[1].trim(), false, match[0]), length: match[0].length };
  if ((match = DISPLAY_FORMULA.exec(rest))) {
    const latex = (match[1] ?? match[2]).trim();
    return latex ? { node: formula(latex, true, match[0]), length: match[0].length } : null;
  }
  if (/[\w$]/.test(before) || !(match = DOLLAR_FORMULA.exec(rest)) || isAmount(match[1])) return null;
  return { node: formula(match[1].trim(), false, match[0]), length: match[0].length };
}

/** Whether what stands between two dollar signs is prose about money, or prose: "$5 for one, 10$ for all". */
function isAmount(text) {
  if (/[\\^_={}<>+*]/.test(text)) return false;
  return (/^\d/.test(text) && /\s[a-z]{2,}/i.test(text)) || /(?:^|\s)[a-z]{3,}\s+[a-z]{2,}(?:\s|$)/i.test(text);
}

/** Its number, where the answer holds the note: `linkFootnotes` looks. */
function footnoteMark(name) {
  const go = (event) => {
    event.preventDefault();
    const note = event.target.closest(".md").querySelector(`.footnote[data-note="${name}"]`);
    note?.scrollIntoView({ block: "nearest" });
    note?.focus({ preventScroll: true });
  };
  const mark = h("a", { class: "footnote-mark", href: "#", role: "doc-noteref", onclick: go }, `[^${name}]`);
  mark.dataset.note = name;
  return mark;
}

/** Footnotes' marks become numbers where the text holds the note, and stay as they were written where not. */
export function linkFootnotes(root) {
  const notes = [...root.querySelectorAll(".footnote")].map(({ dataset }) => dataset.note);
  for (const mark of root.querySelectorAll(".footnote-mark")) {
    const number = notes.indexOf(mark.dataset.note) + 1;
    mark.classList.toggle("known", number > 0);
    const text = number ? String(number) : `[^${mark.dataset.note}]`;
    if (mark.textContent !== text) mark.textContent = text;
    if (number) mark.href = "#";
    else mark.removeAttribute("href");
  }
  root.querySelectorAll(".footnote > .footnote-number").forEach((node, i) => (node.textContent = `${i + 1}.`));
}

function readMarks(rest, before, depth) {
  for (const [mark, tags] of MARKS) {
    if (!rest.startsWith(mark)) continue;
    if (mark[0] === "_" && /\w/.test(before)) return null;
    const end = closingAt(rest, mark);
    if (end < 0) continue;
    const inner = renderInline(rest.slice(mark.length, end), depth + 1);
    const node = tags.split(" ").reduceRight((children, tag) => [h(tag, {}, children)], inner)[0];
    return { node, length: end + mark.length };
  }
  return null;
}

/** Where the mark closes, or -1: not after a space, not inside code, and not in a word for underscores. */
function closingAt(rest, mark) {
  if (/^\s/.test(rest.slice(mark.length))) return -1;
  for (let at = rest.indexOf(mark, mark.length + 1); at > 0; at = rest.indexOf(mark, at + 1)) {
    const isRun = mark.length === 1 && (rest[at + 1] === mark || rest[at - 1] === mark);
    const isInWord = mark[0] === "_" && /\w/.test(rest[at + mark.length] ?? " ");
    const isInCode = rest.slice(0, at).split("`").length % 2 === 0;
    if (!/\s/.test(rest[at - 1]) && rest[at - 1] !== "\\" && !isRun && !isInWord && !isInCode) return at;
  }
  return -1;
}

/** A link where its address is of the web or mail, else its text. Images too are links: nothing is loaded unasked. */
function link(address, text, depth) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return h("span", {}, text);
  }
  if (!SAFE_PROTOCOLS.has(url.protocol)) return h("span", {}, text);
  const label = depth < MAX_DEPTH ? renderInline(text, MAX_DEPTH) : [text];
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href }, label.length ? label : url.href);
}
