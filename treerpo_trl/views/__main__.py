"""Pages of a run's trees: `python -m treerpo_trl.views OUTPUT_DIR/trees`; `--serve` serves them too."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .files import step_files
from .html import MOST_TREES
from .index import refresh
from .serve import make_server


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, say where they are, and serve them if asked to; the exit status."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    folder = _trees_folder(args.folder)
    try:
        index, written = refresh(folder, args.rebuild, args.max_trees)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(written)} of {len(step_files(folder))} pages written; open {index.resolve()}", flush=True)
    return _serve(folder, args) if args.serve else 0


def _serve(folder: Path, args: argparse.Namespace) -> int:
    try:
        server = make_server(folder, args.host, args.port, args.max_trees)
    except OSError as error:
        print(
            f"error: cannot listen at {args.host}, port {args.port}: {error}; choose another --port (0 finds one)",
            file=sys.stderr,
        )
        return 1
    with server:
        print(f"serving http://{args.host}:{server.server_port}/ until Ctrl+C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def _trees_folder(folder: Path) -> Path:
    """The folder itself or, of a run's output directory, its trees."""
    inner = folder / "trees"
    return inner if inner.is_dir() and not step_files(folder) else folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m treerpo_trl.views",
        description="Write a page for each step that a run logged trees of, and an index of them.",
    )
    parser.add_argument("folder", type=Path, help="where the run wrote its trees, OUTPUT_DIR/trees (or OUTPUT_DIR)")
    parser.add_argument("--rebuild", action="store_true", help="write all pages, not only missing and outdated ones")
    parser.add_argument(
        "--max-trees",
        type=int,
        default=MOST_TREES,
        metavar="N",
        help="trees of a page, most trained nodes first; the others are on further pages (default: %(default)s)",
    )
    parser.add_argument("--serve", action="store_true", help="serve the pages too; new steps show when reloading")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to serve at; 0 finds a free one (default: 8000)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
