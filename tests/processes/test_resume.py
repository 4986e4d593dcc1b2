"""A run that is killed at any moment, and resumed, ends bit for bit as one that was not.

The runs are real and so are the kills (SIGKILL); `resume_run.py` makes them, in processes of its own.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import families
import pytest
import torch
from resume_run import MOMENTS, Scenario
from test_distributed import ENVIRONMENT, ROOT


pytestmark = pytest.mark.slow

# Moment -> the step in which it comes, and the checkpoint that is the newest complete one then. Checkpoints are due
# after steps 3, 6 and 8, and each generation batch serves 4 steps.
KILLS = {
    "in the second wave": (4, 3),
    "in a reward function": (4, 3),
    "after generation": (4, 3),
    "in the second backward": (7, 6),
    "in the optimizer step": (5, 3),
    "after a step": (7, 6),
    "in evaluation": (5, 3),
    "before saving": (6, 3),
    "in the model file": (6, 3),
    "after the model file": (6, 3),
    "after the optimizer file": (6, 3),
    "after the random state": (6, 3),
    "in the state file": (6, 3),
    "after the state file": (6, 3),
    "before the list of files": (6, 3),
    "before trainer_state.json": (6, 3),
    "in trainer_state.json": (6, 3),
    "before rotation": (6, 6),
    "in rotation": (6, 6),
    "after rotation": (6, 6),
    "in the state of entropy": (6, 6),
    "after saving": (6, 6),
    "at the end": (8, 8),
}
STREAM = {
    "streaming": True,
    "options": {"gradient_checkpointing": True, "sync_ref_model": True, "ref_model_sync_steps": 1},
}
EPOCHS = {
    "options": {
        "max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch", "logging_strategy": "epoch",
        "eval_strategy": "epoch", "save_total_limit": None,
    }
}  # fmt: skip
ONE_PASS = {
    "options": {
        "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 1, "beta": 0.0,
        "use_adaptive_entropy": False, "save_steps": 1, "eval_strategy": "no", "log_completions": False,
    }
}  # fmt: skip
DDP = {"processes": 2, "options": {"steps_per_generation": 2}}
SHARDS = {
    "processes": 2, "engine": "fsdp2",
    "options": {"steps_per_generation": 2, "sync_ref_model": True, "ref_model_sync_steps": 1},
}  # fmt: skip
EXPERTS = ["fsdp2", "deepspeed_zero3"]  # engines that cut them up
TIMES = ("step_time", "runtime", "per_second", "seconds")


def play(
    model_path: str,
    folder: Path,
    scenarios: dict[str, Scenario],
    program: str = "resume_run",
    prefix: Sequence[str] = (),
    timeout: float | None = None,
) -> Path:
    """Run scenarios, with a command before that of Python; returns the folder that holds one for each."""
    arguments = [f"{name}={json.dumps(asdict(scenario))}" for name, scenario in scenarios.items()]
    command = [*prefix, sys.executable, f"tests/processes/{program}.py", model_path, str(folder), *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def runs_of(folder: Path) -> list[dict]:
    """Of each run: exit status by process, and the checkpoints that it left."""
    return json.loads((folder / "runs.json").read_text())


def seen_in(folder: Path, rank: int = 0) -> dict:
    """What a process saw in the last run."""
    return json.loads((folder / f"{rank}.json").read_text())


def logs_of(folder: Path, rank: int) -> list[dict]:
    """What was logged, but for times; `train_loss` is about the steps since the last resumption, as upstream's."""
    return [
        {key: value for key, value in log.items() if key != "train_loss" and not any(time in key for time in TIMES)}
        for log in seen_in(folder, rank)["log"]
    ]


