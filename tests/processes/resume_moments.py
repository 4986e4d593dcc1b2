"""The moments at which a fault befalls a training run in `resume_run.py`, from sampling to the last byte saved."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
import transformers.trainer
import transformers.trainer_utils
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from trl.trainer import grpo_trainer

from treerpo_trl.growth.backends import TransformersBackend
from treerpo_trl.trainers import resuming


FAULT = {"kind": "SIGKILL", "folder": "."}


def die() -> None:
    """What happens at the moment: a signal by its name, or `raise`, `wait` (for a file, for ever) or `fill N`."""
    kind, folder = FAULT["kind"], Path(FAULT["folder"])
    if kind == "raise":
        raise ZeroDivisionError("the reward of this run is broken")
    if kind == "wait":
        (folder / "waiting").touch()
        while not (folder / "go on").exists():
            time.sleep(0.02)
    elif kind.startswith("fill"):  # the disk, but for so many kB
        ballast = shutil.disk_usage(folder / "out").free - 1024 * int(kind.removeprefix("fill "))
        (folder / "out" / "ballast").write_bytes(bytes(ballast))
    else:
        os.kill(os.getpid(), signal.Signals[kind])
        time.sleep(0.2)  # for a handler in a thread


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `wrapper(original, *arguments)` called in place of a function."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


def before(owner: Any, name: str, is_due: Callable[[], bool]) -> None:
    def wrapper(original, *args, **kwargs):
        if is_due():
            die()
        return original(*args, **kwargs)

    wrap(owner, name, wrapper)


def after(owner: Any, name: str, is_due: Callable[[], bool]) -> None:
    def wrapper(original, *args, **kwargs):
        result = original(*args, **kwargs)
        if is_due():
            die()
        return result

    wrap(owner, name, wrapper)


def in_second_wave(trainer, is_due):
    """At the third token of a tree's second wave."""
    waves, tokens = [], []

    def extend(original, *args, **kwargs):
        waves.append(is_due())
        return original(*args, **kwargs)

    def forward(*args):
        if sum(waves) == 2:
            tokens.append(1)
        if len(tokens) == 3:
            die()

    wrap(TransformersBackend, "extend", extend)
    trainer.model.register_forward_pre_hook(forward)


def in_reward(trainer, is_due):
    def reward(original, *args, **kwargs):
        result = original(*args, **kwargs)
        if is_due() and trainer.model.training:
            die()
        return result

    reward_func = trainer.reward_funcs[0]
    trainer.reward_funcs[0] = lambda *args, **kwargs: reward(reward_func, *args, **kwargs)


def in_backward(trainer, is_due):
    """In the backward pass of the step's second micro-batch."""
    passes = []

    def hook(gradient):
        passes.append(is_due())
        if passes[-1] and sum(passes) == 2:
            die()

    next(trainer.model.model.layers[0].parameters()).register_hook(hook)


def in_optimizer_step(trainer, is_due):
    """When the parameters have moved, and nothing else knows."""
    register_optimizer_step_post_hook(lambda *args: die() if is_due() else None)


def in_evaluation(trainer, is_due):
    before(trainer, "prediction_step", lambda: is_due() and not trainer.model.training)


def in_model_file(trainer, is_due):
    def save_file(original, tensors, filename, *args, **kwargs):
        original(tensors, filename, *args, **kwargs)
        if is_due():
            os.truncate(filename, os.path.getsize(filename) // 2)
            die()

    wrap(transformers.modeling_utils, "safe_save_file", save_file)


def in_state_file(trainer, is_due):
    def save(original, state, path, *args, **kwargs):
        original(state, path, *args, **kwargs)
        if is_due() and str(path).endswith(".unfinished"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    wrap(torch, "save", save)


def in_trainer_state(trainer, is_due):
    def save_to_json(original, state, path):
        original(state, path)
        if is_due():
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    original = TrainerState.save_to_json
    TrainerState.save_to_json = lambda *args: save_to_json(original, *args)


def in_rotation(trainer, is_due):
    """With the optimizer of the old checkpoint deleted, and its trainer_state.json not."""

    def rmtree(original, path, *args, **kwargs):
        if is_due() and Path(path).name.startswith("checkpoint-"):
            os.unlink(os.path.join(path, "optimizer.pt"))
            die()
        return original(path, *args, **kwargs)

    wrap(transformers.trainer_utils.shutil, "rmtree", rmtree)


def in_entropy_state(trainer, is_due):
    def dump(original, content, file, **kwargs):
        if is_due() and "entropy_coef" in content:
            file.write('{"entropy_co')
            file.flush()
            die()
        return original(content, file, **kwargs)

    wrap(grpo_trainer.json, "dump", dump)


# Each takes the trainer and whether the step has come, and arranges for the death.
MOMENTS: dict[str, Callable[[Any, Callable[[], bool]], None]] = {
    "in the second wave": in_second_wave,
    "in a reward function": in_reward,
    "after generation": lambda trainer, is_due: before(trainer, "_compute_loss", is_due),
    "in the second backward": in_backward,
    "in the optimizer step": in_optimizer_step,
    "after a step": lambda trainer, is_due: before(trainer, "_maybe_log_save_evaluate", is_due),
    "in evaluation": in_evaluation,
    "before saving": lambda trainer, is_due: before(trainer, "_save_checkpoint", is_due),
    "in the model file": in_model_file,
    "after the model file": lambda trainer, is_due: after(trainer, "save_model", is_due),
    "after the optimizer file": lambda trainer, is_due: after(trainer, "_save_optimizer_and_scheduler", is_due),
    "after the random state": lambda trainer, is_due: after(Trainer, "_save_rng_state", is_due),
    "in the state file": in_state_file,
    "after the state file": lambda trainer, is_due: after(resuming, "save_state", is_due),
    "before the list of files": lambda trainer, is_due: before(resuming, "seal", is_due),
    "before trainer_state.json": lambda trainer, is_due: after(resuming, "seal", is_due),
    "in trainer_state.json": in_trainer_state,
    "before rotation": lambda trainer, is_due: before(transformers.trainer, "rotate_checkpoints", is_due),
    "in rotation": in_rotation,
    "after rotation": lambda trainer, is_due: after(transformers.trainer, "rotate_checkpoints", is_due),
    "in the state of entropy": in_entropy_state,
    "after saving": lambda trainer, is_due: after(trainer, "_save_checkpoint", is_due),
    "at the end": lambda trainer, is_due: before(trainer, "_finalize_training", is_due),
}
