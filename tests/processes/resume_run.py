"""What `test_resume.py` runs: training runs that kill themselves, and runs that go on from what is left.

python tests/processes/resume_run.py MODEL_PATH OUTPUT_DIR NAME=SCENARIO ...

It imports once and forks for each run, two scenarios at a time. A scenario is JSON (see `Scenario`). Its folder NAME
holds the runs' output, what they left behind (`runs.json`), and of the last run what process R saw (`R.json`) and its
parameters (`R.pt`). Launched by accelerate, it makes one run of each scenario in the processes that it is given.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # as pytest does
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import on_cpu
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import Dataset, IterableDataset
from distributed_run import whole_parameters
from peft import LoraConfig
from places import free_port
from resume_moments import FAULT, MOMENTS
from tiny import make_tokenizer, spread_reward
from transformers import TrainerCallback

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.running import checkpoints
from treerpo_trl.running.locking import LOCK
from treerpo_trl.trainers import resuming


with suppress(ImportError):  # accelerate imports it when it is needed, which would be in every run
    import deepspeed  # noqa: F401

# A generation batch is two trees of 4 rows in 4 micro-batches. It takes 4 updates (two iterations of two), and so does
# an epoch, as one prompt is left over. So checkpoints are in the middle of generation batches, epochs and logs.
BASE = {
    "branching_factor": 2, "max_depth": 2, "segment_length": 4, "per_device_train_batch_size": 2,
    "steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 8, "save_steps": 3,
    "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 5, "num_generations_eval": 2,
    "per_device_eval_batch_size": 2, "learning_rate": 1e-2, "beta": 0.1, "use_adaptive_entropy": True,
    "entropy_target": 3.0, "entropy_coef_delta": 0.01, "log_completions": True, "num_completions_to_print": 1,
    "save_total_limit": 1, "report_to": "none", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
    "model_init_kwargs": {"dtype": "float32"},
}  # fmt: skip
PROMPTS = ["1+1=", "7+2=", "7+7+4="]
SIMULTANEOUS = 2
KEPT: list[TreeRPOTrainer] = []  # torch may hang or abort where DDP over gloo is freed


@dataclass
class Scenario:
    """A run that is killed at one moment after the other, each time going on from what is left, and ends in the end.

    Args:
        kills: [(name of a function in `MOMENTS`, step in which)].
        resume: `resume_from_checkpoint` of each run that goes on: a bool, or the name of a checkpoint for its path.
        options: Of the configuration; `resumed_options` for runs that go on.
        streaming, lora, processes: The dataset, the model, and how many processes train it.
        model: Path of another model.
        engine: What the processes share the model with, by the name of its configuration; DDP if there is none.
        victim: The process that dies; the others fail, as they lose it.
        fault: What happens at the moments, if not a kill; see `resume_moments.die`.
        disk: Size of a disk of its own for `out`, such as "4m"; after each run what filled it is deleted.
    """

    kills: list[tuple[str, int]] = field(default_factory=list)
    resume: list[bool | str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    resumed_options: dict[str, Any] = field(default_factory=dict)
    streaming: bool = False
    lora: bool = False
    processes: int = 1
    model: str | None = None
    engine: str | None = None
    victim: int = 0
    fault: str = "SIGKILL"
    disk: str | None = None


# One run


class Witness(TrainerCallback):
    """Notes where a run begins, and what of the trees is there then."""

    trainer: TreeRPOTrainer

    def __init__(self):
        self.seen: dict[str, Any] = {}

    def on_substep_end(self, args, state, control, **kwargs):
        self.note(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.note(state.global_step - 1)

    def note(self, step):
        if "start" not in self.seen:
            self.seen |= {"start": step, "trees": [resuming.pack(scored) for scored in self.trainer.last_trees]}


def train(scenario: Scenario, model_path: str, folder: Path, resume: bool | str | None, kill: Any, rank: int) -> None:
    """Train in this process, and die if told to; otherwise leave what was seen."""
    output_dir = str(folder / "out")
    options = {**scenario.options, **(scenario.resumed_options if resume else {})}
    args = TreeRPOConfig(output_dir, **{**BASE, **options})
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    witness = Witness()
    witness.trainer = trainer = TreeRPOTrainer(
        scenario.model or model_path,
        spread_reward,
        args,
        train_dataset=IterableDataset.from_generator(lambda: iter(prompts)) if scenario.streaming else prompts,
        eval_dataset=prompts.select(range(1)),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if scenario.lora else None,
        callbacks=[witness],
    )
    KEPT.append(trainer)
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "jit_manager", None) is not None:
            callback.jit_manager.kill_wait = 0  # seconds, in which a scheduler might kill the run after all
    trainer.create_model_card = lambda *args, **kwargs: None  # which takes half of the time
    if kill is not None and rank == scenario.victim:
        moment, step = kill
        FAULT.update(kind=scenario.fault, folder=str(folder))
        if scenario.fault in ("SIGINT", "wait"):  # which shells have background processes ignore
            signal.signal(signal.SIGINT, signal.default_int_handler)
        MOMENTS[moment](trainer, lambda: trainer.state.global_step == step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=f"{output_dir}/{resume}" if isinstance(resume, str) else resume)
    tables = sorted(Path(output_dir).glob("completions/*.parquet")) if rank == 0 else []  # who writes them
    seen = {
        **witness.seen,
        "log": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "warnings": [str(warning.message) for warning in caught if "heckpoint-" in str(warning.message)],
        "table": pd.read_parquet(tables[-1]).to_json() if tables else None,
    }
    torch.save(whole_parameters(trainer), folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(seen))


# Many runs


def fork(function: Callable[[], None], log: Path) -> int:
    """Run a function in a child process that writes to `log`; returns the process."""
    sys.stdout.flush()
    if (process := os.fork()) != 0:
        return process
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def environment_of(engine: str, port: str) -> dict[str, str]:
    """What `accelerate launch` sets for each of the processes that it would start."""
    options = ["--config_file", f"accelerate_configs/{engine}_cpu.yaml", "--main_process_port", port]
    seen: dict[str, str] = {}
    with patch("torch.distributed.run.run", lambda args: seen.update(os.environ)):
        launch_command(launch_command_parser().parse_args([*options, "examples/on_cpu.py"]))
    assert seen, "accelerate would start no processes"
    return seen


def launch(scenario: Scenario, model_path: str, folder: Path, resume: Any, kill: Any) -> dict[str, Any]:
    """The exit status of each process of a run (a negative one is the signal that ended it), and how many seconds are
    between the first end and the last. No process is told when another ends."""
    port = str(free_port())
    engine = {} if scenario.engine is None else environment_of(scenario.engine, port)

    def run(rank: int) -> None:
        if scenario.processes > 1:
            os.environ |= engine or {"ACCELERATE_USE_CPU": "true"}
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(scenario.processes),
                "LOCAL_WORLD_SIZE": str(scenario.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        if engine:
            PartialState.__init__ = on_cpu._init_on_cpu
        train(scenario, model_path, folder, resume, kill, rank)

    processes = [fork(lambda rank=rank: run(rank), folder / "log.txt") for rank in range(scenario.processes)]
    ends: dict[int, tuple[int, float]] = {}
    while len(ends) < len(processes):
        process, status = os.wait()
        ends[process] = os.waitstatus_to_exitcode(status), time.monotonic()
    times = [moment for _, moment in ends.values()]
    return {"status": [ends[process][0] for process in processes], "apart": times[-1] - times[0]}


def play(scenario: Scenario, model_path: str, folder: Path) -> None:
    """All runs of a scenario, one after the other."""
    folder.mkdir()
    if scenario.disk is not None:
        (folder / "out").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={scenario.disk}", "none", folder / "out"], check=True)
    runs = []
    resumes = [None, *scenario.resume]
    for resume, kill in zip(resumes, [*scenario.kills, None], strict=True):
        ended = launch(scenario, model_path, folder, resume, kill)
        left = checkpoints.list_checkpoints(folder / "out")
        complete = [path.name for path in left if checkpoints.find_fault(path) is None]
        has_lock = (folder / "out" / LOCK).exists()
        runs.append({**ended, "left": [path.name for path in left], "complete": complete, "lock": has_lock})
        (folder / "out" / "ballast").unlink(missing_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))


def main(model_path: str, output_dir: str, *scenarios: str) -> None:
    gc.freeze()  # or each fork would copy what the collector touches
    running: set[int] = set()
    for argument in scenarios:
        name, _, options = argument.partition("=")
        scenario = Scenario(**json.loads(options))
        folder = Path(output_dir) / name
        if "RANK" in os.environ:
            folder.mkdir(exist_ok=True)
            first = [*scenario.resume, None][0], [*scenario.kills, None][0]
            train(scenario, model_path, folder, *first, rank=int(os.environ["RANK"]))
            continue
        if len(running) == SIMULTANEOUS:
            running.remove(os.wait()[0])
        running.add(fork(lambda s=scenario, f=folder: play(s, model_path, f), Path(output_dir) / "log.txt"))
    for process in running:
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # DDP over gloo may hang on the way out