def assert_same(folder: Path, unbroken: Path, processes: int = 1) -> None:
    """Parameters, logged metrics and the last table of completions are those of the unbroken run."""
    for rank in range(processes):
        parameters, expected = (torch.load(path / f"{rank}.pt") for path in (folder, unbroken))
        assert parameters.keys() == expected.keys()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, expected[name]), f"{name} differs"
        assert json.dumps(logs_of(folder, rank), sort_keys=True) == json.dumps(logs_of(unbroken, rank), sort_keys=True)
        assert seen_in(folder, rank)["table"] == seen_in(unbroken, rank)["table"]
        assert seen_in(folder, rank)["steps"] == seen_in(unbroken, rank)["steps"]


@pytest.fixture(scope="module")
def runs(model_path, tmp_path_factory) -> Path:
    scenarios = {moment: Scenario(kills=[(moment, step)], resume=[True]) for moment, (step, _) in KILLS.items()}
    scenarios["unbroken"] = Scenario()
    scenarios["none yet"] = Scenario(kills=[("in the second backward", 1), None], resume=[True, False])
    scenarios["overwriting"] = Scenario(
        kills=[("after a step", 7), ("after the model file", 6)],
        resume=["checkpoint-3", True],
        options={"save_total_limit": None},
    )
    skip = {"ignore_data_skip": True}
    scenarios["other data"] = Scenario(kills=[("after a step", 7)], resume=[True], resumed_options=skip)
    for name, common, kills in [
        ("stream", STREAM, [("in a reward function", 4), ("after a step", 7)]),
        ("epochs", EPOCHS, [("in the second backward", 6), ("after generation", 8), ("at the end", 12)]),
        (
            "one pass",
            ONE_PASS,
            [("in a reward function", 1), ("in the second wave", 3), ("after a step", 6), ("at the end", 8)],
        ),
    ]:
        scenarios[f"{name} unbroken"] = Scenario(**common)
        scenarios[name] = Scenario(**common, kills=kills, resume=[True] * len(kills))
    return play(model_path, tmp_path_factory.mktemp("resume"), scenarios)


@pytest.mark.parametrize("moment", KILLS)
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(runs, moment):
    """In the middle of a generation batch, of an epoch and between two logs, where only one checkpoint is kept."""
    killed, resumed = runs_of(runs / moment)
    newest = f"checkpoint-{KILLS[moment][1]}"
    assert killed["status"] == [-9] and resumed["status"] == [0]
    assert killed["complete"][0] == newest, "there must be a complete checkpoint at every moment"
    seen = seen_in(runs / moment)
    if moment != "at the end":
        assert seen["start"] == KILLS[moment][1]
        assert len(seen["trees"]) == 2, "the trees of the generation batch in progress are back"
    skipped = [name for name in killed["left"] if name not in killed["complete"] and name > newest]
    assert len(seen["warnings"]) == len(skipped)
    assert all(name in warning for name, warning in zip(skipped, seen["warnings"], strict=True))
    assert_same(runs / moment, runs / "unbroken")


def test_every_moment_is_tested():
    assert KILLS.keys() == MOMENTS.keys()


