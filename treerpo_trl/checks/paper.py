"""The setting of the paper's experiments (arXiv:2506.05183, section 4), for a number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


PAPER_SETTING: dict[str, Any] = {
    "branching_factor": 8,
    "max_depth": 3,
    "segment_length": 384,
    "split_rule": "length",
    "advantage_estimator": "treerpo",
    "prune_threshold": 0.1,
    "loss_weighting": "token",
    "loss_type": "dapo",
    "temperature": 0.6,
    "epsilon": 0.2,
    "beta": 0.001,
    "use_bias_correction_kl": False,  # the KL term is k3 alone, not weighted by the ratio
    "entropy_coef": 0.001,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "max_steps": 600,  # 300 of verl's steps, which are generation batches, of two updates each
}


def paper_setting(
    num_processes: int, per_device_train_batch_size: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters of [`TreeRPOConfig`]; see [`TreeRPOConfig.paper`].

    Raises:
        ValueError: 128 trees of 512 rows do not divide into two updates of whole micro-batches.
    """
    rows, micro_batch = 128 * 8**3, num_processes * per_device_train_batch_size
    if rows % (2 * micro_batch):
        raise ValueError(
            f"128 prompts of 512 rows do not divide into two updates over num_processes={num_processes} with "
            f"per_device_train_batch_size={per_device_train_batch_size}; use powers of two"
        )
    batch = {
        "per_device_train_batch_size": per_device_train_batch_size,
        "steps_per_generation": rows // micro_batch,
        "gradient_accumulation_steps": rows // micro_batch // 2,
    }
    length = {"max_steps": -1} if "num_train_epochs" in overrides else {}  # max_steps would win over it
    return {**PAPER_SETTING, **batch, **length, **overrides}
