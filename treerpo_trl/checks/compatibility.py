"""Options of GRPOConfig that trees cannot honour. Each is refused with the reason and an alternative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..credit import ESTIMATORS
from .options import refusal


LOSS_TYPES = ("dapo", "bnpo", "cispo", "dr_grpo")
LOSS_WEIGHTINGS = ("token", "node")
UNSCALED_ESTIMATORS = ("centered", "leave_one_out", "parent", "tree_mean", "treerl")
NO_CONTINUOUS_BATCHING = (
    "it starts each call with an empty cache, so every wave would compute its prompts and paths again; the default "
    "computes each token once, and so does use_vllm=True"
)
# The max_num_batched_tokens of TRL's VLLMGeneration.
MAX_COLOCATED_ROWS = 4096


def refuse_unsupported(config: Any) -> None:
    """Check the parameters of a configuration that trees narrow down.

    Raises:
        ValueError: A parameter has a value that does not work; the message has the reason and those that do.
    """
    rules = _RULES + (_VLLM_RULES if config.use_vllm else [])
    if config.use_vllm and config.vllm_importance_sampling_correction:
        rules = [*rules, _IMPORTANCE_SAMPLING_RULE]
    for name, allowed, reason in rules:
        value = getattr(config, name)
        if name == "scale_rewards" and config.advantage_estimator in UNSCALED_ESTIMATORS:
            allowed = (*allowed, "none", False)  # which says the same
        if value not in allowed:
            raise ValueError(refusal(name, value, allowed, reason))


def refuse_oversized_engine(config: Any) -> None:
    """Check that a colocated engine can be started for the rows of a batch.

    Raises:
        ValueError: TRL gives it a place for every row, and vLLM refuses more than tokens fit one of its batches.
    """
    rows = config.per_device_train_batch_size * config.steps_per_generation
    places = rows * config.vllm_tensor_parallel_size
    if config.use_vllm and config.vllm_mode == "colocate" and places > MAX_COLOCATED_ROWS:
        raise ValueError(
            f"per_device_train_batch_size ({config.per_device_train_batch_size}) x steps_per_generation "
            f"({config.steps_per_generation}) x vllm_tensor_parallel_size ({config.vllm_tensor_parallel_size}) = "
            f"{places} rows, but an engine in TRL's colocate mode takes {MAX_COLOCATED_ROWS}. Use more processes and "
            "fewer steps_per_generation, or vllm_mode='server'"
        )


# (parameter, allowed values, reason and fix)
_RULES: list[tuple[str, Sequence[Any], str]] = [
    ("advantage_estimator", tuple(ESTIMATORS), "choose one of these"),
    ("uncertainty_measure", ("surprisal", "entropy"), "choose one of these"),
    ("loss_weighting", LOSS_WEIGHTINGS, "choose one of these"),
    ("prefix_sharing", ("auto", True, False), "choose one of these"),
    (
        "loss_type",
        LOSS_TYPES,
        "the other losses average over each row, but a row holds only the tokens it owns of a tree",
    ),
    ("importance_sampling_level", ("token",), "a row of a tree holds only the tokens it owns of its sequence"),
    ("off_policy_mask_threshold", (None,), "it masks whole rows, which share their tokens with other rows"),
    ("scale_rewards", ("group", True), "advantage_estimator scales advantages; set it to 'centered' not to scale"),
    ("multi_objective_aggregation", ("sum_then_normalize",), "a leaf's value is the weighted sum of its rewards"),
    ("use_transformers_continuous_batching", (False,), NO_CONTINUOUS_BATCHING),
    ("use_transformers_paged", (False,), NO_CONTINUOUS_BATCHING),
    ("cache_implementation", (None,), "only the default cache can be forked"),
]
_VLLM_RULES: list[tuple[str, Sequence[Any], str]] = [
    ("vllm_structured_outputs_regex", (None,), "each segment would have to match it anew"),
]
_IMPORTANCE_SAMPLING_RULE: tuple[str, Sequence[Any], str] = (
    "vllm_importance_sampling_mode",
    ("token_mask", "token_truncate"),
    "the others weigh a row by its whole sequence, but a row holds only the tokens it owns",
)
