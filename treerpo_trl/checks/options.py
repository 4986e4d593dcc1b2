"""Types and ranges of options: a wrong one is an error where it is set, with the value and the fix."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any


# Option -> whether it may be left unset (None). Their ranges are checked where the tree is derived.
WHOLE_NUMBERS = {
    "max_depth": True,
    "segment_length": True,
    "num_generations": True,
    "max_completion_length": True,
    "max_frontier_rows": False,
    "min_segment_length": False,
    "num_trunks": False,
    "forks_per_trunk": False,
    "continuations_per_fork": False,
    "fork_rounds": False,
    "log_trees_steps": True,
    "num_trees_to_print": False,
}
FLAGS = ("log_trees", "overlap_rewards")
# What TRL takes but trees refuse: no misspelling.
REFUSED_CHOICES = frozenset(
    {
        "grpo",
        "sapo",
        "luspo",
        "vespo",
        "sequence",
        "sequence_mask",
        "sequence_truncate",
        "batch",
        "none",
        "normalize_then_sum",
    }
)


def check_options(config: Any) -> None:
    """Check the numbers and flags of a configuration, and make plain ones of numpy's.

    Raises:
        TypeError: One has the wrong type.
        ValueError: A number is out of range.
    """
    for name, is_optional in WHOLE_NUMBERS.items():
        value = getattr(config, name)
        if not (value is None and is_optional):
            setattr(config, name, whole_number(name, value))
    for name in FLAGS:
        setattr(config, name, _flag(name, getattr(config, name)))
    if config.prune_threshold is not None:  # whether any group exceeds it is checked with the objective
        config.prune_threshold = real_number("prune_threshold", config.prune_threshold)
    _check_sampling(config)
    _check_tree_log(config)


def whole_number(name: str, value: Any) -> int:
    """`value` as an int, of any type of whole numbers but bool.

    Raises:
        TypeError: It is something else; the message has the value and, where one is meant, the number.
    """
    try:
        if _is_flag(value):
            raise TypeError
        return operator.index(value)
    except TypeError:
        pass
    number = _read_number(value)
    meant = f"{name}={int(number)}" if number is not None and number.is_integer() else "a whole number"
    raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; use {meant}") from None


def real_number(name: str, value: Any) -> float:
    """`value` as a float, of any type of real numbers but bool.

    Raises:
        TypeError: It is something else; the message has the value and, where one is meant, the number.
        ValueError: It is NaN.
    """
    if not isinstance(value, Real) or _is_flag(value):
        number = _read_number(value)
        meant = "a number" if number is None else f"{name}={number:g}"
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; use {meant}")
    if math.isnan(value):
        raise ValueError(f"{name} is {value}; use a number")
    return float(value)


def refusal(name: str, value: Any, allowed: Sequence[Any], reason: str) -> str:
    """Why an option cannot have a value, and what to use; what looks misspelt is told with the nearest choice."""
    choices = f"Use {name}=" + " or ".join(repr(choice) for choice in allowed)
    texts = [choice for choice in allowed if isinstance(choice, str)]
    if isinstance(value, str) and texts and value not in REFUSED_CHOICES:
        near = get_close_matches(value.lower(), texts, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"{name}={value!r} is not one of the choices{hint} {choices}"
    return f"{name}={value!r} does not work with trees: {reason}. {choices}"


def _check_sampling(config: Any) -> None:
    """What would stop the sampling of the first tree, or divide the log-probabilities by 0."""
    config.temperature = real_number("temperature", config.temperature)
    if not 0 < config.temperature < math.inf:
        raise ValueError(
            f"temperature is {config.temperature:g}, but siblings have to differ, and logits are divided by it; use "
            "temperature=1.0 (the default) or another number above 0. Evaluation samples with it, too"
        )
    config.top_p = real_number("top_p", config.top_p)
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p is {config.top_p:g}; use a share of probability in (0, 1], 1.0 to keep all tokens")
    if config.top_k is not None:
        config.top_k = whole_number("top_k", config.top_k)
        if config.top_k < 0 and not (config.use_vllm and config.top_k == -1):
            raise ValueError(f"top_k is {config.top_k}; use a number of tokens, or 0 to keep all")
    if config.min_p is not None and not 0 <= (min_p := real_number("min_p", config.min_p)) <= 1:
        raise ValueError(f"min_p is {min_p:g}; use a probability in [0, 1], or None to keep all tokens")
    config.repetition_penalty = real_number("repetition_penalty", config.repetition_penalty)
    if not 0 < config.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty is {config.repetition_penalty:g}; use a number above 0, 1.0 for none")


def _check_tree_log(config: Any) -> None:
    if config.log_trees_steps is not None and not config.log_trees:
        raise ValueError(
            f"log_trees_steps is {config.log_trees_steps}, but log_trees is False; set log_trees=True, or leave "
            "log_trees_steps unset"
        )
    if config.log_trees_steps is not None and config.log_trees_steps < 1:
        raise ValueError(f"log_trees_steps is {config.log_trees_steps}; trees are written every 1 or more steps")
    if config.num_trees_to_print < 0:
        raise ValueError(f"num_trees_to_print is {config.num_trees_to_print}; use 0 to print none")


def _flag(name: str, value: Any) -> bool:
    if not _is_flag(value):
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; use {name}=True or {name}=False")
    return bool(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # numpy's


def _read_number(value: Any) -> float | None:
    """The number that a text or another type of number stands for."""
    try:
        number = float(value) if isinstance(value, str | Real) and not _is_flag(value) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
