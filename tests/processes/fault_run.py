"""What `test_faults_process.py` runs: the scenarios of `resume_run.py`, then runs that meet in one output folder, and
one that hangs until it is interrupted.

python tests/processes/fault_run.py MODEL_PATH FOLDER NAME=SCENARIO ...

Runs that meet write to FOLDER/meetings/NAME.txt what a user would see; how each ended is in FOLDER/meetings/ends.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import resume_run
from resume_run import Scenario, fork, train

from treerpo_trl.running.locking import LOCK


PATIENCE = 60  # seconds
KILL = ["in the second backward", 4]


def start(model_path: str, folder: Path, log: str, resume: bool | None = None, **scenario: Any) -> int:
    kill = KILL if scenario else None
    return fork(
        lambda: train(Scenario(**scenario), model_path, folder, resume, kill, rank=0), folder.parent / f"{log}.txt"
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def end_of(process: int) -> dict[str, float]:
    """Exit status, and the seconds until it came."""
    begin = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return {"status": status, "seconds": time.monotonic() - begin}


def meet(model_path: str, output_dir: Path) -> None:
    folder = output_dir / "runs"
    folder.mkdir(parents=True)
    lock, ends = folder / "out" / LOCK, {}
    # The first goes on, as if nothing had been, after the second has failed.
    first = start(model_path, folder, "first", fault="wait")
    wait_for(folder / "waiting")
    holder = lock.read_text()
    ends["second"] = end_of(start(model_path, folder, "second"))
    assert lock.read_text() == holder == f"process {first} on {os.uname().nodename}"
    (folder / "go on").touch()
    ends["first"] = end_of(first) | {"lock": lock.exists()}
    shutil.rmtree(folder / "out")  # among checkpoints of one second, the one of most steps is kept: not those to come
    for name, death in [("killed", signal.SIGKILL), ("interrupted", signal.SIGINT)]:
        (folder / "waiting").unlink()
        (folder / "go on").unlink(missing_ok=True)
        process = start(model_path, folder, name, fault="wait")
        wait_for(folder / "waiting")
        os.kill(process, death)
        ends[name] = end_of(process) | {"lock": lock.exists()}
    (folder / "0.pt").unlink()
    ends["next"] = end_of(start(model_path, folder, "next", resume=True)) | {"lock": lock.exists()}
    (output_dir / "ends.json").write_text(json.dumps(ends))


def main(model_path: str, output_dir: str, *scenarios: str) -> None:
    resume_run.main(model_path, output_dir, *scenarios)
    meet(model_path, Path(output_dir) / "meetings")


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
