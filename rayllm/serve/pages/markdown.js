// Markdown to DOM nodes, block by block. Text becomes text nodes only: what a model writes is never read as HTML.

import { linkFootnotes, renderInline } from "./inline.js";
import { copyButton, h } from "./dom.js";
import { colour, formula } from "./markup.js";
import { hintScrolling } from "./scroll_hint.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +(.*)|)$/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_LINE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const FOOTNOTE = /^ {0,3}\[\^([\w-]{1,30})\]:\s*(.*)$/;
const FORMULA_START = /^ {0,3}(\$\$|\\\[|\\begin\{([a-z]+\*?)\})/;
const MAX_FORMULA_LINES = 60;
const MAX_DEPTH = 8;

/** The blocks of a text, in order: `{kind, ...}` with the `source` they were read from. */
export function readBlocks(text) {
  const lines = text.replaceAll("\t", "    ").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const start = at;
    const block = readBlock(lines, at);
    at = block.end;
    block.source = lines.slice(start, at).join("\n");
    blocks.push(block);
  }
  return blocks;
}

function readBlock(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", level: heading[1].length, text: heading[2], end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  const display = readFormula(lines, at);
  if (display) return display;
  const note = FOOTNOTE.exec(line);
  if (note) return readFootnote(lines, at, note);
  if (QUOTE.test(line)) return readQuote(lines, at);
  if (ITEM.test(line)) return readList(lines, at);
  if (isTableAt(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at);
}

function readFence(lines, at, [, indent, mark, info]) {
  let end = at + 1;
  const closing = new RegExp(`^ {0,3}${mark[0] === "`" ? "`" : "~"}{${mark.length},}\\s*$`);
  while (end < lines.length && !closing.test(lines[end])) end++;
  const strip = new RegExp(`^ {0,${indent.length}}`);
  const code = lines.slice(at + 1, end).map((line) => line.replace(strip, ""));
  const isWhole = end < lines.length;
  return { kind: "code", language: info.trim().split(/\s/)[0], code: code.join("\n"), isWhole, end: Math.min(end + 1, lines.length) };
}

/** A formula on lines of its own; null where it does not end. */
function readFormula(lines, at) {
  const start = FORMULA_START.exec(lines[at]);
  if (!start) return null;
  const closing = { $$: "$$", "\\[": "\\]" }[start[1]] ?? `\\end{${start[2]}}`;
  const first = lines[at].indexOf(start[1]) + start[1].length;
  for (let end = at; end < Math.min(lines.length, at + MAX_FORMULA_LINES); end++) {
    const closedAt = lines[end].indexOf(closing, end === at ? first : 0);
    if (closedAt < 0) continue;
    if (lines[end].slice(closedAt + closing.length).replace(/^[.,;]/, "").trim()) return null; // text goes on: a paragraph's
    const source = lines.slice(at, end + 1).join("\n").trim();
    const inner = start[2] ? source.slice(0, source.lastIndexOf(closing) + closing.length) : source.slice(start[1].length, source.lastIndexOf(closing));
    return inner.trim() ? { kind: "formula", latex: inner.trim(), text: source, end: end + 1 } : null;
  }
  return null;
}

function readFootnote(lines, at, [, name, first]) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !FOOTNOTE.test(lines[end]) && !beginsBlock(lines, end)) end++;
  return { kind: "footnote", name, text: [first, ...lines.slice(at + 1, end).map((line) => line.trim())].join("\n"), end };
}

function readQuote(lines, at) {
  let end = at;
  const inner = [];
  while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !beginsBlock(lines, end))) {
    inner.push(lines[end++].replace(QUOTE, ""));
  }
  return { kind: "quote", text: inner.join("\n"), end };
}

function readList(lines, at) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(mark);
  const items = [];
  let isLoose = false;
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[1].length > indent.length + 1 || /\d/.test(item[2]) !== isOrdered || RULE.test(lines[end])) break;
    const width = item[1].length + item[2].length + 1;
    const inner = [item[3] ?? ""];
    end++;
    while (end < lines.length && belongsToItem(lines, end, width)) inner.push(lines[end++].replace(new RegExp(`^ {0,${width}}`), ""));
    while (inner.length && !inner.at(-1).trim()) inner.pop();
    items.push(inner.join("\n"));
    const isApart = end < lines.length && end > 0 && !lines[end - 1].trim();
    if (isApart && ITEM.test(lines[end])) isLoose = true;
  }
  return { kind: "list", start: isOrdered ? parseInt(mark, 10) : null, items, isLoose, end };
}

function belongsToItem(lines, at, width) {
  const line = lines[at];
  if (!line.trim()) return lines.slice(at + 1, at + 3).some((next) => next.trim() && (indentOf(next) >= 2 || ITEM.test(next)));
  if (indentOf(line) >= Math.min(width, 2)) return true;
  return Boolean(lines[at - 1].trim()) && !ITEM.test(line) && !beginsBlock(lines, at);
}

