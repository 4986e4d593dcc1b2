"""The `tree/*` numbers of a batch of trees and of a step, in a form that processes can pool."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import fmean
from typing import Any

from ..credit import ScoredTree
from ..growth import Shape
from ..tree import Tree


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean that can be pooled: `total / count`; undefined if the count is 0."""

    total: float
    count: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """The mean of `values`."""
        values = list(values)
        return cls(float(sum(values)), float(len(values)))

    def __add__(self, other: Mean) -> Mean:
        """The mean of both together."""
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float | None:
        """The mean, or `None` if it is undefined."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True, slots=True)
class Std:
    """A standard deviation with Bessel's correction, as TRL's, that can be pooled; undefined for fewer than two.

    Args:
        mean: The mean of the values.
        squares: The sum of their squared distances from it.
        count: How many they are.
    """

    mean: float
    squares: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Std:
        """The standard deviation of `values`."""
        values = list(values)
        mean = fmean(values) if values else 0.0
        return cls(mean, sum((value - mean) ** 2 for value in values), len(values))

    def __add__(self, other: Std) -> Std:
        """The standard deviation of both together (Chan, Golub and LeVeque, 1979, eq. 2.1)."""
        count = self.count + other.count
        if not count:
            return self
        distance, share = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + distance**2 * self.count * share
        return Std(self.mean + distance * share, squares, count)

    @property
    def value(self) -> float | None:
        """The standard deviation, or `None` if it is undefined."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else None


@dataclass(frozen=True, slots=True)
class Max:
    """The largest of some numbers, that can be pooled; undefined for none (`None`)."""

    value: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Max:
        """The largest of `values`."""
        return cls(max(values, default=None))

    def __add__(self, other: Max) -> Max:
        """The largest of both together."""
        return Max.of(value for value in (self.value, other.value) if value is not None)


Metrics = dict[str, Mean | Std | Max]


