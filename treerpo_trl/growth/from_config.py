"""What a configuration asks of growth: the shape of its trees, and what to note of each token."""

from __future__ import annotations

from typing import Any

from .forks import ForkShape
from .shape import TreeShape
from .turns import TurnShape
from .waves import Delimiters, Shape


def shape_of(config: Any, has_tools: bool = False) -> Shape:
    """The shape of a TreeRPOConfig's trees, whose optional fields are resolved; with tools, turns end segments."""
    if config.split_rule == "uncertainty":
        return ForkShape(
            config.num_trunks,
            config.forks_per_trunk,
            config.continuations_per_fork,
            config.fork_rounds,
            config.min_segment_length,
            config.max_completion_length,
        )
    if has_tools:
        most = config.max_completion_length
        length = most if config.split_rule == "turn" else config.segment_length
        return TurnShape(tuple(config.branching_factor), length, most)
    delimiters = None
    if config.split_rule == "delimiter":
        delimiters = Delimiters(tuple(config.step_delimiters), config.min_segment_length)
    return TreeShape(tuple(config.branching_factor), config.segment_length, config.max_completion_length, delimiters)


def statistics_of(config: Any, needs_score_norms: bool) -> tuple[str, ...]:
    """Names of what a backend has to note of each token; see [`~treerpo_trl.growth.backends.TransformersBackend`]."""
    uncertainty = (config.uncertainty_measure,) if config.split_rule == "uncertainty" else ()
    return (*uncertainty, *(("score_norm",) if needs_score_norms else ()))