const indentOf = (line) => line.length - line.trimStart().length;

function beginsBlock(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) || FOOTNOTE.test(line)) return true;
  return readFormula(lines, at) !== null;
}

function isTableAt(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE_LINE.test(lines[at + 1])
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function cells(line) {
  const bare = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return bare.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readTable(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => (/^:-+:$/.test(cell) ? "center" : /-:$/.test(cell) ? "right" : "left"));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) rows.push(cells(lines[end++]));
  return { kind: "table", head, align, rows, end };
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines, end) && !isTableAt(lines, end)) end++;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n"), end };
}

function renderBlock(block, depth) {
  switch (block.kind) {
    case "code":
      return renderCode(block);
    case "heading":
      // A page's own headings stand above those of an answer.
      return h(`h${Math.min(6, block.level + 2)}`, { class: `md-h${block.level}` }, renderInline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, renderNested(block.text, depth));
    case "list":
      return renderList(block, depth);
    case "table":
      return renderTable(block);
    case "formula":
      return h("div", { class: "formula-block" }, hintScrolling(formula(block.latex, true, block.text)));
    case "footnote":
      return renderFootnote(block);
    default:
      return h("p", {}, renderInline(block.text));
  }
}

function renderNested(text, depth) {
  if (depth >= MAX_DEPTH) return [h("p", {}, text)];
  return readBlocks(text).map((block) => renderBlock(block, depth + 1));
}

function renderCode({ language, code, isWhole }) {
  const node = h("code", {}, document.createTextNode(code));
  const name = language.slice(0, 30);
  const head = h("div", { class: "code-head" }, h("span", {}, name || "text"), copyButton("Copy code", () => node.textContent));
  const label = name ? `Code, ${name}` : "Code";
  node.dataset.language = name.toLowerCase();
  if (isWhole) colourOnce(node);
  return h("div", { class: "code" }, head, hintScrolling(h("pre", { tabIndex: 0, role: "region", "aria-label": label }, node)));
}

/** Colours the code, which does not grow any more. */
function colourOnce(node) {
  if (node.dataset.isWhole) return;
  node.dataset.isWhole = "true";
  colour(node, node.dataset.language);
}

function renderFootnote({ name, text }) {
  const note = h("p", { class: "footnote", role: "doc-footnote", tabIndex: -1 }, h("span", { class: "footnote-number" }), " ", renderInline(text));
  note.dataset.note = name;
  return note;
}

function renderList({ start, items, isLoose }, depth) {
  const list = h(start === null ? "ul" : "ol");
  if (start !== null && start !== 1) list.start = start;
  for (const item of items) {
    const task = /^\[([ xX])\] +/.exec(item);
    const nodes = renderNested(task ? item.slice(task[0].length) : item, depth);
    const first = nodes[0];
    const tight = !isLoose && first?.nodeName === "P" ? [...first.childNodes, ...nodes.slice(1)] : nodes;
    const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": "task" });
    list.append(h("li", { class: task ? "task" : null }, box, tight));
  }
  return list;
}

function renderTable({ head, align, rows }) {
  const row = (tag, texts) =>
    h("tr", {}, head.map((_, i) => h(tag, { class: `align-${align[i]}` }, renderInline(texts[i] ?? ""))));
  const table = h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, rows.map((texts) => row("td", texts))));
  return hintScrolling(h("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, table));
}

/**
 * A text that grows, shown in `root`. Only blocks that changed are made anew, and of a code block that grew only
 * the new part is added: a long answer costs its last block a turn, not its length.
 */
export class GrowingMarkdown {
  #shown = [];

  constructor(root) {
    this.root = root;
  }

  /** `isWhole`: it does not grow any more. */
  update(text, isWhole = false) {
    const blocks = readBlocks(text);
    let same = 0;
    while (same < blocks.length && same < this.#shown.length && this.#shown[same].block.source === blocks[same].source) same++;
    const old = this.#shown.splice(same);
    if (old.length === 1 && blocks.length > same && grew(old[0], blocks[same])) {
      this.#shown.push({ block: blocks[same], node: old[0].node });
      same++;
    } else {
      for (const { node } of old) node.remove();
    }
    for (const block of blocks.slice(same)) {
      const node = renderBlock(block, 0);
      this.#shown.push({ block, node });
      this.root.append(node);
    }
    linkFootnotes(this.root);
    if (isWhole) this.root.querySelectorAll("code[data-language]").forEach(colourOnce);
  }
}

function grew({ block, node }, next) {
  if (block.kind !== "code" || next.kind !== "code" || block.language !== next.language || !next.code.startsWith(block.code)) {
    return false;
  }
  const code = node.querySelector("code");
  if (code.dataset.isWhole) return false;
  code.firstChild.appendData(next.code.slice(block.code.length));
  if (next.isWhole) colourOnce(code);
  return true;
}
