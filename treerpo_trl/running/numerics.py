"""Numbers that are not finite: kept from the weights, and told."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn


logger = logging.getLogger(__name__)
MOST_SKIPPED = 10


class GradientGuard:
    """Skips the update of a gradient that is not finite, which would make every weight NaN, and counts them.

    A single one, of an odd batch, costs an update and a warning. Ten in a row are an error: nothing is learned.
    Gradients scaled for fp16 have a guard of their own. DeepSpeed makes the update before anyone is asked, so there
    the first one is an error.

    Args:
        accelerator: The trainer's.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.skipped_in_a_row = 0

    def check(self, grad_norm: Any, model: nn.Module, step: int) -> bool:
        """Whether the update is skipped. All processes decide the same, as the norm is that of all.

        Args:
            grad_norm: Norm of the whole gradient, a tensor or a number; `None` if the engine does not tell.
            model: Its gradients are taken away if the update is skipped.
            step: The optimizer step that is to be made, for the message.

        Raises:
            FloatingPointError: It is the tenth in a row, or the engine has made the update already.
        """
        is_deepspeed = self.accelerator.distributed_type == "DEEPSPEED"
        is_scaled = self.accelerator.scaler is not None or (
            is_deepspeed and self.accelerator.mixed_precision == "fp16"
        )
        if grad_norm is None or is_scaled or math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return False
        what = f"the gradient of step {step} has the norm {float(grad_norm)}"
        why = (
            "Rewards, advantages or the difference to the old or reference log-probabilities may be too large, or the "
            "learning rate too high"
        )
        if is_deepspeed:
            raise FloatingPointError(
                f"{what}, and DeepSpeed has updated the weights with it. Go on from the last checkpoint. {why}"
            )
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise FloatingPointError(
                f"{what}; {MOST_SKIPPED} in a row are not finite, so nothing is learned any more. {why}; or go on "
                "from an earlier checkpoint"
            )
        model.zero_grad(set_to_none=True)  # without a gradient, optimizers leave a weight and its moments alone
        if self.accelerator.is_main_process:
            logger.warning(f"An update is skipped: {what}. {why}.")
        return True
