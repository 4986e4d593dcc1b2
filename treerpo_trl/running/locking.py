"""One run at a time in an output folder, whose checkpoints another run would delete or take for its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


fcntl: Any
try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

LOCK = "_treerpo.lock"  # a name with an underscore is not pushed to the Hub


@contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process. The system lets go of it when the process ends, whatever it dies of.

    Where files cannot be locked (Windows, some network file systems), nothing is held.

    Args:
        folder: A run's output folder; it is made if need be.

    Raises:
        RuntimeError: Another process holds it.
        OSError: It cannot be written to.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    except OSError as error:
        raise _not_writable(folder, error) from error
    with file:
        try:
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            except OSError as error:
                raise _not_writable(folder, error) from error
            yield
        finally:
            with suppress(OSError):  # of a run that is over, which another error may have ended
                path.unlink()


def _not_writable(folder: str | Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"output_dir '{folder}' cannot be written to ({error.strerror}); checkpoints and logs would be lost. Make "
        "room or set permissions there, or use another folder",
    )


def _open_locked(path: Path) -> IO[bytes]:
    while True:
        file = path.open("ab+", buffering=0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().decode() or "another process"
            file.close()
            raise RuntimeError(
                f"output_dir '{path.parent}' is in use: {holder} is training there, and the checkpoints and logs of "
                "both would be mixed. Give each run an output_dir of its own, or end the other one first"
            ) from error
        except OSError:  # the file system has no locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the run before deleted it on its way out
