// The page: which tree is looked at, which node is selected, and what every part shows of it.

const UNFOLDED_AT_FIRST = 40; // rows of the outline
const byId = (id) => document.getElementById(id);
const step = JSON.parse(byId("step").textContent);
const { scale } = step;
const trees = new Map(); // place in the page -> tree; read when first looked at
let place = null;

const shared = commonStart(step.trees.map((about) => about.prompt));
const outline = new Outline(byId("outline"), { scale, commonStart: shared, onSelect, onChange: onOutlineChange });
const icicle = new Icicle(byId("icicle"), scale, {
  onSelect: (node) => outline.select(node),
  onPoint: (node) => { byId("pointed").textContent = brief(node ?? outline.selected); },
  onZoom: showZoom,
});

function onSelect(node) {
  icicle.select(node);
  byId("pointed").textContent = brief(node);
  showReader(node);
  showZoom(icicle.top);
  remember(node);
}

function onOutlineChange() {
  const { tree, keptOnly } = outline;
  const filtered = tree.nodes.filter((node) => isShown(node, keptOnly)).length - 1;
  const visible = outline.visible().length - 1;
  byId("shown").textContent = `${visible} of ${count(filtered, "node")} unfolded`;
  byId("empty").hidden = !keptOnly || filtered > 0;
  byId("empty").textContent = "No group of this tree was kept.";
  for (const button of byId("depths").querySelectorAll("button")) {
    const reached = tree.nodes.filter((node) => node.depth <= button.dataset.depth && isShown(node, keptOnly));
    button.setAttribute("aria-pressed", String(visible === reached.length - 1 && reached.every((node) => outline.isVisible(node))));
  }
}

function showTree(newPlace, id = 0) {
  if (newPlace !== place) {
    place = newPlace;
    if (!trees.has(place)) trees.set(place, readTree(place));
    const tree = trees.get(place);
    const about = step.trees[place];
    byId("tree-name").textContent = `Tree ${about.tree}`;
    byId("tree-numbers").textContent = [
      count(about.nodes, "node"),
      count(about.leaves, "leaf", "leaves"),
      `${about.kept} of ${count(about.groups, "group")} kept`,
      step.processes > 1 ? `process ${about.process}` : null,
    ].filter(Boolean).join(" · ");
    byId("icicle").setAttribute("aria-label", `Overview of tree ${about.tree}; the list below holds the same`);
    byId("depths").replaceChildren(
      element("span", { textContent: "Depth" }),
      ...Array.from({ length: tree.maxDepth }, (_, index) => depthButton(index + 1)),
    );
    icicle.show(tree);
    outline.show(tree, firstDepth(tree));
    byId("outline").parentElement.scrollTop = 0;
    for (const link of byId("prompt-list").querySelectorAll("a")) {
      if (Number(link.dataset.place) === place) markPrompt(link);
      else link.removeAttribute("aria-current");
    }
  }
  const node = trees.get(place).nodes[id];
  if (node && node !== outline.selected) outline.select(node, { focus: false });
}

function markPrompt(link) {
  link.setAttribute("aria-current", "true");
  const list = byId("prompts");
  const [item, seen] = [link.getBoundingClientRect(), list.getBoundingClientRect()];
  if (item.bottom > seen.bottom) list.scrollTop += item.bottom - seen.bottom;
  else if (item.top < seen.top) list.scrollTop += item.top - seen.top;
}

// The deepest depth at which the outline is still short.
function firstDepth(tree) {
  let depth = 1;
  const rows = (limit) => tree.nodes.filter((node) => node.depth <= limit).length;
  while (depth < tree.maxDepth && rows(depth + 1) <= UNFOLDED_AT_FIRST) depth += 1;
  return depth;
}

function depthButton(depth) {
  const button = element("button", { type: "button", textContent: depth, title: `unfold to depth ${depth}` });
  button.dataset.depth = depth;
  button.addEventListener("click", () => outline.unfoldTo(depth));
  return button;
}

function showZoom(top) {
  const selected = outline.selected;
  const target = selected && (selected.isLeaf ? selected.up : selected);
  const button = byId("zoom");
  const isZoomed = top.up !== null;
  button.hidden = !isZoomed && (!target || target.up === null);
  button.textContent = isZoomed ? "Zoom out" : `Zoom to ${target?.name}`;
  button.onclick = () => icicle.zoomTo(isZoomed ? outline.tree.root : target);
}

