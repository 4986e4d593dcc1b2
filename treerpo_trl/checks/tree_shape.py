"""The shape of the tree that a configuration asks for: what is derived, and whether a batch holds whole trees."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..credit import ESTIMATORS
from .options import whole_number
from .split_rule import check_completion_length, check_split_rule, derive_forks


DEFAULT_MAX_DEPTH = 2
DEFAULT_SEGMENT_LENGTH = 128
# Shapes are found by trying divisors, which for this many leaves takes about 10 ms.
MOST_SUGGESTED = 4096


def derive_tree(config: Any) -> None:
    """Resolve branching_factor, max_depth, segment_length, num_generations and max_completion_length.

    Args:
        config: A TreeRPOConfig, whose fields are set.

    Raises:
        TypeError: The branching factor is no whole number and no list of them.
        ValueError: The fields contradict each other, or no tree can have that shape.
    """
    check_split_rule(config)
    if config.max_frontier_rows < 1:
        raise ValueError(f"max_frontier_rows is {config.max_frontier_rows}; at least one row must be decoded")
    if config.split_rule == "uncertainty":
        derive_forks(config)
        return
    given: Any = config.branching_factor
    branching = _whole_numbers(given)
    if config.max_depth is None:
        config.max_depth = len(branching) if len(branching) > 1 else DEFAULT_MAX_DEPTH
    if config.max_depth < 1:
        raise ValueError(f"max_depth is {config.max_depth}; a tree is at least 1 deep")
    if len(branching) == 1:
        branching *= config.max_depth
    if len(branching) != config.max_depth:
        raise ValueError(
            f"branching_factor {branching} has {len(branching)} numbers, but max_depth is {config.max_depth}; give "
            "one number for every depth, or one per depth"
        )
    _check_branching(config, branching)
    config.branching_factor = branching
    leaves = math.prod(branching)
    if config.num_generations not in (None, leaves):
        raise ValueError(
            f"branching_factor {branching} over max_depth {config.max_depth} makes {leaves} leaves, but "
            f"num_generations is {config.num_generations}; leave num_generations unset or set it to {leaves}"
            + _suggest_shapes(config.num_generations)
        )
    config.num_generations = leaves
    _derive_lengths(config, config.max_depth)


def _check_branching(config: Any, branching: list[int]) -> None:
    if min(branching) < 1:
        raise ValueError(f"branching_factor {branching} has a number below 1; a node that goes on has children")
    estimator = ESTIMATORS.get(config.advantage_estimator)
    if min(branching) < 2 and (estimator is None or estimator.needs_siblings):
        raise ValueError(
            f"branching_factor {branching} has a number below 2, but advantage_estimator="
            f"'{config.advantage_estimator}' compares the nodes of one tree, where an only child adds nothing new. "
            "Use 2 or more at every depth, or advantage_estimator='optimal_baseline', which compares with other trees"
        )


def _whole_numbers(given: Any) -> list[int]:
    """A branching factor as a list of numbers, as plain ints."""
    numbers = given.tolist() if hasattr(given, "tolist") else given  # numpy's
    branching = list(numbers) if isinstance(numbers, Sequence) and not isinstance(numbers, str) else [numbers]
    try:
        if not branching:
            raise TypeError
        return [whole_number("branching_factor", number) for number in branching]
    except TypeError:
        raise TypeError(
            f"branching_factor is {given!r}; give a whole number, or a list with one for each depth of the tree"
        ) from None


def shapes_of(leaves: int, most: int = 3) -> list[list[int]]:
    """Branching factors that make a number of leaves: the evenest of each depth from 2; a single depth for primes.

    Args:
        leaves: The number, at least 2.
        most: Number of shapes, those first whose numbers differ least.
    """
    found = []
    for depth in range(2, int(math.log2(leaves)) + 1):
        choices = list(_factorizations(leaves, depth, leaves))
        if choices:
            found.append(min(choices, key=lambda factors: factors[0] / factors[-1]))
    found.sort(key=lambda factors: (factors[0] / factors[-1], len(factors)))
    return found[:most] or [[leaves]]


def _factorizations(number: int, depth: int, largest: int) -> Iterator[list[int]]:
    """Ways to write a number as a product of `depth` factors from 2 to `largest`, none greater than the one before."""
    if depth == 1:
        if 2 <= number <= largest:
            yield [number]
        return
    for factor in range(2, min(number, largest) + 1):
        if number % factor == 0:
            for rest in _factorizations(number // factor, depth - 1, factor):
                yield [factor, *rest]


def _suggest_shapes(leaves: int) -> str:
    if not 2 <= leaves <= MOST_SUGGESTED:
        return ""
    shapes = shapes_of(leaves)
    if shapes == [[leaves]]:
        return f". For {leaves} leaves set branching_factor={leaves}, max_depth=1"
    return f". For {leaves} leaves set branching_factor={' or '.join(map(str, shapes))}, without max_depth"


def _derive_lengths(config: Any, depth: int) -> None:
    if config.segment_length is None:
        given = config.max_completion_length
        if given is not None:
            check_completion_length(given)
        config.segment_length = DEFAULT_SEGMENT_LENGTH if given is None else math.ceil(given / depth)
    if config.segment_length < 1:
        raise ValueError(f"segment_length is {config.segment_length}; a segment has at least one token")
    if config.min_segment_length > config.segment_length:
        raise ValueError(
            f"min_segment_length is {config.min_segment_length}, but a segment has at most segment_length="
            f"{config.segment_length} tokens; lower it"
        )
    most = depth * config.segment_length
    if config.max_completion_length is None:
        config.max_completion_length = most
    if config.split_rule in ("delimiter", "turn"):  # whose last segments run on
        check_completion_length(config.max_completion_length)
        return
    if not most - config.segment_length < config.max_completion_length <= most:
        raise ValueError(
            f"max_completion_length is {config.max_completion_length}, but {depth} segments of "
            f"{config.segment_length} tokens make completions of {most - config.segment_length + 1} to {most}; leave "
            f"max_completion_length unset, or leave segment_length unset to have it derived"
        )


def check_trees_fit(config: Any, steps_per_generation: int) -> None:
    """A whole tree lives on one process, so a process must generate a whole number of trees; and all processes
    together more than one where trees are compared with others.

    Raises:
        ValueError: They would not; the message has the numbers and values that work.
    """
    batch, leaves = config.per_device_train_batch_size, config.num_generations or 1
    if batch * steps_per_generation % leaves == 0:
        if config.generation_batch_size == leaves and ESTIMATORS[config.advantage_estimator].of_forest is not None:
            raise ValueError(
                f"a batch of {leaves} rows holds a single tree of num_generations={leaves} leaves, but "
                f"advantage_estimator='{config.advantage_estimator}' compares a tree with the others of its batch, so "
                "nothing would be trained. Use a smaller tree, or a larger per_device_train_batch_size or "
                "gradient_accumulation_steps: ten prompts a batch or more are good. Or take 'group_std', which "
                "compares siblings"
            )
        return
    trees = max(math.ceil(batch / leaves), 1 if ESTIMATORS[config.advantage_estimator].of_forest is None else 2)
    fitting = math.lcm(batch, leaves) // batch
    fix = f"steps_per_generation={math.ceil(steps_per_generation / fitting) * fitting}"
    if config.steps_per_generation is None or config.steps_per_generation == config.gradient_accumulation_steps:
        fix = f"{fix} (or gradient_accumulation_steps, which it defaults to)"
    raise ValueError(
        f"per_device_train_batch_size ({batch}) x steps_per_generation ({steps_per_generation}) = "
        f"{batch * steps_per_generation} rows a process is not a multiple of num_generations ({leaves}, the "
        f"leaves of a tree), but a whole tree lives on one process. Use {fix}, or "
        f"per_device_train_batch_size={trees * leaves}"
    )


@contextmanager
def one_completion_allowed(config: Any) -> Iterator[None]:
    """Have TRL resolve a configuration with one completion a prompt, which it refuses, as GRPO compares several.

    Meanwhile all rows of a batch stand for one prompt.
    """
    if config.num_generations != 1:
        yield
        return
    steps = config.steps_per_generation or config.gradient_accumulation_steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config.num_generations = config.generation_batch_size or config.per_device_train_batch_size * steps * processes
    if config.num_generations < 2:
        config.num_generations = 1
        raise ValueError(
            f"per_device_train_batch_size ({config.per_device_train_batch_size}) x steps_per_generation ({steps}) = 1 "
            "completion, which has nothing to be compared with. Raise per_device_train_batch_size, or "
            "gradient_accumulation_steps, which steps_per_generation defaults to"
        )
    config.num_generations_eval = config.num_generations_eval or 1
    yield
    config.num_generations = 1
