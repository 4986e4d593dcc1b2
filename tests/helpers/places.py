"""Where things are: folders of the repository, and a port that nobody uses."""

import socket
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
HELPERS = ROOT / "tests" / "helpers"
PROCESSES = ROOT / "tests" / "processes"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port
