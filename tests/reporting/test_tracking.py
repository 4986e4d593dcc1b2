"""Every tree metric reaches TensorBoard, trackio and wandb; and the seconds and tokens of a training step."""

import glob
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from places import HELPERS, ROOT
from tiny import coin_reward, make_tokenizer, spread, spread_reward
from transformers import Qwen2ForCausalLM

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.growth import TreeShape
from treerpo_trl.prefix_sharing import pack_rows
from treerpo_trl.reporting.metrics import tree_metrics
from treerpo_trl.running.timing import PHASES, PhaseTimer


DELAY = 0.1  # seconds a reward function takes
PER_STEP = {*(f"tree/seconds/{phase}" for phase in PHASES), "tree/token_sharing_training"}


def slow_reward(completions, trainer_state, **kwargs):
    """Tied in the first step: no node is kept, and so the size of an advantage is undefined."""
    time.sleep(DELAY)
    return [1.0] * len(completions) if trainer_state.global_step == 0 else coin_reward(completions)


def sometimes(completions, trainer_state, **kwargs):
    """None in the first step, and of some completions later."""
    if trainer_state.global_step == 0:
        return [None] * len(completions)
    return [None if spread("skip" + text) < 0.4 else spread(text) for text in completions]


def run(model_path: str, output_dir: str) -> None:
    """Train as a user with three trackers does, and leave what was logged and what trackio's store holds of it.

    Two optimizer steps a batch, so every other one samples; an evaluation in between; a KL term, for the reference.
    """
    args = TreeRPOConfig(
        output_dir, branching_factor=2, max_depth=3, segment_length=4, per_device_train_batch_size=16, max_steps=4,
        num_iterations=2, logging_steps=1, learning_rate=1e-2, beta=0.1, reward_weights=[0.5, 0.5],
        advantage_estimator="treerpo",  # whose groups may all be pruned
        eval_strategy="steps", eval_steps=2, num_generations_eval=2, per_device_eval_batch_size=4,
        save_strategy="no", bf16=False, disable_tqdm=True, report_to=["tensorboard", "trackio", "wandb"],
    )  # fmt: skip
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    dataset = Dataset.from_dict({"prompt": ["7+" * (i % 4) + f"{i}=" for i in range(8)]})
    trainer = TreeRPOTrainer(
        model, [slow_reward, sometimes], args, train_dataset=dataset, eval_dataset=dataset.select(range(4)),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()

    from trackio import Api  # it reads TRACKIO_DIR when it is imported
    from trackio.sqlite_storage import SQLiteStorage

    (tracked,) = Api().runs("huggingface")
    stored = SQLiteStorage.get_logs("huggingface", tracked.name, run_id=tracked.id)
    Path(output_dir, "seen.json").write_text(json.dumps({"logs": trainer.state.log_history, "trackio": stored}))


@pytest.fixture(scope="module")
def tracked(model_path, tmp_path_factory) -> tuple[Path, dict, str]:
    """The folder of a run, what it left, and what it printed."""
    folder = tmp_path_factory.mktemp("tracked")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)]),
        "TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline", "WANDB_DIR": str(folder),
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, __file__, model_path, str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, json.loads((folder / "seen.json").read_text()), result.stdout + result.stderr


def steps_of(seen: dict) -> dict[int, dict[str, float]]:
    """Step -> what was logged of its training."""
    return {log["step"]: log for log in seen["logs"] if "loss" in log}


def tree_numbers(logs: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("train/"): value for name, value in logs.items() if "tree/" in name}


def wandb_history(path: str) -> Iterator[dict[str, float]]:
    """The records of a `.wandb` file that `wandb.log` wrote: wandb's messages in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header, whole, last = 32768, 7, 1, 4
    data, position, message = Path(path).read_bytes(), header, b""
    while position + header <= len(data):
        if block - position % block < header:
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + header])
        position += header + length
        message += data[position - length : position]
        if kind in (whole, last):
            record, message = Record.FromString(message), b""
            if record.WhichOneof("record_type") == "history":
                yield {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def read_tensorboard(folder: Path, seen: dict) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(path)).Reload()
    logs: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            logs.setdefault(event.step, {})[name] = event.value
    return logs


def read_trackio(folder: Path, seen: dict) -> dict[int, dict[str, float]]:
    assert (folder / "trackio" / "huggingface.db").exists()
    return {log["train/global_step"]: log for log in seen["trackio"] if tree_numbers(log)}


def read_wandb(folder: Path, seen: dict) -> dict[int, dict[str, float]]:
    (path,) = glob.glob(str(folder / "wandb" / "offline-run-*" / "*.wandb"))
    return {log["train/global_step"]: log for log in wandb_history(path) if tree_numbers(log)}


@pytest.mark.slow
@pytest.mark.parametrize("read", [read_tensorboard, read_trackio, read_wandb])
def test_a_tracker_has_every_tree_metric_of_every_step(tracked, read):
    folder, seen, _ = tracked
    logged, stored = steps_of(seen), read(folder, seen)
    assert logged.keys() == {1, 2, 3, 4}
    for step, logs in logged.items():
        assert tree_numbers(stored[step]) == pytest.approx(tree_numbers(logs), rel=1e-6)  # TensorBoard has float32
    assert {step for step, logs in stored.items() if tree_numbers(logs)} == set(logged)


@pytest.mark.slow
def test_metrics_of_trees_are_logged_when_trees_were_sampled(tracked):
    """As TRL's of completions. What is undefined in a step is not logged in it, and no other name is missing."""
    logged = {step: tree_numbers(logs) for step, logs in steps_of(tracked[1]).items()}
    every = tree_metrics([], TreeShape((2, 2, 2), 2, 6), [], {"slow_reward": [], "sometimes": []}, 0).keys() | PER_STEP
    undefined = {name for name in every if "advantage_abs" in name or "sometimes" in name}
    assert logged[1].keys() == every - undefined
    assert logged[2].keys() == logged[4].keys() == PER_STEP
    assert logged[3].keys() >= every - {f"tree/advantage_abs/depth_{depth}" for depth in (1, 2, 3)}
    assert not any("tree/" in name for log in tracked[1]["logs"] if "eval_loss" in log for name in log)


