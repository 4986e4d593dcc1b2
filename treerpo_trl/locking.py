"""One run at a time in an output folder, whose checkpoints another run would delete or take for its own."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


if sys.platform != "win32":
    import fcntl

LOCK = "_treerpo.lock"  # a name with an underscore is not pushed to the Hub


@contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process. The system lets go of it when the process ends, whatever it dies of.

    Where files cannot be locked (Windows, some network file systems), nothing is held.

    Args:
        folder: A run's output folder; it is made if need be.

    Raises:
        RuntimeError: Another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_locked(path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_locked(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise RuntimeError(
                f"output_dir '{path.parent}' is in use: {holder} is training there, and the checkpoints and logs of "
                "both would be mixed. Give each run an output_dir of its own, or end the other one first"
            ) from error
        except OSError:  # the file system has no locks
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the run before deleted it on its way out
