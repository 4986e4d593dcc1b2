// The tree as a list that folds: the WAI-ARIA tree pattern. Items are made when they are first unfolded.

const LONG_TEXT = 260; // characters
const LONG_LINES = 4;
const FOLDED_TEXT = 500; // characters kept in the page of a folded text; three lines never show more

class Outline {
  constructor(list, { scale, commonStart, onSelect, onChange }) {
    Object.assign(this, { list, scale, commonStart, onSelect, onChange, keptOnly: false });
    list.addEventListener("keydown", (event) => this.onKey(event));
    list.addEventListener("click", (event) => this.onClick(event));
  }

  show(tree, depth) {
    this.tree = tree;
    this.selected = null;
    this.wholeTexts = new Set();
    this.unfoldTo(depth);
  }

  // Unfold every node above `depth` and fold the others.
  unfoldTo(depth) {
    this.unfolded = new Set(this.tree.nodes.filter((node) => node.children.length && node.depth < depth));
    this.render();
  }

  filter(keptOnly) {
    this.keptOnly = keptOnly;
    if (this.tree) this.render();
  }

  render() {
    const hadFocus = this.list.contains(document.activeElement);
    this.items = new Map();
    this.list.replaceChildren(this.item(this.tree.root, 1, 1));
    const selected = this.selected ?? this.tree.root;
    this.select(this.isVisible(selected) ? selected : this.visibleAbove(selected), { focus: hadFocus, scroll: false });
    this.onChange();
  }

  item(node, position, siblings) {
    const row = element("div", { className: "row" });
    const facts = element("div", { className: "facts", id: `facts-${node.id}` }, ...this.facts(node));
    const text = element("div", { className: "text", id: `text-${node.id}` });
    row.append(element("span", { className: "caret", textContent: node.children.length ? "▸" : "", "aria-hidden": "true" }));
    row.append(facts, text);
    const item = element("li", { role: "treeitem", tabIndex: -1, "aria-level": node.depth + 1 }, row);
    item.setAttribute("aria-posinset", position);
    item.setAttribute("aria-setsize", siblings);
    item.setAttribute("aria-selected", "false");
    item.setAttribute("aria-labelledby", `${facts.id} ${text.id}`);
    item.dataset.node = node.id;
    item.classList.toggle("pruned", node.up !== null && !node.kept);
    this.items.set(node, item);
    if (node.text.length > LONG_TEXT || node.text.split("\n").length > LONG_LINES) {
      row.append(element("button", { type: "button", className: "more", tabIndex: -1 }));
    }
    this.writeText(node);
    if (node.children.length) {
      item.append(element("ul", { role: "group", className: node.groupKept ? "kept" : "pruned", hidden: true }));
      item.setAttribute("aria-expanded", "false");
      if (this.unfolded.has(node)) this.open(node);
    }
    return item;
  }

  facts(node) {
    const span = (className, textContent, title = "") => element("span", { className, textContent, title });
    const parts = [chip(node.value, this.scale), span("name", node.name)];
    if (origin(node)) parts.push(span("flag", origin(node), ORIGINS[origin(node)]));
    if (node.up) {
      parts.push(node.kept ? advantage(node) : span("flag", fate(node)));
      parts.push(span("muted mean", `μ ${number(node.group_mean)}`, "mean value of the group"));
    }
    parts.push(span("muted", `${node.tokens.toLocaleString("en")} tok`));
    if (node.rows > 1) parts.push(span("muted", count(node.rows, "row"), "rows of the batch that pass through this node"));
    if (ending(node)) parts.push(span(node.truncated ? "flag warn" : "flag", ending(node)));
    if (node.isLeaf) {
      parts.push(span("reward", node.reward === null ? "no reward" : `reward ${number(node.reward)}`));
      if (node.answer !== null) {
        parts.push(element("span", {}, span("muted", "answer "), span("answer", oneLine(node.answer))));
      }
    }
    return parts;
  }

  writeText(node) {
    const row = this.items.get(node).firstChild;
    const button = row.querySelector(".more");
    const folded = button !== null && !this.wholeTexts.has(node);
    const text = row.querySelector(".text");
    text.classList.toggle("folded", folded);
    if (folded) write(text, this.excerpt(node));
    else writeNode(text, node);
    if (button) button.textContent = folded ? "Show all" : "Show less";
  }

