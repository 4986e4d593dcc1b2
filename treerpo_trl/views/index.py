"""The index of a folder of trees: how the numbers went from step to step, and a link to every step's page."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from html import escape
from pathlib import Path

from .charts import draw_charts
from .document import render_document
from .files import INDEX, all_pages, replacing, step_files, step_path
from .html import MOST_TREES, format_number, link_page, write_page
from .records import read_summary, read_trees
from .summary import Summary
from .text import visible


logger = logging.getLogger(__name__)


def build_index(folder: str | Path) -> Path:
    """Write the folder's `index.html` anew, and link its pages to one another.

    Args:
        folder: Holds `step_000010.parquet` and, beside it, `step_000010.html`, for each step.

    Returns:
        The index.

    Raises:
        FileNotFoundError: There is no such folder, or no step in it.
        ValueError: No step can be read. If some can, the others are named in a warning and left out.
    """
    return _write_index(Path(folder), _read_summaries(Path(folder)))


def refresh(folder: str | Path, rebuild: bool = False, max_trees: int = MOST_TREES) -> tuple[Path, list[int]]:
    """Write every page that is missing or older than its trees, and the index.

    Args:
        folder: See [`build_index`].
        rebuild: Whether to write all pages.
        max_trees: Most trees of a page; see [`~treerpo_trl.views.html.write_page`].

    Returns:
        The index, and the steps whose pages were written.

    Raises:
        FileNotFoundError, ValueError: See [`build_index`].
    """
    folder, written = Path(folder), []
    summaries = _read_summaries(folder)
    for step in summaries:
        trees, page = step_path(folder, step), step_path(folder, step, ".html")
        if not rebuild and page.exists() and page.stat().st_mtime >= trees.stat().st_mtime:
            continue
        try:
            write_page(read_trees(trees), page, title=run_name(folder), max_trees=max_trees)
            written.append(step)
        except ValueError as error:
            logger.warning("left out a page: %s", error)
    return _write_index(folder, summaries), written


def run_name(folder: str | Path) -> str:
    """The name of the run that a folder of trees belongs to: of its output directory."""
    folder = Path(folder).resolve()
    return folder.parent.name if folder.name == "trees" else folder.name


def _read_summaries(folder: Path) -> dict[int, Summary]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; name the one that a run wrote its trees to")
    paths = step_files(folder)
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no trees: there is no step_*.parquet in it; name the folder that a run wrote its trees to"
        )
    summaries = {}
    for step, path in paths.items():
        try:
            summaries[step] = read_summary(path)
        except ValueError as error:
            logger.warning("left out a step: %s", error)
    if not summaries:
        raise ValueError(f"none of the {len(paths)} step_*.parquet files in {folder} could be read")
    return summaries


def _write_index(folder: Path, summaries: Mapping[int, Summary]) -> Path:
    pages = [step for step in summaries if step_path(folder, step, ".html").exists()]
    for previous, step, following in zip([None, *pages], pages, [*pages[1:], None], strict=False):
        for page in all_pages(step_path(folder, step, ".html")):
            link_page(page, previous, following)
    rows = [_row(step, summary, step in set(pages)) for step, summary in reversed(list(summaries.items()))]
    document = render_document(
        "index.html",
        styles=("base.css", "index.css"),
        scripts=(),
        slots={
            "name": "Trees",
            "title": escape(visible(run_name(folder))),
            "charts": draw_charts(summaries),
            "rows": "\n".join(rows),
        },
    )
    with replacing(folder / INDEX) as temporary:
        temporary.write_text(document, encoding="utf-8")
    return folder / INDEX


def _row(step: int, summary: Summary, has_page: bool) -> str:
    name = f'<a href="{step_path("", step, ".html")}">Step {step:,}</a>' if has_page else f"Step {step:,}"
    cells = [
        f"{summary.trees:,}",
        f"{summary.nodes:,}",
        format_number(summary.mean_reward, ".3f"),
        format_number(summary.kept_share, ".0%"),
        format_number(summary.mean_tokens, ",.0f", " tokens"),
    ]
    return f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
