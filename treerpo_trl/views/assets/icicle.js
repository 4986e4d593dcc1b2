// The tree at a glance: a row a depth, each node as wide as its share of the rows, in the colour of its value.

const ROW_HEIGHT = 24; // pixels
const MARGIN = 54; // pixels, for the depths
const LABEL_WIDTH = 34; // pixels a number needs
const THIN = 4; // pixels below which a cell has no room for a border

class Icicle {
  constructor(box, scale, { onSelect, onPoint, onZoom }) {
    Object.assign(this, { box, scale, onSelect, onPoint, onZoom, keptOnly: false });
    box.addEventListener("click", (event) => this.act(event, onSelect));
    box.addEventListener("dblclick", (event) => this.act(event, (node) => this.zoomTo(node)));
    box.addEventListener("mouseover", (event) => this.act(event, onPoint));
    box.addEventListener("mouseleave", () => onPoint(null));
    new ResizeObserver(() => this.tree && box.clientWidth !== this.width && this.render()).observe(box);
  }

  act(event, action) {
    const cell = event.target.closest(".cell");
    if (cell) action(this.tree.nodes[cell.dataset.node]);
  }

  show(tree) {
    this.tree = tree;
    this.selected = this.top = tree.root;
    this.zoomTo(tree.root);
  }

  // Let a node, or a leaf's parent, take the whole width.
  zoomTo(node) {
    this.top = node.isLeaf ? node.up : node;
    this.render();
    this.onZoom(this.top);
  }

  filter(keptOnly) {
    this.keptOnly = keptOnly;
    if (this.tree) this.render();
  }

  select(node) {
    this.selected = node;
    const path = pathTo(node);
    if (!path.includes(this.top) && !pathTo(this.top).includes(node)) this.zoomTo(this.tree.root);
    else this.mark(path);
  }

  mark(path) {
    for (const cell of this.box.querySelectorAll(".path, .selected")) cell.classList.remove("path", "selected");
    for (const node of path) this.cells.get(node)?.classList.add(node === this.selected ? "selected" : "path");
  }

  render() {
    const { tree, top } = this;
    this.width = this.box.clientWidth;
    this.cells = new Map();
    const above = pathTo(top.up);
    const below = tree.nodes.filter((node) => node.depth >= top.depth && pathTo(node).includes(top));
    const shown = [...above, ...below].filter((node) => isShown(node, this.keptOnly));
    const depths = Array.from({ length: tree.maxDepth + 1 }, (_, depth) => this.depthLabel(depth));
    this.box.replaceChildren(...depths, ...shown.map((node) => this.cell(node)));
    this.box.style.height = `${(tree.maxDepth + 1) * ROW_HEIGHT}px`;
    this.mark(pathTo(this.selected));
  }

  cell(node) {
    const { top } = this;
    const room = Math.max(this.width - MARGIN, 0);
    const isAbove = node.depth < top.depth;
    const left = isAbove ? 0 : ((node.start - top.start) / top.rows) * room;
    const width = isAbove ? room : (node.rows / top.rows) * room;
    const cell = colour(element("div", { className: "cell" }), node.value, this.scale);
    cell.classList.add(width < THIN ? "thin" : "wide");
    cell.classList.toggle("faded", node.up !== null && !node.kept);
    cell.dataset.node = node.id;
    Object.assign(cell.style, {
      left: `${MARGIN + left}px`,
      top: `${node.depth * ROW_HEIGHT}px`,
      width: `${width}px`,
      height: `${ROW_HEIGHT - 1}px`,
      lineHeight: `${ROW_HEIGHT - 1}px`,
    });
    if (width >= LABEL_WIDTH) cell.textContent = number(node.value);
    this.cells.set(node, cell);
    return cell;
  }

  depthLabel(depth) {
    const label = element("span", { className: "depth", textContent: depth === 0 ? "Prompt" : `Depth ${depth}` });
    Object.assign(label.style, { top: `${depth * ROW_HEIGHT}px`, lineHeight: `${ROW_HEIGHT - 1}px` });
    return label;
  }
}
