"""The objective that a configuration asks for: losses that a split tree would bend, thresholds that keep nothing."""

from __future__ import annotations

import math
from typing import Any

from ..credit import UNIT_INTERVAL_ESTIMATORS
from .options import real_number


def check_normalizer(config: Any) -> None:
    """Refuse to normalize by micro-batch where a tree spans several of them.

    Args:
        config: A TreeRPOConfig whose tree is derived.

    Raises:
        ValueError: The loss is `bnpo`, and a micro-batch does not hold whole trees.
    """
    batch, leaves = config.per_device_train_batch_size, config.num_generations
    if config.loss_type == "bnpo" and batch % leaves:
        raise ValueError(
            f"loss_type='bnpo' does not work with per_device_train_batch_size={batch}, which splits trees of {leaves} "
            "leaves: it is a mean over the trained tokens of a micro-batch, and of a tree the first micro-batch holds "
            "nearly all that are shared, so those of the others would weigh more. Use loss_type='dapo', which is the "
            f"same mean over the whole batch, or a multiple of {leaves} for per_device_train_batch_size"
        )


def check_prune_threshold(config: Any) -> None:
    """Refuse a threshold that no group can exceed, so that nothing would ever be trained.

    Args:
        config: A TreeRPOConfig, whose threshold is a number or None.

    Raises:
        ValueError: The threshold is infinite, or at least 1 with an estimator for rewards in [0, 1].
    """
    threshold, estimator = config.prune_threshold, config.advantage_estimator
    if threshold is None:
        return
    what = f"prune_threshold is {threshold:g}, which max - min of a group never exceeds"
    fix = "The paper's is 0.1; None, or a negative number, keeps every group"
    if threshold == math.inf:
        raise ValueError(f"{what}, so nothing would be trained. {fix}")
    if estimator in UNIT_INTERVAL_ESTIMATORS and threshold >= 1:
        raise ValueError(
            f"{what} with advantage_estimator='{estimator}', whose rewards lie in [0, 1], so nothing would be "
            f"trained. {fix}"
        )


def check_min_advantage(config: Any) -> None:
    """Refuse a size that leaves out every token, or that would change how the loss is normalized.

    Args:
        config: A TreeRPOConfig.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative, NaN or infinite, or the loss is `bnpo`.
    """
    config.min_advantage = real_number("min_advantage", config.min_advantage)
    if not 0 <= config.min_advantage < math.inf:
        raise ValueError(
            f"min_advantage is {config.min_advantage}; use 0 to train every token, or a positive number to leave out "
            "tokens whose advantage is smaller"
        )
    if config.min_advantage > 0 and config.loss_type == "bnpo":
        raise ValueError(
            f"min_advantage={config.min_advantage} does not work with loss_type='bnpo', which is a mean over the "
            "tokens that are left and so would grow with what is left out. Use loss_type='dapo'"
        )
