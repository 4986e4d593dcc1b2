"""A Hugging Face Hub on this machine, for the real client: `HF_ENDPOINT` of a new process is set to its address.

It speaks what the client says when it pushes, lists and downloads models and datasets: repositories, commits, LFS and
xet tokens. Its xet store is the one that the client's own library keeps for local tests. What it does not do: other
branches, pull requests, pages of long listings, the tags that the Hub reads from a card, and the Hub's check of a
card's metadata (it accepts any, and keeps what it was asked).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

from local_hub_http import Handler
from local_hub_store import Store
from places import ROOT


@dataclass
class Failure:
    """Answers to requests whose method, path and commit title match `pattern`, one for each of `statuses`."""

    pattern: str
    statuses: list[int]


@dataclass
class LocalHub(Store):
    """A Hub that is told what to refuse and remembers what it was asked.

    Attributes:
        users: Name by access token.
        failures: Requests that shall fail.
        requests: (method and path, user or None, status) of each request.
        cards: What it was asked to validate.
        unknown: Requests that it has no answer for.
    """

    folder: Path
    users: dict[str, str] = field(default_factory=lambda: {"hf_of_me": "me"})
    failures: list[Failure] = field(default_factory=list)
    requests: list[tuple[str, str | None, int]] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    url: str = ""
    storage_url: str = ""  # of another host, as storage is, so that the client sends no token there

    def __post_init__(self) -> None:
        super().__init__(self.folder)
        self.lock = Lock()

    @contextmanager
    def serving(self) -> Iterator["LocalHub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        server.daemon_threads = True
        self.url, self.storage_url = f"http://127.0.0.1:{server.server_port}", f"http://localhost:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def read(self, name: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        return self.content(self.repos[kind, name].at(revision).files[path])

    def titles(self, name: str) -> list[str]:
        return [commit.title for commit in self.repos["models", name].commits]

    def environment(self, folder: Path, token: str | None = "hf_of_me", with_xet: bool = True) -> dict[str, str]:
        """The environment of a process whose Hub this is, with caches of its own in `folder`."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        own |= {"HF_TOKEN": token} if token else {}
        return {**others, **own} if with_xet else {**others, **own, "HF_HUB_DISABLE_XET": "1"}