def pool(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of all processes together.

    What is undefined is left out: TRL logs a NaN as `None`, and TensorBoard and MLflow warn of every `None`.

    Args:
        parts: [P] each process's `Metrics`, with the same names.
    """
    values = {name: reduce(lambda a, b: a + b, (part[name] for part in parts)).value for name in parts[0]}
    return {name: value for name, value in values.items() if value is not None}


def step_metrics(seconds: Mapping[str, float], row_tokens: float, computed_tokens: float) -> Metrics:
    """What to log of an optimizer step.

    - `tree/seconds/{phase}`: seconds a process spent in the phase.
    - `tree/token_sharing_training`: tokens of the trained rows / tokens that their forward passes computed.

    Args:
        seconds: Phase -> seconds.
        row_tokens: Tokens of the rows of the step's micro-batches, prompts included, padding not.
        computed_tokens: Tokens that were computed of them.
    """
    phases = {f"tree/seconds/{phase}": Mean(spent, 1) for phase, spent in seconds.items()}
    return {**phases, "tree/token_sharing_training": Mean(row_tokens, computed_tokens)}


def call_metrics(num_trees: int, calls_made: int, calls_on_rows: int) -> Metrics:
    """What to log of the tool calls of a batch of trees.

    - `tree/tool_calls`: calls that were made, a tree.
    - `tree/call_sharing`: calls on the paths of its rows / these: what flat samples would have called.
    """
    return {
        "tree/tool_calls": Mean(calls_made, num_trees),
        "tree/call_sharing": Mean(calls_on_rows, calls_made),
    }


def tree_metrics(
    trees: Sequence[ScoredTree],
    shape: Shape,
    rewards: Sequence[float | None],
    rewards_by_func: Mapping[str, Sequence[float]],
    trained_tokens: int,
) -> Metrics:
    """What to log of a batch of trees; the same names, in the same order, whatever the trees hold.

    - `tree/nodes`: nodes a tree, the prompt left out.
    - `tree/leaves`: leaves a tree (fewer than it can have where branches end early or find no place to fork).
    - `tree/unique_leaves`: distinct trajectories a tree: leaves may have drawn the same tokens.
    - `tree/depth`: depth of a leaf; `tree/max_depth` of a tree's deepest leaf.
    - `tree/sampled_tokens`: sampled tokens a tree, each counted once.
    - `tree/token_sharing`: tokens of the tree's rows / its sampled tokens: what a flat sampler would have drawn for
      the same rows.
    - `tree/trained_tokens`: share of the sampled tokens that carry loss: those of kept nodes, but for the nodes that
      `mask_truncated_completions` takes out.
    - `tree/reward`, `tree/reward_std`: mean and standard deviation of the rewards of the distinct trajectories;
      `tree/rewards/{name}/mean` and `/std` of one reward function.
    - `tree/kept_groups`: share of groups that were not pruned (with an estimator that prunes nothing: that have a
      value); `tree/kept_groups/depth_d` of those at depth d. This and `tree/advantage_abs` are about values: also of
      nodes that `mask_truncated_completions` takes out of the loss.
    - `tree/value_mean/depth_d`, `tree/value_std/depth_d`: mean and standard deviation of the values at depth d.
    - `tree/value_range/depth_d`: max - min of the values of a group at depth d.
    - `tree/value_range_max`: the largest of these of any group with two values or more.
    - `tree/advantage_abs`: mean absolute advantage of the kept nodes; `tree/advantage_abs/depth_d` of those at d.

    Args:
        trees: This process's trees.
        shape: Of the trees.
        rewards: [U] reward of each distinct trajectory (the weighted sum over the reward functions), `None` if
            unscorable.
        rewards_by_func: Name of a reward function -> [U] its rewards; NaN where it gave none.
        trained_tokens: Number of tokens with a weight in the loss.
    """
    metrics: Metrics = {
        **_shape_metrics(trees, shape, len(rewards), trained_tokens),
        **_reward_metrics(rewards, rewards_by_func),
    }
    groups = [(scored, group) for scored in trees for group in scored.tree.children if group]
    compared = [values for scored, group in groups if len(values := _values(scored, group)) > 1]
    metrics["tree/value_range_max"] = Max.of(max(values) - min(values) for values in compared)
    metrics |= _kept_metrics(groups, "")
    for depth in range(1, shape.max_depth + 1):
        at_depth = [(scored, group) for scored, group in groups if scored.tree.depths[group[0]] == depth]
        valued = [values for scored, group in at_depth if (values := _values(scored, group))]
        metrics |= _kept_metrics(at_depth, f"/depth_{depth}")
        metrics[f"tree/value_mean/depth_{depth}"] = Mean.of(value for values in valued for value in values)
        metrics[f"tree/value_std/depth_{depth}"] = Std.of(value for values in valued for value in values)
        metrics[f"tree/value_range/depth_{depth}"] = Mean.of(max(values) - min(values) for values in valued)
    return metrics


def _shape_metrics(trees: Sequence[ScoredTree], shape: Shape, num_unique: int, trained_tokens: int) -> Metrics:
    leaf_depths = [[scored.tree.depths[leaf] for leaf in scored.tree.leaves] for scored in trees]
    sampled = Mean.of(scored.tree.num_sampled_tokens for scored in trees)
    return {
        "tree/nodes": Mean.of(len(scored.tree.nodes) - 1 for scored in trees),
        "tree/leaves": Mean.of(len(depths) for depths in leaf_depths),
        "tree/unique_leaves": Mean(num_unique, len(trees)),
        "tree/depth": Mean.of(depth for depths in leaf_depths for depth in depths),
        "tree/max_depth": Mean.of(max(scored.tree.depths) for scored in trees),
        "tree/sampled_tokens": sampled,
        "tree/token_sharing": Mean(sum(_row_tokens(scored.tree, shape) for scored in trees), sampled.total),
        "tree/trained_tokens": Mean(trained_tokens, sampled.total),
    }


def _reward_metrics(rewards: Sequence[float | None], rewards_by_func: Mapping[str, Sequence[float]]) -> Metrics:
    scored = [reward for reward in rewards if reward is not None]
    metrics: Metrics = {"tree/reward": Mean.of(scored), "tree/reward_std": Std.of(scored)}
    for name, given in rewards_by_func.items():
        scored = [reward for reward in given if not math.isnan(reward)]
        metrics[f"tree/rewards/{name}/mean"] = Mean.of(scored)
        metrics[f"tree/rewards/{name}/std"] = Std.of(scored)
    return metrics


def _kept_metrics(groups: Sequence[tuple[ScoredTree, tuple[int, ...]]], suffix: str) -> Metrics:
    return {
        f"tree/kept_groups{suffix}": Mean.of(any(scored.kept[child] for child in group) for scored, group in groups),
        f"tree/advantage_abs{suffix}": Mean.of(
            abs(scored.advantages[child]) for scored, group in groups for child in group if scored.kept[child]
        ),
    }


def _values(scored: ScoredTree, group: Sequence[int]) -> list[float]:
    return [value for child in group if (value := scored.values[child]) is not None]


def _row_tokens(tree: Tree, shape: Shape) -> int:
    """Sampled tokens of the tree's rows."""
    rows = shape.rows_below(tree)
    return sum(rows[node] * tree.nodes[node].num_sampled for node in range(1, len(tree.nodes)))
