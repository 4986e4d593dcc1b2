"""A GRPOTrainer that goes on from a checkpoint as if it had never stopped.

Upstream's checkpoints hold weights, optimizer, random states and the step. Kept here is what they lack: the generated
batch that is still to be trained on, the metrics and the loss since the last log, the state of the adaptive entropy
bonus (which upstream writes when the checkpoint counts as complete already), a reference model that moves, and the
order of the data in later epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import IterableDataset
from torch import Tensor
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import GRPOTrainer

from ..checks.split_rule import BEFORE_RULES
from ..credit import ScoredTree
from ..running.checkpoints import (
    Secret,
    check_settings,
    choose_checkpoint,
    describe_failure,
    discard_replaced,
    drop_unreadable,
    has_state,
    load_state,
    make_plain,
    make_room,
    read_progress,
    read_seal,
    save_state,
    seal,
)
from ..running.locking import claim
from ..running.step_end_checkpoint import StepEndCheckpoint
from ..running.weights import restore_weights
from ..tree import Node, Tree


class ResumableGRPOTrainer(GRPOTrainer):
    """TRL's trainer with checkpoints from which a run goes on exactly, whatever moment it was killed at."""

    last_trees: list[ScoredTree]
    _epochs_done = 0
    _goes_on_exactly = False
    _pending: str | None = None  # the checkpoint whose state is still to be put back

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = Secret(self.args.hub_token)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As upstream's; `resume_from_checkpoint=True` is the newest checkpoint in `output_dir` that is complete.

        Raises:
            ValueError: There is no complete checkpoint, or the one given is not complete or does not fit the run.
            RuntimeError: Another run is training in `output_dir`.
        """
        checkpoint = choose_checkpoint(resume_from_checkpoint, self.args.output_dir)
        self._pending, self._epochs_done, self._goes_on_exactly = checkpoint, 0, False
        if checkpoint is not None:
            self._goes_on_exactly = check_settings(checkpoint, _comparable(settings_of(self), checkpoint))
            self._check_reference(checkpoint)
            self._epochs_done = int(read_progress(checkpoint)["epoch"] or 0)
            if self.args.should_save:  # upstream writes it last of all, and `state_N` holds the same
                drop_unreadable(checkpoint, "entropy_ctrl_state.json")
            self.accelerator.wait_for_everyone()
        self.callback_handler.callbacks = [
            StepEndCheckpoint(self, callback.jit_manager) if type(callback) is JITCheckpointCallback else callback
            for callback in self.callback_handler.callbacks
        ]
        with claim(self.args.output_dir) if self.accelerator.is_main_process else nullcontext():
            return super().train(checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As upstream's, into an empty folder; an error says what it means for the run."""
        output_dir = Path(self._get_output_dir(trial))
        checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                make_room(checkpoint, bool(self.args.save_total_limit))
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                discard_replaced(output_dir)
        except Exception as error:
            error.add_note(describe_failure(checkpoint))
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that each process writes for itself; `trainer_state.json` follows."""
        super()._save_rng_state(output_dir)
        save_state(output_dir, f"state_{self.accelerator.process_index}", take_state(self))
        if self.args.sync_ref_model and (self._has_shards or self.args.should_save):
            parts = [make_plain(_own_part(parameter)) for parameter in self.ref_model.parameters()]
            save_state(output_dir, self._reference_name, {"parameters": parts})
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(output_dir, settings_of(self), is_mid_generation(self))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Upstream passes over weights that it finds no place for; here all come back."""
        self._restore(resume_from_checkpoint, partial(super()._load_from_checkpoint, resume_from_checkpoint, model))

    def _load_best_model(self) -> None:
        """The same for the best checkpoint, at the end."""
        self._restore(self.state.best_model_checkpoint, super()._load_best_model)

    def _restore(self, checkpoint: str, load: Callable[[], None]) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            load()  # their own files hold the model's own names, and they are strict
        else:
            restore_weights(self.accelerator.unwrap_model(self.model), checkpoint, load)

    def _load_rng_state(self, checkpoint: str) -> None:
        """Called when the first step after the checkpoint is about to begin."""
        self._pending = None
        super()._load_rng_state(checkpoint)
        if self._goes_on_exactly:
            put_state(self, load_state(checkpoint, f"state_{self.accelerator.process_index}"))
        if self.args.sync_ref_model and has_state(checkpoint, self._reference_name):
            parts = load_state(checkpoint, self._reference_name)["parameters"]
            for parameter, part in zip(self.ref_model.parameters(), parts, strict=True):
                _own_part(parameter).copy_(part)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Upstream's sampler draws an order of the data at each epoch; those of the epochs done are drawn here."""
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._epochs_done if sampler.shuffle else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Upstream takes a stream to be as long as the run, and so forgets how often it went through it."""
        epochs, micro_steps = super()._init_training_state(*args, **kwargs)
        if self._pending is not None and isinstance(self.train_dataset, IterableDataset):
            progress = read_progress(self._pending)
            epochs, share = divmod(progress["epoch"] or 0, 1)
            if not self.args.ignore_data_skip:
                micro_steps = round(share * progress["max_steps"] * self.args.gradient_accumulation_steps)
        return int(epochs), micro_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Upstream would make one step more where a run was killed after its last."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Where there was no step left, the state comes back for what is logged at the end."""
        if self._pending is not None:
            self._load_rng_state(self._pending)
        return super()._finalize_training(*args, **kwargs)

    @property
    def _has_shards(self) -> bool:
        return bool(self._dist.is_fsdp or self._dist.is_zero3)

    @property
    def _reference_name(self) -> str:
        return f"reference_{self.accelerator.process_index if self._has_shards else 0}"

    def _check_reference(self, checkpoint: str) -> None:
        saved, now = read_seal(checkpoint)["settings"]["num_processes"], self.accelerator.num_processes
        if self.args.sync_ref_model and self._has_shards and saved != now:
            raise ValueError(
                f"{checkpoint} holds the moving reference model (sync_ref_model=True) in {saved} shards, but there "
                f"are {now} processes; use {saved}, or start from its weights: model='{checkpoint}'"
            )


