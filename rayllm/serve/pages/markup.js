// Code colours and formulas: the server is asked for data once a block is whole, and nodes are made of that here.
// What a model wrote becomes text nodes; tags and classes come from the lists below alone.

import { postJson } from "./api.js";
import { h, math } from "./dom.js";

const WAIT_MS = 30; // formulas that appear together are asked for together
const MAX_FORMULAS = 64; // in one request
const MAX_LATEX_CHARACTERS = 4000;
const MAX_CODE_CHARACTERS = 64 * 1024;
const MAX_KNOWN = 500;
const PAUSE_MS = 5000; // after a refusal or a server that is away
const KINDS = new Set([..."cknftdbsix"]);
const TAGS = new Set(
  "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd mstyle mpadded mphantom mmultiscripts mprescripts none menclose".split(" "),
);
const ATTRIBUTES = new Set(
  "display mathvariant displaystyle scriptlevel stretchy fence separator form lspace rspace accent accentunder linethickness columnalign rowalign rowspacing columnspacing columnlines rowlines frame minsize maxsize symmetric largeop movablelimits width height depth voffset mathcolor notation".split(" "),
);

/** What the server said, the newest last; null where it could make nothing of it. */
class Known {
  #found = new Map();

  get(key) {
    return this.#found.get(key);
  }

  set(key, value) {
    this.#found.delete(key);
    this.#found.set(key, value);
    if (this.#found.size > MAX_KNOWN) this.#found.delete(this.#found.keys().next().value);
  }
}

let pausedUntil = 0;

/** Asks; undefined where no answer came, and then nothing is asked for a while. */
async function ask(path, body) {
  if (performance.now() < pausedUntil) return undefined;
  try {
    return await postJson(path, body);
  } catch {
    pausedUntil = performance.now() + PAUSE_MS;
    return undefined;
  }
}

// ------------------------------------------------------------------------------------------------------ formulas

const trees = new Known();
const wanted = new Map(); // key -> {latex, display, nodes}
let timer = null;

/** A formula: its source until the server has said how it looks. `source` is how the model wrote it, with its marks. */
export function formula(latex, display, source) {
  const node = h("span", { class: display ? "formula block" : "formula" }, h("code", {}, source));
  const key = `${display}:${latex}`;
  const tree = trees.get(key);
  if (tree !== undefined) showFormula(node, tree);
  else if (latex.length <= MAX_LATEX_CHARACTERS) {
    if (!wanted.has(key)) wanted.set(key, { latex, display, nodes: [] });
    wanted.get(key).nodes.push(node);
    timer ??= setTimeout(askForFormulas, WAIT_MS);
  }
  return node;
}

async function askForFormulas() {
  timer = null;
  const batch = [...wanted].slice(0, MAX_FORMULAS);
  for (const [key] of batch) wanted.delete(key);
  if (wanted.size) timer = setTimeout(askForFormulas, 0);
  const answer = await ask("markup/formulas", { formulas: batch.map(([, { latex, display }]) => ({ latex, display })) });
  if (!answer) return;
  batch.forEach(([key, { nodes }], i) => {
    trees.set(key, answer.formulas[i]);
    for (const node of nodes) showFormula(node, answer.formulas[i]);
  });
}

function showFormula(node, tree) {
  const drawn = tree && mathNode(tree);
  if (!drawn) return;
  drawn.setAttribute("aria-label", node.textContent);
  node.replaceChildren(drawn);
  if (node.classList.contains("block")) Object.assign(node, { tabIndex: 0 }).setAttribute("role", "group");
}

function mathNode(tree) {
  if (typeof tree === "string") return document.createTextNode(tree);
  const [tag, attributes, children] = tree;
  if (!TAGS.has(tag)) return document.createTextNode("");
  const allowed = Object.entries(attributes).filter(([name]) => ATTRIBUTES.has(name));
  return math(tag, Object.fromEntries(allowed), ...children.map(mathNode));
}

// ---------------------------------------------------------------------------------------------------------- code

const colours = new Known();

/** Colours a code element whose text is whole. */
export async function colour(node, language) {
  const code = node.textContent;
  if (!language || !code || code.length > MAX_CODE_CHARACTERS) return;
  const key = `${language}\n${code}`;
  let tokens = colours.get(key);
  if (tokens === undefined) {
    const answer = await ask("markup/code", { language, code });
    if (!answer) return;
    tokens = answer.tokens;
    colours.set(key, tokens);
  }
  if (!tokens || node.textContent !== code || tokens.map(([, text]) => text).join("") !== code) return;
  node.replaceChildren(...tokens.map(([kind, text]) => (KINDS.has(kind) ? h("span", { class: `code-${kind}` }, text) : document.createTextNode(text))));
}
