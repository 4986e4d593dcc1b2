"""Signals, exceptions, hangs, full disks and a second run: what was saved stays, and what the user sees is clear.

The runs and the faults are real. `resume_run.py` and `fault_run.py` make them, in processes of their own.
"""

import errno
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from places import free_port
from resume_run import Scenario
from test_distributed import ENVIRONMENT, ROOT, launch_command
from test_resume import DDP, EPOCHS, assert_same, play, runs_of
from tiny import make_tokenizer, spread_reward

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.running import locking
from treerpo_trl.running.checkpoints import last_complete_checkpoint, list_checkpoints
from treerpo_trl.running.locking import LOCK, claim


LIMIT = 240  # seconds; all runs of a fixture take about 30
# In sampling, in a reward, in saving and in a backward pass, with the newest complete checkpoint.
MOMENTS = [
    (["in the second wave", 4], "checkpoint-3"),
    (["in a reward function", 4], "checkpoint-3"),
    (["in the model file", 6], "checkpoint-3"),
    (["in the second backward", 7], "checkpoint-6"),
]
# How many kB a disk has left -> the error: in the weights, and in the optimizer.
FULL = {20: "No space left on device", 200: "basic_ios::clear: iostream error"}


@cache
def private_disks() -> tuple[str, ...]:
    """What to put before a command that mounts disks, without leaving them to anyone else; empty if none can be."""
    if shutil.which("unshare") is None:
        return ()
    with tempfile.TemporaryDirectory() as folder:
        mount = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", folder], capture_output=True)
    return ("unshare", "-rm") if mount.returncode == 0 else ()


needs_disks = pytest.mark.skipif(not private_disks(), reason="no disk can be mounted, not even with `unshare -rm`")


def moments(fault: str, kills: list[list], **options) -> Scenario:
    return Scenario(fault=fault, kills=kills, resume=[True] * len(kills), **options)


def jit(options: dict) -> dict:
    return {"options": {**options, "enable_jit_checkpoint": True}}


@pytest.fixture(scope="module")
def runs(model_path, tmp_path_factory) -> Path:
    kills = [kill for kill, _ in MOMENTS]
    scenarios = {"unbroken": Scenario(), "epochs unbroken": Scenario(**EPOCHS)}
    scenarios |= {signal: moments(signal, kills) for signal in ("SIGTERM", "SIGINT")}
    scenarios["raise"] = moments("raise", [["in a reward function", 4]])
    # The first of them in a step after which an evaluation is due; in the middle of an epoch, and in its last step.
    kills = [["in a reward function", 4], ["in the second backward", 6]]
    scenarios["jit"] = moments("SIGTERM", kills, **jit({}))
    kills = [["in the second backward", 5], ["in the second backward", 7]]
    scenarios["jit epochs"] = moments("SIGTERM", kills, **jit(EPOCHS["options"]))
    scenarios["ddp unbroken"] = Scenario(**DDP)
    ddp = {**DDP, **jit(DDP["options"])}
    scenarios["jit ddp"] = moments("SIGTERM", [["in the second backward", 4]], victim=1, **ddp)
    for left in FULL if private_disks() else ():
        scenarios[f"full {left}"] = moments(f"fill {left}", [["in the second backward", 4]], disk="6m")
    return play(model_path, tmp_path_factory.mktemp("faults"), scenarios, "fault_run", private_disks(), LIMIT)


def status_of(folder: Path) -> list[list[int]]:
    return [run["status"] for run in runs_of(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "status"), [("SIGTERM", -15), ("SIGINT", 1)])
def test_a_run_told_to_end_keeps_what_it_saved_and_goes_on_exactly(runs, signal, status):
    assert status_of(runs / signal) == [[status]] * 4 + [[0]]
    for run, (_, newest) in zip(runs_of(runs / signal), MOMENTS, strict=False):
        assert run["complete"][0] == newest
        assert run["lock"] == (signal == "SIGTERM")  # a process that ends at once cannot tidy up; nobody holds it
    assert not runs_of(runs / signal)[-1]["lock"]
    log = (runs / signal / "log.txt").read_text()
    assert log.count("\nKeyboardInterrupt\n") == (4 if signal == "SIGINT" else 0)
    assert_same(runs / signal, runs / "unbroken")