def settings_of(trainer: Any) -> dict[str, Any]:
    """What decides which rows a process holds and what is in them: a run that goes on exactly has it unchanged."""
    args = trainer.args
    names = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
        "branching_factor", "segment_length", "max_completion_length", "use_vllm", "sync_ref_model", *BEFORE_RULES,
    )  # fmt: skip
    return {
        "num_processes": trainer.accelerator.num_processes,
        "engine": trainer.accelerator.distributed_type.value,
        "beta > 0": args.beta > 0,
        **{name: getattr(args, name) for name in names},
    }


def _comparable(settings: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """The settings without those that the checkpoint is too old to have, if they are what they were then."""
    saved = read_seal(checkpoint)["settings"]
    return {name: value for name, value in settings.items() if name in saved or BEFORE_RULES.get(name) != value}


def is_mid_generation(trainer: Any) -> bool:
    """Whether the newest generation batch is still to be trained on."""
    return trainer._buffered_inputs is not None and _micro_steps_left(trainer) > 0


def take_state(trainer: Any) -> dict[str, Any]:
    """What upstream leaves out of a checkpoint, of this process, as plain data."""
    state = {
        "step": trainer._step,
        "step_time": trainer._current_train_step_time,
        "metrics": make_plain(trainer._metrics),
        "loss": make_plain(trainer._tr_loss),
        "last_logged_step": trainer._globalstep_last_logged,
        "entropy_coef": trainer.entropy_coef,
        "last_world_entropy": trainer._last_world_entropy,
    }
    if trainer.log_completions and trainer.accelerator.is_main_process:
        state["logs"] = make_plain(trainer._logs)
    if is_mid_generation(trainer):
        left = _micro_steps_left(trainer)
        count = len(trainer._buffered_inputs)
        needed = {(trainer._step + offset) % count for offset in range(left)}
        state["micro_batches"] = [
            make_plain(batch) if index in needed else None for index, batch in enumerate(trainer._buffered_inputs)
        ]
        state["trees"] = [pack(scored) for scored in trainer.last_trees]
    return state


def put_state(trainer: Any, state: Mapping[str, Any]) -> None:
    """Make the trainer what it was at [`take_state`].

    `_last_loaded_step` is left out on purpose: vLLM's engine is new and needs the weights in any case.
    """
    trainer._step = state["step"]
    trainer._current_train_step_time = state["step_time"]
    trainer._globalstep_last_logged = state["last_logged_step"]
    trainer.entropy_coef = state["entropy_coef"]
    trainer._last_world_entropy = state["last_world_entropy"]
    trainer._tr_loss = state["loss"].to(trainer._tr_loss)
    trainer._total_loss_scalar = -trainer._tr_loss.item()  # `train_loss` is about the steps since, as upstream's
    for mode, metrics in state["metrics"].items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update(metrics)
    for name, column in state.get("logs", {}).items():
        columns = column.items() if isinstance(column, dict) else [(None, column)]
        for key, values in columns:
            log = trainer._logs[name] if key is None else trainer._logs[name][key]
            log.clear()
            log.extend(values)
    micro_batches = state.get("micro_batches")
    trainer._buffered_inputs = micro_batches and send_to_device(micro_batches, trainer.accelerator.device)
    trainer.last_trees = [unpack(packed) for packed in state.get("trees", [])]


def pack(scored: ScoredTree) -> dict[str, Any]:
    """A scored tree as plain data."""
    nodes = [astuple(node) for node in scored.tree.nodes]
    return {
        "nodes": nodes, "rewards": dict(scored.rewards), "values": scored.values, "advantages": scored.advantages,
        "kept": scored.kept,
    }  # fmt: skip


def unpack(packed: Mapping[str, Any]) -> ScoredTree:
    """The scored tree that [`pack`] was given."""
    tree = Tree(tuple(Node(*node) for node in packed["nodes"]))
    return ScoredTree(tree, **{name: packed[name] for name in ("rewards", "values", "advantages", "kept")})


def _micro_steps_left(trainer: Any) -> int:
    """How many micro-batches of the newest generation batch are still to come, over all iterations."""
    whole: int = trainer.args.steps_per_generation * trainer.num_iterations
    return -trainer._step % whole


def _own_part(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds, wherever ZeRO-3 and FSDP keep it; not a copy."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local().detach() if hasattr(parameter, "to_local") else parameter.detach()