def test_the_runs_are_what_they_should_be(runs):
    """Several epochs, evaluations in between, a log that spans checkpoints, and an entropy coefficient that moves."""
    log = seen_in(runs / "unbroken")["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6, 8]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [5, 8]
    assert log[-1]["epoch"] == 2
    coefs = [entry["entropy_coef"] for entry in log if "entropy_coef" in entry]
    assert coefs == sorted(set(coefs)) and coefs[-1] > 0


def test_before_the_first_checkpoint_there_is_an_error_that_says_what_to_do(runs):
    killed, resumed, anew = runs_of(runs / "none yet")
    assert killed["complete"] == [] and resumed["status"] == [1] and anew["status"] == [0]
    assert "ValueError: No valid checkpoint found in output directory" in (runs / "none yet" / "log.txt").read_text()
    assert_same(runs / "none yet", runs / "unbroken")


def test_a_checkpoint_that_is_written_again_stays_until_the_new_one_is_complete(runs):
    _, killed, resumed = runs_of(runs / "overwriting")
    assert killed["left"] == ["checkpoint-6", "replaced-checkpoint-6", "checkpoint-3"]
    assert killed["complete"] == ["replaced-checkpoint-6", "checkpoint-3"]
    assert seen_in(runs / "overwriting")["start"] == 6
    assert resumed["left"] == ["checkpoint-8", "checkpoint-6", "checkpoint-3"]
    assert_same(runs / "overwriting", runs / "unbroken")


@pytest.mark.parametrize("name", ["stream", "epochs", "one pass"])
def test_it_holds_for_other_settings(runs, name):
    """A stream gone through twice, gradient checkpointing and a reference that moves; everything by the epoch; one
    generation batch an update, and an end in the middle of an epoch."""
    *killed, resumed = runs_of(runs / name)
    assert all(run["status"] == [-9] for run in killed) and resumed["status"] == [0]
    assert_same(runs / name, runs / f"{name} unbroken")


def test_without_skipping_data_the_run_goes_on_with_other_prompts(runs):
    assert runs_of(runs / "other data")[-1]["status"] == [0]
    seen = seen_in(runs / "other data")
    assert (seen["start"], seen["steps"]) == (6, 8)


@pytest.fixture(scope="module")
def shared_runs(model_path, tmp_path_factory) -> Path:
    """Of several processes, and of adapters."""
    lora = {"lora": True}
    scenarios = {
        "lora unbroken": Scenario(**lora),
        "lora": Scenario(**lora, kills=[("after a step", 5), ("after the model file", 6)], resume=[True, True]),
        "ddp unbroken": Scenario(**DDP),
        # The other process fails as soon as it misses this one.
        "ddp": Scenario(
            **DDP, victim=1, kills=[("in a reward function", 4), ("after the random state", 6)], resume=[True, True]
        ),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("resume")
    families.make_model("qwen3_moe").save_pretrained(folder / "experts")
    sharded = {"shards": SHARDS}
    for engine in EXPERTS:
        if engine == "fsdp2" or find_spec("deepspeed"):
            sharded[f"experts {engine}"] = {**DDP, "engine": engine, "model": str(folder / "experts")}
    for name, common in sharded.items():
        scenarios[f"{name} unbroken"] = Scenario(**common)
        scenarios[name] = Scenario(**common, kills=[("in a reward function", 4)], resume=[True])
    return play(model_path, folder, scenarios)


def test_it_holds_for_adapters(shared_runs):
    assert [run["status"] for run in runs_of(shared_runs / "lora")] == [[-9], [-9], [0]]
    assert_same(shared_runs / "lora", shared_runs / "lora unbroken")


def test_it_holds_for_two_processes_and_a_checkpoint_takes_the_parts_of_both(shared_runs):
    first, second, resumed = runs_of(shared_runs / "ddp")
    assert first["status"][1] == second["status"][1] == -9 and resumed["status"] == [0, 0]
    assert second["left"] == ["checkpoint-6", "checkpoint-3"] and second["complete"] == ["checkpoint-3"]
    assert_same(shared_runs / "ddp", shared_runs / "ddp unbroken", processes=2)


def assert_shards_resume(runs: Path, name: str) -> None:
    """Process 0 died, the other one ended by itself, and both went on from the checkpoint as if nothing had been."""
    killed, resumed = runs_of(runs / name)
    assert killed["status"][0] == -9 and killed["status"][1] != 0 and resumed["status"] == [0, 0]
    assert killed["apart"] < 60
    log = (runs / name / "log.txt").read_text()
    assert "Connection closed by peer" in log or "Connection reset by peer" in log, log[-3000:]
    assert seen_in(runs / name)["start"] == 3
    assert_same(runs / name, runs / f"{name} unbroken", processes=2)


def test_it_holds_for_shards_and_a_reference_in_shards(shared_runs):
    assert_shards_resume(shared_runs, "shards")


@pytest.mark.parametrize("engine", EXPERTS)
def test_it_holds_for_a_mixture_of_experts(engine, shared_runs):
    """Whose experts are cut up in the files of the Hub's format, but not in those of sharded engines."""
    if engine != "fsdp2":
        pytest.importorskip("deepspeed")
    assert_shards_resume(shared_runs, f"experts {engine}")