  // What a folded text shows: of a prompt, what the others do not begin with as well.
  excerpt(node) {
    const start = node.up ? 0 : this.commonStart;
    return (start ? "… " : "") + node.text.slice(start, start + FOLDED_TEXT);
  }

  toggleText(node) {
    if (!this.items.get(node).querySelector(":scope > .row > .more")) return;
    if (!this.wholeTexts.delete(node)) this.wholeTexts.add(node);
    this.writeText(node);
  }

  open(node) {
    this.unfolded.add(node);
    const item = this.items.get(node);
    item.setAttribute("aria-expanded", "true");
    const group = item.lastChild;
    group.hidden = false;
    if (group.childElementCount) return;
    const shown = node.children.filter((child) => isShown(child, this.keptOnly));
    group.append(...shown.map((child, index) => this.item(child, index + 1, shown.length)));
  }

  close(node) {
    this.unfolded.delete(node);
    const item = this.items.get(node);
    item.setAttribute("aria-expanded", "false");
    item.lastChild.hidden = true;
  }

  toggle(node) {
    if (this.unfolded.has(node)) this.close(node);
    else this.open(node);
    this.onChange();
  }

  // Select a node, unfolding what lies above it.
  select(node, { focus = true, scroll = true } = {}) {
    for (const above of pathTo(node.up)) if (!this.unfolded.has(above)) this.open(above);
    if (this.selected) this.mark(this.selected, false);
    this.selected = node;
    this.mark(node, true);
    const item = this.items.get(node);
    if (focus) item.focus({ preventScroll: true });
    if (scroll) item.firstChild.scrollIntoView({ block: "nearest" });
    this.onSelect(node);
  }

  mark(node, isSelected) {
    const item = this.items.get(node);
    if (!item) return;
    item.setAttribute("aria-selected", String(isSelected));
    item.tabIndex = isSelected ? 0 : -1;
  }

  isVisible(node) {
    return pathTo(node).every((above) => isShown(above, this.keptOnly) && (above === node || this.unfolded.has(above)));
  }

  visibleAbove(node) {
    return pathTo(node).findLast((above) => this.isVisible(above));
  }

  // Nodes that can be seen, from top to bottom.
  visible(node = this.tree.root) {
    const children = this.unfolded.has(node) ? node.children.filter((child) => isShown(child, this.keptOnly)) : [];
    return [node, ...children.flatMap((child) => this.visible(child))];
  }

  onClick(event) {
    const item = event.target.closest("[role=treeitem]");
    if (!item) return;
    const node = this.tree.nodes[item.dataset.node];
    if (event.target.closest(".more")) this.toggleText(node);
    const onCaret = event.target.closest(".caret") && node.children.length > 0;
    if (onCaret) this.toggle(node);
    // Marking text with the mouse is no choice of a node.
    if (onCaret || getSelection().isCollapsed) this.select(node, { scroll: false });
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const node = this.selected;
    const visible = this.visible();
    const here = visible.indexOf(node);
    const move = (target) => target && this.select(target);
    const isOpen = this.unfolded.has(node);
    const actions = {
      ArrowDown: () => move(visible[here + 1]),
      ArrowUp: () => move(visible[here - 1]),
      ArrowRight: () => (isOpen ? move(visible[here + 1]) : node.children.length && this.toggle(node)),
      ArrowLeft: () => (isOpen ? this.toggle(node) : move(node.up)),
      Home: () => move(visible[0]),
      End: () => move(visible.at(-1)),
      Enter: () => (node.children.length ? this.toggle(node) : this.toggleText(node)),
      " ": () => this.toggleText(node),
      "*": () => this.openSiblings(node),
    };
    if (event.key in actions) actions[event.key]();
    else if (event.key.length === 1) move(this.startingWith(event.key, visible, here));
    else return;
    event.preventDefault();
  }

  openSiblings(node) {
    for (const sibling of node.up ? node.up.children : [node]) {
      if (sibling.children.length && this.items.has(sibling)) this.open(sibling);
    }
    this.onChange();
  }

  startingWith(character, visible, here) {
    const wanted = character.toLowerCase();
    const following = [...visible.slice(here + 1), ...visible.slice(0, here)];
    return following.find((node) => node.text.trimStart().toLowerCase().startsWith(wanted));
  }
}
