"""Where trees branch, as a configuration asks for it: the options of each split rule, and those of the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..credit import ESTIMATORS
from .options import refusal


SPLIT_RULES = ("length", "delimiter", "uncertainty", "turn")
# Options of one rule, with their defaults: set to anything else they would be silently without effect elsewhere.
DELIMITER_OPTIONS: dict[str, Any] = {"step_delimiters": ["\n\n"]}
FORK_OPTIONS: dict[str, Any] = {
    "num_trunks": 1,
    "forks_per_trunk": 1,
    "continuations_per_fork": 1,
    "fork_rounds": 1,
    "uncertainty_measure": "surprisal",
}
DEPTH_OPTIONS: dict[str, Any] = {"branching_factor": [2], "max_depth": None, "segment_length": None}
# What trees were grown with before there were these options.
BEFORE_RULES: dict[str, Any] = {"split_rule": "length", **DELIMITER_OPTIONS, "min_segment_length": 1, **FORK_OPTIONS}
DEFAULT_RESPONSE_LENGTH = 384


def check_split_rule(config: Any) -> None:
    """Check the options of the split rule, and that those of the others are left alone.

    Args:
        config: A TreeRPOConfig whose whole numbers are plain ones.

    Raises:
        TypeError: `step_delimiters` is no list of texts.
        ValueError: An option is out of range, or belongs to another rule; the message has the value and the fix.
    """
    if isinstance(config.step_delimiters, str):
        config.step_delimiters = [config.step_delimiters]
    if config.split_rule is None:
        config.split_rule = "length"
    rule = config.split_rule
    if rule not in SPLIT_RULES:  # before options of the rule that is meant are told to be without effect
        raise ValueError(refusal("split_rule", rule, SPLIT_RULES, "choose one of these"))
    _refuse(config, {} if rule == "delimiter" else DELIMITER_OPTIONS, "'delimiter'")
    _refuse(config, {} if rule == "uncertainty" else FORK_OPTIONS, "'uncertainty'")
    _refuse(config, {"min_segment_length": 1} if rule in ("length", "turn") else {}, "'delimiter' or 'uncertainty'")
    if config.min_segment_length < 1:
        raise ValueError(f"min_segment_length is {config.min_segment_length}; a segment has at least one token")
    if rule == "delimiter":
        _check_delimiters(config.step_delimiters)
        config.step_delimiters = list(config.step_delimiters)
    if rule == "turn":
        _refuse(config, {"segment_length": None}, "'length', with which turns end segments, too")
    if rule == "uncertainty":
        _refuse(config, DEPTH_OPTIONS, "'length' or 'delimiter'")
        config.branching_factor = DEPTH_OPTIONS["branching_factor"]
        _check_forks(config)


def derive_forks(config: Any) -> None:
    """Resolve num_generations and max_completion_length of trees that fork.

    Raises:
        ValueError: num_generations is given and is not M (1 + K T L), or no fork fits into a completion.
    """
    forks = config.forks_per_trunk * config.continuations_per_fork * config.fork_rounds
    leaves = config.num_trunks * (1 + forks)
    if config.num_generations not in (None, leaves):
        raise ValueError(
            f"num_trunks x (1 + forks_per_trunk x continuations_per_fork x fork_rounds) = {config.num_trunks} x (1 + "
            f"{config.forks_per_trunk} x {config.continuations_per_fork} x {config.fork_rounds}) = {leaves} leaves, "
            f"but num_generations is {config.num_generations}; leave num_generations unset or set it to {leaves}"
        )
    config.num_generations = leaves
    if config.max_completion_length is None:
        config.max_completion_length = DEFAULT_RESPONSE_LENGTH
    check_completion_length(config.max_completion_length)
    if config.max_completion_length < 2 * config.min_segment_length:
        raise ValueError(
            f"max_completion_length is {config.max_completion_length}, but a fork leaves min_segment_length="
            f"{config.min_segment_length} tokens on either side of it, so none fits; use "
            f"{2 * config.min_segment_length} or more"
        )


def check_completion_length(length: int) -> None:
    """A completion has at least one token.

    Raises:
        ValueError: It would have fewer.
    """
    if length < 1:
        raise ValueError(f"max_completion_length is {length}; a completion has at least one token")


def _refuse(config: Any, defaults: dict[str, Any], rules: str) -> None:
    for name, default in defaults.items():
        value = getattr(config, name)
        value = value.tolist() if hasattr(value, "tolist") else value  # numpy's
        given = [value] if name == "branching_factor" and isinstance(value, int) else value
        if given != default and list(given if isinstance(given, Sequence) else [given]) != default:
            raise ValueError(
                f"{name} is {value!r}, which has no effect with split_rule='{config.split_rule}'; remove it, or set "
                f"split_rule={rules}"
            )


def _check_delimiters(texts: Any) -> None:
    is_list = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    if not is_list:
        raise TypeError(f'step_delimiters is {texts!r}; give a list of texts, such as ["\\n\\n"]')
    if not texts or "" in texts:
        raise ValueError(
            f'step_delimiters is {texts!r}; give one text or more, none of them empty, such as ["\\n\\n"]'
        )
    for text in texts:
        if re.fullmatch(r"(\\[nrt])+", text):
            raise ValueError(
                f"step_delimiters has {text!r}, a backslash and a letter, where a line break or tab is meant; write "
                f"$'{text}' in a shell such as bash, or \"{text}\" in YAML"
            )


def _check_forks(config: Any) -> None:
    for name in ("num_trunks", "forks_per_trunk", "continuations_per_fork", "fork_rounds"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; use 1 or more, or another split_rule for no forks")
    estimator = ESTIMATORS.get(config.advantage_estimator)
    if config.num_trunks == 1 and (estimator is None or estimator.needs_siblings):
        raise ValueError(
            f"num_trunks is 1, but advantage_estimator='{config.advantage_estimator}' compares the nodes of one tree, "
            "where a single trunk has nothing to be compared with up to its first fork. Use num_trunks=2 or more, or "
            "advantage_estimator='optimal_baseline', which compares with other trees"
        )
    if config.use_vllm and config.uncertainty_measure == "entropy":
        raise ValueError(
            "uncertainty_measure='entropy' does not work with use_vllm=True: vLLM reports the log-probabilities of "
            "the tokens that were drawn, and no others. Use uncertainty_measure='surprisal'"
        )
