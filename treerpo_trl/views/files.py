"""Where trees lie on disk: one parquet file and one page a step, and how a file is replaced in one go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


INDEX = "index.html"
FURTHER = re.compile(r"-\d+$")
STEP_FILE = re.compile(r"step_(\d+)\.parquet")


def step_path(folder: str | Path, step: int, suffix: str = ".parquet") -> Path:
    """The step's file in a folder of trees: its records by default, its page with ".html"."""
    return Path(folder) / f"step_{step:06d}{suffix}"


def step_files(folder: str | Path) -> dict[int, Path]:
    """Step -> its parquet file, in the order of the steps."""
    found = {int(match[1]): path for path in Path(folder).iterdir() if (match := STEP_FILE.fullmatch(path.name))}
    return dict(sorted(found.items()))


def further_page(page: Path, number: int) -> Path:
    """The file of a page of trees: the first page itself, or the one so many after it."""
    return page if number == 1 else page.with_name(f"{page.stem}-{number}{page.suffix}")


def all_pages(page: Path) -> list[Path]:
    """A step's first page and its further ones, as far as they are there, in order."""
    further = [path for path in page.parent.glob(f"{page.stem}-*{page.suffix}") if FURTHER.search(path.stem)]
    return [path for path in (page, *sorted(further, key=lambda path: int(path.stem.split("-")[-1]))) if path.exists()]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to instead of `path`, which takes its place only once all is written.

    A reader, or a run that is killed, never meets half a file. The folder is made if there is none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