@pytest.mark.slow
def test_an_exception_of_a_reward_reaches_the_user_and_the_run_goes_on_exactly(runs):
    broken, resumed = runs_of(runs / "raise")
    assert (broken["status"], resumed["status"]) == ([1], [0])
    assert broken["complete"] == ["checkpoint-3"] and not broken["lock"]
    assert "\nZeroDivisionError: the reward of this run is broken\n" in (runs / "raise" / "log.txt").read_text()
    assert_same(runs / "raise", runs / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unbroken", "saved"),
    [
        ("jit", "unbroken", ["checkpoint-5", "checkpoint-7", "checkpoint-8"]),
        ("jit epochs", "epochs unbroken", ["checkpoint-6", "checkpoint-8", "checkpoint-12"]),
        ("jit ddp", "ddp unbroken", ["checkpoint-5", "checkpoint-8"]),
    ],
)
def test_with_jit_checkpoints_sigterm_saves_at_the_end_of_the_step(runs, name, unbroken, saved):
    """All processes do, where one was told; then `train` returns. What is due after the step is done before."""
    processes = 2 if "ddp" in name else 1
    assert status_of(runs / name) == [[0] * processes] * len(saved)
    assert [run["complete"][0] for run in runs_of(runs / name)] == saved
    assert all(run["left"] == run["complete"] for run in runs_of(runs / name))
    assert_same(runs / name, runs / unbroken, processes)


@pytest.mark.slow
@needs_disks
@pytest.mark.parametrize("left", FULL)
def test_a_run_whose_disk_is_full_says_so_and_leaves_the_last_checkpoint_complete(runs, left):
    """Also where only one is kept (`save_total_limit=1`). With room made, it goes on exactly."""
    full, resumed = runs_of(runs / f"full {left}")
    assert (full["status"], resumed["status"]) == ([1], [0])
    assert full["left"] == ["checkpoint-6", "checkpoint-3"] and full["complete"] == ["checkpoint-3"]
    log, out = (runs / f"full {left}" / "log.txt").read_text(), runs / f"full {left}" / "out"
    assert f"{FULL[left]}" in log
    assert f"\nThis happened while {out}/checkpoint-6 was written, which is not complete" in log
    assert f"0.0 MB are free on its disk. The newest complete checkpoint is {out}/checkpoint-3\n" in log
    assert_same(runs / f"full {left}", runs / "unbroken")


@pytest.fixture(scope="module")
def meetings(runs) -> Path:
    return runs / "meetings"


@pytest.mark.slow
def test_a_second_run_in_an_output_dir_fails_at_once_and_the_first_goes_on(meetings):
    ends, log = json.loads((meetings / "ends.json").read_text()), (meetings / "second.txt").read_text()
    assert ends["second"]["status"] == 1
    assert f"RuntimeError: output_dir '{meetings}/runs/out' is in use: process " in log
    assert "is training there" in log and "end the other one first" in log
    assert ends["first"]["status"] == 0 and not ends["first"]["lock"]


@pytest.mark.slow
def test_ctrl_c_ends_a_run_that_hangs_in_a_reward_and_the_next_starts_at_once(meetings):
    ends = json.loads((meetings / "ends.json").read_text())
    assert ends["killed"]["status"] == -9 and ends["killed"]["lock"]
    assert (
        ends["interrupted"]["status"] == 1 and ends["interrupted"]["seconds"] < 5 and not ends["interrupted"]["lock"]
    )
    assert (meetings / "interrupted.txt").read_text().endswith("\nKeyboardInterrupt\n")
    assert ends["next"]["status"] == 0 and not ends["next"]["lock"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "[rank1]: ZeroDivisionError: the reward of this run is broken"),
        ("wait", "Timed out waiting 20000ms"),
    ],
)
def test_a_reward_that_raises_or_hangs_on_one_process_ends_the_launch(model_path, tmp_path, fault, message):
    """One that hangs, after `ddp_timeout`; upstream's is half an hour. Processes may begin some seconds apart."""
    options = {**DDP["options"], "ddp_timeout": 20 if fault == "wait" else 1800}
    scenario = Scenario(fault=fault, kills=[["in a reward function", 4]], victim=1, processes=2, options=options)
    command = launch_command("multi_cpu", "--main_process_port", str(free_port()))
    command = [
        *command[:-1],
        "tests/processes/resume_run.py",
        model_path,
        str(tmp_path),
        f"run={json.dumps(asdict(scenario))}",
    ]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        result = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT
        )
    assert result.returncode != 0
    assert message in log.read_text()
    assert last_complete_checkpoint(tmp_path / "run" / "out") == str(tmp_path / "run" / "out" / "checkpoint-3")


