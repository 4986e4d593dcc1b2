"""A folder of trees over HTTP, its pages and index brought up to date whenever the index is asked for."""

from __future__ import annotations

import logging
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .files import INDEX
from .html import MOST_TREES
from .index import refresh


logger = logging.getLogger(__name__)


def make_server(folder: str | Path, host: str, port: int, max_trees: int = MOST_TREES) -> ThreadingHTTPServer:
    """A server of the folder; `serve_forever` runs it.

    Args:
        folder: See [`~treerpo_trl.views.build_index`].
        host: Address to listen at.
        port: 0 picks a free one.
        max_trees: Most trees of a page.

    Raises:
        OSError: The address cannot be listened at.
    """
    handler = partial(_Handler, directory=str(folder), max_trees=max_trees)
    return ThreadingHTTPServer((host, port), handler)


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, max_trees: int, **kwargs: Any):
        self.max_trees = max_trees
        super().__init__(*args, **kwargs)

    def send_head(self) -> Any:
        """Look for new steps before the index is sent."""
        if self.path.split("?")[0] in ("/", f"/{INDEX}"):
            try:
                refresh(self.directory, max_trees=self.max_trees)
            except (OSError, ValueError) as error:
                logger.warning("the index stays as it was: %s", error)
        return super().send_head()

    def end_headers(self) -> None:
        """Let no browser keep a page that a later step changes."""
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Only errors are worth a line."""

    def log_error(self, format: str, *args: Any) -> None:
        """As upstream's, which `log_message` above would swallow."""
        logger.warning(format, *args)
