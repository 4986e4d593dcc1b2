"""A checkpoint when the system ends a run, at the end of the step."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class StepEndCheckpoint(JITCheckpointCallback):
    """Upstream's answer to SIGTERM (`enable_jit_checkpoint`) at the end of the step, by all processes together.

    Upstream's saves amid a step, too, whose trees a run that goes on would not have; before what is due after the
    step, which would then be missing; and each process for itself.

    Args:
        trainer: Makes the checkpoint.
        jit_manager: What upstream has set up; it notes the signal.
    """

    def __init__(self, trainer: Any, jit_manager: Any):
        super().__init__()
        self.trainer, self.jit_manager = trainer, jit_manager
        self.has_ended = False

    on_pre_optimizer_step = on_step_begin = TrainerCallback.on_step_begin  # nothing there

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where any process was told to end, all save, after what is due now, and end."""
        self.has_ended = any(gather_object([self.jit_manager.is_checkpoint_requested]))
        if not self.has_ended:
            return
        self.jit_manager.is_checkpoint_requested = False
        if control.should_evaluate:  # which may take longer than is left; if not, the checkpoint is made again
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
        control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upstream takes any end for that of an epoch."""
        if not self.has_ended:
            return
        if state.epoch % 1:
            control.should_log = control.should_evaluate = control.should_save = False
        elif control.should_log or control.should_evaluate:
            control.should_save = True
