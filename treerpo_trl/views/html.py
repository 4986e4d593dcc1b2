"""A step's trees as self-contained pages: each tree at a glance, its steps to fold and unfold, their texts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .document import render_document, script_json
from .files import INDEX, all_pages, further_page, replacing, step_path
from .summary import Record, Summary, by_tree, summarise
from .text import visible


SCRIPTS = ("tree.js", "outline.js", "icicle.js", "page.js")
# What the page shows of a node; token ids stay in the parquet file.
SHOWN_COLUMNS = ("parent", "depth", "text", "ended", "truncated", "value", "group_mean", "advantage", "kept", "reward",
                 "answer", "rows", "is_rest", "pieces")  # fmt: skip
MOST_TREES = 16  # of a page: a tree of 584 nodes and 384-token steps takes about a megabyte
LINKS = re.compile(r"<!--links-->.*?<!--/links-->", re.DOTALL)


def render_page(records: Sequence[Record], *, title: str, max_trees: int | None = None) -> str:
    """The first page of one step; see [`render_pages`].

    Returns:
        An HTML document that needs no other file.
    """
    return next(render_pages(records, title=title, max_trees=max_trees))


def render_pages(
    records: Sequence[Record], *, title: str, max_trees: int | None = None, first_page: Path | None = None
) -> Iterator[str]:
    """The pages of one step: all its trees, those with most trained nodes first. Each page lists and links them all.

    Args:
        records: Of [`~treerpo_trl.views.tree_records`], of one step and of all processes; may be empty.
        title: What the trees are of, such as the run's name.
        max_trees: Most trees of a page; by default there is one page. The numbers on it are of all trees in any case.
        first_page: Where the first page will be; by default that of the step in any folder.

    Raises:
        ValueError: The records are of several steps, or not of whole trees.
    """
    steps = sorted({record["step"] for record in records})
    if len(steps) > 1:
        raise ValueError(f"a page shows one step, got records of steps {steps}; write one page for each")
    trees = sorted(by_tree(records).items(), key=lambda tree: -sum(node["kept"] for node in tree[1]))
    size = max(max_trees or len(trees), 1)
    num_pages = max(-(-len(trees) // size), 1)
    first_page = first_page or step_path("", steps[0] if steps else 0, ".html")
    step = {
        "scale": _scale(records),
        "processes": len({record["process"] for record in records}),
        "pages": [further_page(first_page, number).name for number in range(1, num_pages + 1)],
        "trees": [{"page": place // size, **_about(tree, nodes)} for place, (tree, nodes) in enumerate(trees)],
    }
    summary = summarise(nodes for _, nodes in trees)
    name = f"Step {steps[0]:,}" if steps else "No trees"
    for page in range(num_pages):
        shown = range(page * size, min((page + 1) * size, len(trees)))
        blocks = [
            f'<script type="application/json" id="tree-{place}">{script_json(_columns(trees[place][1]))}</script>'
            for place in shown
        ]
        yield render_document(
            "page.html",
            styles=("base.css", "page.css"),
            scripts=SCRIPTS,
            slots={
                "name": name,
                "title": escape(visible(title)),
                "numbers": _numbers(summary, shown),
                "step": script_json({**step, "page": page}),
                # The script stands after the first tree, and draws it while a browser still reads the others.
                "first_tree": "\n".join(blocks[:1]),
                "other_trees": "\n".join(blocks[1:]),
            },
        )


def write_page(records: Sequence[Record], path: str | Path, *, title: str, max_trees: int | None = MOST_TREES) -> None:
    """Write a step's page to a file and, where there are more trees than fit, further pages beside it.

    A file is written in one go, the first page last. [`~treerpo_trl.views.build_index`] adds links to the neighbours.

    Args:
        records, title, max_trees: See [`render_pages`].
        path: The first page. The others are called so with "-2", "-3" and so on at the end.
    """
    path = Path(path)
    pages = render_pages(records, title=title, max_trees=max_trees, first_page=path)
    first, number = next(pages), 1
    for number, page in enumerate(pages, start=2):
        _write(page, further_page(path, number))
    for old in all_pages(path):
        if old != path and int(old.stem.split("-")[-1]) > number:
            old.unlink()
    _write(first, path)


def _write(page: str, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def link_page(path: Path, previous: int | None, following: int | None) -> None:
    """Let a page lead to the index and to its neighbours' pages; a page that does already stays as it is.

    Args:
        path: A page of [`write_page`].
        previous, following: Steps that have pages beside this one; `None` at either end.
    """
    links = [f'<a href="{INDEX}">All steps</a>']
    if previous is not None:
        links.insert(0, f'<a rel="prev" href="{step_path("", previous, ".html")}">← Step {previous:,}</a>')
    if following is not None:
        links.append(f'<a rel="next" href="{step_path("", following, ".html")}">Step {following:,} →</a>')
    block = f'<!--links--><nav aria-label="Steps">{" ".join(links)}</nav><!--/links-->'
    with path.open(encoding="utf-8") as page:
        # They stand before any tree, so the first one found is the template's.
        if block in page.read(1 << 16):
            return
    text, found = LINKS.subn(lambda _: block, path.read_text(encoding="utf-8"), count=1)
    if not found:
        return
    written = path.stat()
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        # Its age tells whether the page is older than its trees.
        os.utime(temporary, ns=(written.st_atime_ns, written.st_mtime_ns))


def _numbers(summary: Summary, shown: range) -> str:
    here = f" ({shown.start + 1:,} to {shown.stop:,} on this page)" if len(shown) < summary.trees else ""
    numbers = {
        "Trees": f"{summary.trees:,}{here}",
        "Nodes": f"{summary.nodes:,}",
        "Mean reward": format_number(summary.mean_reward, ".3f"),
        "Groups kept": format_number(summary.kept_share, ".0%"),
        "Mean completion": format_number(summary.mean_tokens, ",.0f", " tokens"),
    }
    return "".join(f"<div><dt>{name}</dt><dd>{number}</dd></div>" for name, number in numbers.items())


def format_number(number: float | None, spec: str, unit: str = "") -> str:
    """A number as pages show it; a dash if there is none."""
    return "–" if number is None else f"{number:{spec}}{unit}"


def _about(tree: int, nodes: Sequence[Record]) -> dict[str, Any]:
    """What the list of prompts says of a tree."""
    summary, root = summarise([nodes]), nodes[0]
    return {
        "tree": tree,
        "process": root["process"],
        "prompt": root["text"],
        "value": _rounded(root["value"]),
        "nodes": summary.nodes,
        "leaves": summary.leaves,
        "groups": summary.groups,
        "kept": summary.kept_groups,
    }


def _columns(nodes: Sequence[Record]) -> dict[str, list[Any]]:
    columns = {name: [_rounded(node[name]) for node in nodes] for name in SHOWN_COLUMNS}
    return {**columns, "tokens": [node["num_tokens"] for node in nodes]}


def _rounded(value: Any) -> Any:
    """Six digits are more than a page shows; JSON has no infinities."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def _scale(records: Iterable[Record]) -> dict[str, float]:
    """The values that the colours run between: 0 and 1, unless rewards leave that interval."""
    values = [value for record in records if (value := _rounded(record["value"])) is not None]
    if all(0 <= value <= 1 for value in values):
        return {"low": 0, "high": 1}
    low, high = min(values), max(values)
    return {"low": low, "high": high if high > low else low + 1}