# In one process


def test_trainers_one_after_the_other_share_an_output_dir_whatever_the_first_ended_with(model, make_args, dataset):
    """As in a notebook, whose process lives on."""

    def broken_reward(completions, trainer_state, **kwargs):
        raise KeyboardInterrupt

    lock = Path(make_args().output_dir) / LOCK
    first = TreeRPOTrainer(model, broken_reward, make_args(), dataset, processing_class=make_tokenizer())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert not lock.exists()
    held = []

    def reward(completions, **kwargs):
        held.append(lock.exists())
        return spread_reward(completions)

    for _ in range(2):
        trainer = TreeRPOTrainer(model, reward, make_args(max_steps=1), dataset, processing_class=make_tokenizer())
        trainer.train()
        assert trainer.state.global_step == 1 and not lock.exists()
    assert held == [True, True]


def run_alone(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """Python that has `claim`, and imports nothing heavy."""
    code = f"import runpy, sys; claim = runpy.run_path('treerpo_trl/running/locking.py')['claim']\n{code}"
    command = [*prefix, sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_many_processes_that_come_and_go_never_hold_a_folder_together(tmp_path):
    code = """
import os, time
done, deadline = 0, time.monotonic() + 30
while done < 200 and time.monotonic() < deadline:
    try:
        with claim(sys.argv[1]):
            os.close(os.open(sys.argv[1] + "/inside", os.O_CREAT | os.O_EXCL))
            os.unlink(sys.argv[1] + "/inside")
            done += 1
    except RuntimeError:
        pass
print(done)
"""
    processes = [run_alone(code, str(tmp_path)) for _ in range(4)]
    for process in processes:
        output, error = process.communicate(timeout=60)
        assert output == "200\n", error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("without", ["fcntl", "locks"])
def test_where_files_cannot_be_locked_runs_go_on(monkeypatch, tmp_path, without):
    """On Windows, and on network file systems whose server says no."""

    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        def lockf(self, *args):
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking, "fcntl", None if without == "fcntl" else NoLocks())
    with claim(tmp_path), claim(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@needs_disks
@pytest.mark.parametrize(
    ("mount", "message"), [("ro", "Read-only file system"), ("size=4k,nr_inodes=1", "No space left on device")]
)
def test_a_folder_that_cannot_be_written_to_is_told_before_training(tmp_path, mount, message):
    code = "import subprocess; folder = sys.argv[1]\n"
    code += "subprocess.run(['mount', '-t', 'tmpfs', '-o', sys.argv[2], 'none', folder], check=True)\n"
    code += "claim(folder).__enter__()"
    process = run_alone(code, str(tmp_path), mount, prefix=private_disks())
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"output_dir '{tmp_path}' cannot be written to ({message})" in error


def test_an_output_dir_that_is_a_file_is_told_before_training(model, make_args, dataset, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path}/file"):
        TreeRPOTrainer(
            model, spread_reward, make_args(output_dir=str(tmp_path / "file")), dataset,
            processing_class=make_tokenizer(),
        )  # fmt: skip
    with (
        pytest.raises(OSError, match=r"output_dir '.*/file/below' cannot be written to"),
        claim(tmp_path / "file/below"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine" and not list_checkpoints(tmp_path)