@pytest.mark.slow
def test_no_tracker_complains_about_a_tree_metric(tracked):
    """TensorBoard warns of every None, trackio and wandb of values that they cannot keep."""
    lines = [line for line in tracked[2].splitlines() if "tree/" in line and not line.startswith("{'loss'")]
    assert not lines


@pytest.mark.slow
def test_the_seconds_of_the_phases_add_up_to_the_step(tracked):
    """Evaluation's calls of the same methods are not in them."""
    logged = steps_of(tracked[1])
    for step, logs in logged.items():
        seconds = {phase: logs[f"tree/seconds/{phase}"] for phase in PHASES}
        assert 0 <= sum(seconds.values()) - logs["step_time"] < 0.05
        sampled = {phase for phase, spent in seconds.items() if spent > 0}
        assert sampled == (set(PHASES) if step % 2 else {"training"})
        assert seconds["rewards"] >= DELAY * (step % 2)


class Spy(TreeRPOTrainer):
    """Counts what the forward passes of the loss were for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.row_tokens, self.packed_tokens = [], []

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        self.row_tokens.append(mask.sum().item())
        self.packed_tokens.append(pack_rows(ids, mask, inputs["tool_mask"] > 0).input_ids.numel())
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_token_sharing_in_training_is_that_of_the_micro_batches(model, make_args, dataset, prefix_sharing):
    """The log-probabilities before the update, for which more is computed, are not in it."""
    args = make_args(
        prefix_sharing=prefix_sharing, per_device_train_batch_size=8, steps_per_generation=4,
        gradient_accumulation_steps=2, max_steps=2,
    )  # fmt: skip
    trainer = Spy(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    logged = [log["tree/token_sharing_training"] for log in trainer.state.log_history if "loss" in log]
    rows, packed = trainer.row_tokens, trainer.packed_tokens
    expected = [sum(rows[step : step + 2]) / sum(packed[step : step + 2]) for step in (0, 2)]
    assert min(expected) > 1
    assert logged == (expected if prefix_sharing else [1, 1])


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock) -> PhaseTimer:
    return PhaseTimer(torch.device("cpu"), clock)


def test_a_phase_interrupts_the_one_it_is_inside_of(timer, clock):
    with timer.run("training"):
        clock.now += 1
        with timer.run("batch"):
            clock.now += 2
            with timer.run("sampling"):
                clock.now += 4
            clock.now += 8
        with timer.run("log_probs"):  # the forward pass of the loss
            clock.now += 16
    clock.now += 32
    assert timer.take() == {"sampling": 4, "rewards": 0, "log_probs": 0, "batch": 10, "training": 17}
    assert set(timer.take().values()) == {0}


def test_outside_of_a_step_nothing_is_counted(timer, clock):
    with timer.run("batch"), timer.run("sampling"):
        clock.now += 1
    assert set(timer.take().values()) == {0}


def test_an_error_ends_a_phase(timer, clock):
    with pytest.raises(ZeroDivisionError), timer.run("training"), timer.run("batch"):
        clock.now += 1
        raise ZeroDivisionError
    clock.now += 2
    with timer.run("training"):
        clock.now += 4
    assert timer.take() == {"sampling": 0, "rewards": 0, "log_probs": 0, "batch": 1, "training": 4}


def test_the_bounds_of_a_phase_wait_for_kernels(clock, monkeypatch):
    """The work of a phase may be done after the call that starts it has returned."""

    def finish(device):
        assert device.type == "cuda"
        clock.now += 1

    monkeypatch.setattr(torch.accelerator, "synchronize", finish)
    timer = PhaseTimer(torch.device("cuda"), clock)
    with timer.run("training"), timer.run("batch"):
        pass
    assert timer.take() == {"sampling": 0, "rewards": 0, "log_probs": 0, "batch": 1, "training": 2}


if __name__ == "__main__":
    run(*sys.argv[1:])
