"""From the rewards of the leaves to the value of every node, and which groups of siblings are worth comparing.

`None` stands for "no value": a leaf that no reward function could score, or a node with no scored leaf below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..tree import Tree


# Rewards arrive as float32, so values and their differences carry its rounding: up to 6e-8 of a value for each sum.
VALUE_ROUNDING = 4 * 2.0**-24


def back_up(parents: Sequence[int], rewards: Mapping[int, float | None]) -> list[float | None]:
    """V(n) = mean of V over n's children; V(leaf) = its reward (TreeRPO, section 3.1).

    The mean is plain: a child with many leaves below it counts as much as one with few. Children without a value are
    left out of it.

    Args:
        parents: [N] index of each node's parent, parents[i] < i; negative at the root.
        rewards: Leaf index -> reward, `None` if no reward function could score it.

    Returns:
        [N] values.

    Raises:
        ValueError: A leaf has no entry in `rewards`, or a node that is no leaf has one.
    """
    children: list[list[int]] = [[] for _ in parents]
    for index, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(index)
    values: list[float | None] = [None] * len(parents)
    for index in reversed(range(len(parents))):
        if bool(children[index]) == (index in rewards):
            kind = "an inner node, which takes no reward" if children[index] else "a leaf without a reward"
            raise ValueError(f"node {index} is {kind}; give exactly one reward (or None) to every leaf")
        if not children[index]:
            values[index] = rewards[index]
            continue
        valued = [value for child in children[index] if (value := values[child]) is not None]
        values[index] = fmean(valued) if valued else None
    return values


def is_kept(values: Sequence[float], prune_threshold: float | None, scale: float | None = None) -> bool:
    """Keep a group if and only if max - min > tau (TreeRPO, eq. 1-2). A group of fewer than two is never kept.

    A range that exceeds tau by no more than the rounding of rewards counts as equal to it: they are float32, in which
    0.1 - 0.0 is greater than 0.1, and the mean of 0.1, 0.2 and 0.3 is not 0.2.

    Args:
        values: Values of the group's valued members.
        prune_threshold: tau; `None`, or a negative number, keeps every group of two or more.
        scale: Largest absolute reward among those that the values are means of. By default that of the values, which
            is less where rewards cancel out.
    """
    if len(values) < 2:
        return False
    if prune_threshold is None or prune_threshold < 0:
        return True
    if scale is None:
        scale = max(map(abs, values))
    return max(values) - min(values) > prune_threshold + VALUE_ROUNDING * scale


@dataclass(frozen=True, slots=True)
class ValuedTree:
    """A tree as estimators see it, N nodes.

    Args:
        parents: [N] index of each node's parent, smaller than its own; negative at the root.
        depths: [N] depth of each node; the root has 0.
        values: [N] V of each node; `None` where no leaf below could be scored.
        rewards: Leaf index -> reward, `None` if unscorable.
        num_tokens: [N] sampled tokens of each node; 0 at the root.
        rows: [N] rows of the batch that pass through each node: what a sample of its value costs.
        score_norms: [N] squared norm of each node's score (the gradient of its log-probability), summed over its
            tokens, as far as it is known; otherwise its number of tokens.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    values: tuple[float | None, ...]
    rewards: Mapping[int, float | None]
    num_tokens: tuple[int, ...]
    rows: tuple[int, ...]
    score_norms: tuple[float, ...]

    @classmethod
    def of(
        cls, tree: Tree, rewards: Mapping[int, float | None], rows_below: Callable[[Tree], Sequence[int]] | None = None
    ) -> ValuedTree:
        """Values of a tree whose leaves have these rewards; `rows_below` gives the rows of its nodes, by default 1."""
        num_tokens = (0, *(node.num_sampled for node in tree.nodes[1:]))
        norms = tuple(
            float(length) if node.score_norm is None else node.score_norm
            for node, length in zip(tree.nodes, num_tokens, strict=True)
        )
        values = tuple(back_up(tree.parents, rewards))
        rows = (1,) * len(tree.nodes) if rows_below is None else tuple(rows_below(tree))
        return cls(tree.parents, tree.depths, values, dict(rewards), num_tokens, rows, norms)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The valued children of each node that has children, in order."""
        members: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            if parent >= 0 and self.values[node] is not None:
                members.setdefault(parent, []).append(node)
        return tuple(tuple(group) for group in members.values())

    def value(self, node: int) -> float:
        """V of a node that has one."""
        value = self.values[node]
        if value is None:
            raise ValueError(f"node {node} has no value: no leaf below it could be scored")
        return value
