// A tree as the page's data give it, and small helpers. Text of a model only ever becomes textContent.

// Characters that do not print, a line's end aside: controls, joiners, marks of direction, what Unicode leaves open.
const UNPRINTABLE = /\n|[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;
const NAMED = { "\t": "\\t", "\r": "\\r" };

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Fill an element with a node's text, what tools answered set apart.
function writeNode(target, node) {
  if (!node.pieces) return write(target, node.text);
  target.replaceChildren(
    ...node.pieces.map((piece, index) => write(element("span", { className: index % 2 ? "tools" : "model" }), piece)));
  return target;
}

// Fill an element with what a model wrote.
function write(target, text) {
  target.replaceChildren();
  let start = 0;
  for (const { 0: character, index } of text.matchAll(UNPRINTABLE)) {
    target.append(text.slice(start, index));
    start = index + character.length;
    if (character === "\n") target.append(element("span", { className: "newline", textContent: "\n" }));
    else target.append(element("span", { className: "control", textContent: escaped(character) }));
  }
  target.append(text.slice(start));
  return target;
}

function escaped(character) {
  const code = character.codePointAt(0).toString(16);
  return NAMED[character] ?? (code.length <= 2 ? `\\x${code.padStart(2, "0")}` : `\\u{${code}}`);
}

// The text on one line, for places that hold no elements.
function oneLine(text) {
  return text.replace(UNPRINTABLE, (character) => (character === "\n" ? " " : escaped(character)));
}

function number(value, digits = 2) {
  return value === null ? "none" : String(value.toFixed(digits)).replace(/^-(0\.0*)$/, "$1");
}

function signed(value) {
  const text = number(value);
  return value > 0 ? `+${text}` : text.replace("-", "−");
}

function count(many, one, several = `${one}s`) {
  return `${many.toLocaleString("en")} ${many === 1 ? one : several}`;
}

// Give an element a value's colour: orange at the scale's low end, blue at its high end.
function colour(target, value, scale) {
  target.classList.add("value");
  if (value === null) {
    target.classList.add("none");
    return target;
  }
  const share = Math.min(Math.max((value - scale.low) / (scale.high - scale.low), 0), 1);
  target.classList.add(share < 0.5 ? "low" : "high");
  target.style.setProperty("--much", Math.abs(2 * share - 1).toFixed(3));
  return target;
}

function chip(value, scale, prefix = "V ") {
  return colour(element("span", { className: "chip", textContent: `${prefix}${number(value)}` }), value, scale);
}

function advantage(node) {
  const sign = node.advantage > 0 ? " plus" : node.advantage < 0 ? " minus" : "";
  return element("span", { className: `advantage${sign}`, textContent: `A ${signed(node.advantage)}` });
}

// Read a tree of the page. Nodes stand before their children; `start` and `rows` say where a node lies among the rows.
function readTree(place) {
  const columns = JSON.parse(document.getElementById(`tree-${place}`).textContent);
  const nodes = columns.text.map((text, id) => {
    const node = { id, children: [] };
    for (const [name, values] of Object.entries(columns)) node[name] = values[id];
    return node;
  });
  const [root] = nodes;
  Object.assign(root, { name: "Prompt", start: 0, up: null });
  for (const node of nodes.slice(1)) {
    const parent = nodes[node.parent];
    const before = parent.children.at(-1);
    parent.children.push(node);
    node.up = parent;
    node.name = (parent === root ? "" : `${parent.name}.`) + parent.children.length;
    node.start = before ? before.start + before.rows : parent.start;
  }
  for (const node of nodes.toReversed()) {
    node.isLeaf = node !== root && node.children.length === 0;
    node.groupKept = node.children.some((child) => child.kept);
    node.keptBelow = node.groupKept || node.children.some((child) => child.keptBelow);
  }
  return { nodes, root, maxDepth: Math.max(...nodes.map((node) => node.depth)) };
}

// Whether the filter lets a node through: it is in a kept group, or on the way to one.
function isShown(node, keptOnly) {
  return !keptOnly || node.up === null || node.up.groupKept || node.keptBelow;
}

// How much all texts begin with, up to the end of a word: a chat template, a system prompt. 0 if a text has no more.
function commonStart(texts) {
  let length = texts.length > 1 ? Math.min(...texts.map((text) => text.length)) : 0;
  while (!texts.every((text) => text.startsWith(texts[0].slice(0, length)))) length -= 1;
  while (length > 0 && !/[\s>]/.test(texts[0][length - 1])) length -= 1;
  return texts.some((text) => text.length === length) ? 0 : length;
}

function pathTo(node) {
  return node === null ? [] : [...pathTo(node.up), node];
}

function fate(node) {
  if (node.up === null) return null;
  if (node.kept) return "kept";
  return node.value === null ? "no value" : "pruned";
}

function ending(node) {
  if (node.truncated) return "truncated";
  return node.ended ? "ended" : null;
}

const ORIGINS = {
  "as drawn": "drawn with its parent as one, before a fork cut them apart",
  fork: "a new continuation, drawn from where its parent ends",
};

// Where a fork cut a response in two: the rest of it, as it was drawn first, or a continuation that forks off there.
function origin(node) {
  if (node.is_rest) return "as drawn";
  return node.up?.children.some((sibling) => sibling.is_rest) ? "fork" : null;
}

function title(node) {
  return node.up ? `Node ${node.name}` : "Prompt";
}

// What an element's tooltip, or the line below the overview, says of a node.
function brief(node) {
  return [
    title(node),
    `V ${number(node.value)}`,
    node.kept ? `A ${signed(node.advantage)}` : fate(node),
    origin(node),
    count(node.tokens, "token"),
    ending(node),
    node.answer === null ? null : `answer ${oneLine(node.answer)}`,
  ].filter((part) => part !== null).join(" · ");
}
