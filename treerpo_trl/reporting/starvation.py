"""Batches that teach nothing though nothing fails: told, with the cause and the fix."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..credit import ESTIMATORS


logger = logging.getLogger(__name__)
FIRST_WARNING = 10
ROUNDING = 1e-12  # all that is left of advantages of 0
TIES = (
    "Either the task is too hard or too easy for the model, or its completions are all alike, or a reward function "
    "does not tell them apart; log_completions=True shows them"
)


class StarvationWatch:
    """Warns when several batches in a row teach nothing: no node with an advantage has tokens to train.

    A single such batch is no matter, and on hard tasks not rare. The first warning comes after ten in a row. Then the
    number doubles with every warning, however many batches taught something in between. A resumed run begins anew.

    Args:
        args: The trainer's `TreeRPOConfig`.
        is_main_process: Whether this process is the one that warns.
    """

    def __init__(self, args: Any, is_main_process: bool):
        self.args = args
        self.is_main_process = is_main_process
        self.patience = FIRST_WARNING
        self._begin()

    def _begin(self) -> None:
        self.batches_in_a_row = 0
        self.largest_range: float | None = None
        self.is_compared = False
        self.rewards: list[float] = []
        self.has_advantages = False

    def check(self, metrics: Mapping[str, float], trained_weight: Any) -> None:
        """Take note of a batch. All processes see the same, as both arguments are of all of them.

        Args:
            metrics: Its pooled [`~treerpo_trl.reporting.metrics.tree_metrics`].
            trained_weight: Weight of its trained tokens in the loss, a tensor or a number.
        """
        value_range = metrics.get("tree/value_range_max")
        has_advantages = metrics.get("tree/advantage_abs", 0.0) > ROUNDING
        if has_advantages and trained_weight > 0:
            self._begin()
            return
        self.batches_in_a_row += 1
        self.has_advantages |= has_advantages
        self.is_compared |= metrics.get("tree/kept_groups", 0.0) > 0
        self.rewards += [metrics["tree/reward"]] if "tree/reward" in metrics else []
        if value_range is not None:
            self.largest_range = max(value_range, self.largest_range or 0.0)
        if self.batches_in_a_row >= self.patience:
            self.patience *= 2
            if self.is_main_process:
                logger.warning(f"Nothing was learned from the last {self.batches_in_a_row} batches: {self._cause()}.")

    def _cause(self) -> str:
        """Why, and what to do. Of several causes the one that is nearest to training something."""
        args, largest = self.args, self.largest_range
        if self.has_advantages:
            return (
                "all completions that could be learned from are truncated, and mask_truncated_completions=True "
                f"leaves them out. Raise segment_length ({args.segment_length}) or max_depth ({args.max_depth}), or "
                "set mask_truncated_completions=False"
            )
        compares_trees = not ESTIMATORS[args.advantage_estimator].needs_siblings
        if self.is_compared and (largest is None or (compares_trees and largest == 0)):
            return (
                f"all completions of a batch had the same reward ({self._mean_rewards()}), so there is nothing to "
                f"compare. {TIES}. Use prompts that the model solves sometimes, more of them a batch, or rewards with "
                "more steps"
            )
        if largest is None:
            what = "no two siblings had a reward, as most were" if self.rewards else "every reward was"
            return (
                f"{what} None or NaN, which leave a completion without a value. Let the reward functions return "
                "numbers; log_completions=True shows what they are given"
            )
        if largest == 0:
            return (
                f"all siblings had the same value (mean reward of a batch: {self._mean_rewards()}), so the largest "
                f"range (max - min) of a group is 0 and there is nothing to compare. {TIES}. Use prompts that the "
                "model solves sometimes, a larger branching_factor, or rewards with more steps"
            )
        return (
            f"the largest range (max - min) of a group of siblings was {largest:.4g}, but only groups above "
            f"prune_threshold={args.prune_threshold} are trained. Scale the rewards (reward_weights does it) so that "
            "good and bad completions lie about 1 apart, or lower the threshold to a tenth of what lies between them, "
            f"such as prune_threshold={largest / 10:.1g}"
        )

    def _mean_rewards(self) -> str:
        low, high = min(self.rewards), max(self.rewards)
        return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