function showReader(node) {
  byId("reader-name").textContent = title(node);
  byId("reader-brief").textContent = [`V ${number(node.value)}`, fate(node), ending(node)].filter(Boolean).join(" · ");
  const values = (node.up?.children ?? []).map((sibling) => sibling.value).filter((value) => value !== null);
  const facts = {
    Value: chip(node.value, scale, ""),
    Advantage: node.up && (node.kept ? signed(node.advantage) : "0 (not trained)"),
    "Group mean": node.up && number(node.group_mean, 4),
    "Group range": values.length ? number(Math.max(...values) - Math.min(...values), 4) : null,
    Group: node.up && `of ${node.up.children.length}, ${node.up.groupKept ? "kept" : values.length ? "pruned" : "without values"}`,
    Reward: node.isLeaf ? (node.reward === null ? "none: no reward function scored it" : String(node.reward)) : null,
    Answer: node.answer && element("span", { className: "answer", textContent: oneLine(node.answer) }),
    Tokens: node.tokens.toLocaleString("en"),
    "Path tokens": node.up && pathTo(node).slice(1).reduce((sum, above) => sum + above.tokens, 0).toLocaleString("en"),
    Rows: node.rows.toLocaleString("en"),
    Origin: origin(node) && ORIGINS[origin(node)],
    State: node.up && (ending(node) ?? "goes on"),
    "Index, depth": `${node.id}, ${node.depth}`,
  };
  byId("facts").replaceChildren(
    ...Object.entries(facts)
      .filter(([, fact]) => fact !== null)
      .flatMap(([name, fact]) => [element("dt", { textContent: name }), element("dd", {}, fact)]),
  );
  byId("path").replaceChildren(...pathTo(node).map((above) => pathItem(above, above === node)));
}

function pathItem(node, isLast) {
  const button = element("button", { type: "button", textContent: title(node) });
  button.addEventListener("click", () => outline.select(node));
  const head = element("div", { className: "head" }, button, chip(node.value, scale));
  if (node.kept) head.append(advantage(node));
  const item = element("li", {}, head, writeNode(element("div", { className: "text" }), node));
  if (isLast) item.setAttribute("aria-current", "true");
  return item;
}

function promptItem(about, index) {
  const file = about.page === step.page ? "" : step.pages[about.page];
  const link = element("a", { href: `${file}#tree=${about.tree}` },
    element("span", { className: "about" },
      element("b", { textContent: `Tree ${about.tree}` }),
      element("span", { textContent: `${about.kept}/${about.groups} kept` }),
      chip(about.value, scale)),
    element("span", { className: "excerpt", textContent: (shared ? "… " : "") + oneLine(about.prompt.slice(shared)) }));
  link.dataset.place = index;
  return element("li", {}, link);
}

// Show the prompts that hold what is searched for and, of them, only those with something to learn from if so asked.
function filterPrompts() {
  const wanted = byId("search").value.trim().toLowerCase();
  const keptOnly = byId("kept-only").checked;
  let found = 0;
  for (const item of byId("prompt-list").children) {
    const about = step.trees[item.firstChild.dataset.place];
    const hit = about.prompt.toLowerCase().includes(wanted) || `tree ${about.tree}` === wanted;
    item.hidden = !hit || (keptOnly && about.kept === 0);
    found += !item.hidden;
  }
  const all = step.trees.length;
  byId("prompt-count").textContent = found === all ? String(all) : `${found} of ${all}`;
}

// The address names the tree and the node, so that it can be shared. Written late: browsers refuse many changes.
let timer = 0;
function remember(node) {
  clearTimeout(timer);
  const address = `#tree=${step.trees[place].tree}${node.up ? `&node=${node.id}` : ""}`;
  timer = setTimeout(() => history.replaceState(null, "", address), 200);
}

function followAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const found = step.trees.findIndex((about) => String(about.tree) === wanted.get("tree"));
  const first = step.trees.findIndex((about) => about.page === step.page);
  if (found < 0) showTree(first);
  else if (step.trees[found].page !== step.page) location.replace(step.pages[step.trees[found].page] + location.hash);
  else if (found > first && !byId(`tree-${found}`)) document.addEventListener("DOMContentLoaded", followAddress, { once: true });
  else showTree(found, Number(wanted.get("node") ?? 0));
}

function start() {
  const isWide = matchMedia("(min-width: 1181px)").matches;
  byId("prompts").open = isWide;
  byId("reader").open = isWide || matchMedia("(min-width: 781px)").matches;
  byId("scale-low").textContent = String(scale.low);
  byId("scale-high").textContent = String(scale.high);
  byId("prompt-list").append(...step.trees.map(promptItem));
  filterPrompts();
  if (step.trees.length === 0) {
    document.body.classList.add("no-trees");
    return;
  }
  byId("search").addEventListener("input", filterPrompts);
  byId("kept-only").addEventListener("change", (event) => {
    icicle.filter(event.target.checked);
    outline.filter(event.target.checked);
    filterPrompts();
  });
  window.addEventListener("hashchange", followAddress);
  followAddress();
}

start();
