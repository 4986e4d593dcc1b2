"""From rewards to scored trees: values, which nodes are trained, and with what advantage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..tree import Tree
from .estimators import ESTIMATORS, Estimator
from .values import VALUE_ROUNDING, ValuedTree, is_kept


# How far outside [0, 1] a weighted sum of rewards may lie by rounding.
ROUNDING = 1e-6
Forest = Sequence[ValuedTree]


@dataclass(frozen=True)
class ScoredTree:
    """A tree with its rewards, values and advantages.

    Args:
        tree: What was sampled, N nodes.
        rewards: Leaf index -> reward (the weighted sum over the reward functions), `None` if unscorable.
        values: [N] values; `None` where no leaf below could be scored.
        advantages: [N] advantage of each node, by the estimator; 0 for nodes that are not kept.
        kept: [N] whether the node is trained: it has a value and its group was not pruned. The root never is.
    """

    tree: Tree
    rewards: Mapping[int, float | None]
    values: tuple[float | None, ...]
    advantages: tuple[float, ...]
    kept: tuple[bool, ...]


def assign(
    tree: Tree, rewards: Mapping[int, float | None], estimator: str = "treerpo", prune_threshold: float | None = 0.1
) -> ScoredTree:
    """[`assign_batch`] for a batch of a single tree."""
    return assign_batch([tree], [rewards], estimator, prune_threshold)[0]


def assign_batch(
    trees: Sequence[Tree],
    rewards: Sequence[Mapping[int, float | None]],
    estimator: str = "treerpo",
    prune_threshold: float | None = 0.1,
    rows_below: Callable[[Tree], Sequence[int]] | None = None,
    gather: Callable[[list[ValuedTree]], tuple[Forest, int]] | None = None,
) -> list[ScoredTree]:
    """Values, kept nodes and advantages of the trees of a batch, from the rewards of their leaves.

    Args:
        trees: This process's trees.
        rewards: Of each tree, leaf index -> reward, `None` if unscorable.
        estimator: A name in `ESTIMATORS`.
        prune_threshold: tau of [`is_kept`], for estimators that compare siblings.
        rows_below: Gives the rows of the batch that pass through each node of a tree; all 1 by default.
        gather: Gives the trees of all processes, in order, and the place of this process's first one. By default this
            process is the only one.

    Raises:
        ValueError: A reward is not finite, or outside [0, 1] with an estimator made for that interval.
    """
    for tree_rewards in rewards:
        for leaf, reward in tree_rewards.items():
            check_reward(reward, leaf, estimator)
    chosen = ESTIMATORS[estimator]
    own = [ValuedTree.of(tree, tree_rewards, rows_below) for tree, tree_rewards in zip(trees, rewards, strict=True)]
    forest, start = gather(own) if gather is not None and chosen.needs_batch else (own, 0)
    kept = [_kept(tree, chosen, prune_threshold) for tree in own]
    if chosen.of_forest is not None:
        advantages = chosen.of_forest(forest)
    else:
        advantages = [_of_tree(tree, chosen) for tree in forest]
    if chosen.has_unit_rms:
        advantages = scale_to_unit_rms(forest, advantages)
    return [
        ScoredTree(
            tree,
            valued.rewards,
            valued.values,
            tuple(advantage if keep else 0.0 for advantage, keep in zip(of_tree, of_kept, strict=True)),
            tuple(of_kept),
        )
        for tree, valued, of_tree, of_kept in zip(trees, own, advantages[start : start + len(own)], kept, strict=True)
    ]


def _of_tree(tree: ValuedTree, estimator: Estimator) -> list[float]:
    """[N] advantages of a tree that depend on it alone."""
    if estimator.of_tree is not None:
        return estimator.of_tree(tree)
    assert estimator.of_group is not None
    advantages = [0.0] * len(tree.parents)
    for group in tree.groups:
        if len(group) > 1:
            of_group = estimator.of_group([tree.value(node) for node in group])
            for node, advantage in zip(group, of_group, strict=True):
                advantages[node] = advantage
    return advantages


def _kept(tree: ValuedTree, estimator: Estimator, prune_threshold: float | None) -> list[bool]:
    """[N] whether a node is trained: it has a value and, where siblings are compared, its group is not pruned."""
    kept = [False] * len(tree.parents)
    scale = max((abs(reward) for reward in tree.rewards.values() if reward is not None), default=0.0)
    for group in tree.groups:
        values = [tree.value(node) for node in group]
        if not estimator.prunes or is_kept(values, prune_threshold, scale):
            for node in group:
                kept[node] = True
    return kept


def scale_to_unit_rms(forest: Forest, advantages: Sequence[Sequence[float]]) -> list[list[float]]:
    """Divide by the root mean square over the sampled tokens of all nodes that have a value.

    Advantages no larger than the rounding of rewards become 0: where all rewards are equal, they would be noise.
    """
    squares = num_tokens = 0.0
    for tree, of_tree in zip(forest, advantages, strict=True):
        for node, advantage in enumerate(of_tree):
            if tree.values[node] is not None:
                squares += tree.num_tokens[node] * advantage**2
                num_tokens += tree.num_tokens[node]
    rms = math.sqrt(squares / num_tokens) if num_tokens else 0.0
    scale = max(
        (abs(reward) for tree in forest for reward in tree.rewards.values() if reward is not None), default=0.0
    )
    rounding = VALUE_ROUNDING * scale * math.sqrt(max((len(tree.rewards) for tree in forest), default=0))
    return [[advantage / rms if rms > rounding else 0.0 for advantage in of_tree] for of_tree in advantages]


def check_reward(reward: float | None, leaf: int, estimator: str) -> None:
    """Raise a ValueError that names the reward and the fix if `estimator` cannot work with it."""
    if reward is not None and (fault := find_reward_fault(reward, estimator)) is not None:
        raise ValueError(f"the reward of leaf {leaf} is {reward}{fault}")


def find_reward_fault(reward: float, estimator: str) -> str | None:
    """Why `estimator` cannot work with a leaf's reward and what to do, to go on with after it; `None` if it can."""
    if not math.isfinite(reward):
        return "; return a finite number, of which the weighted sum is finite too, or None to skip the sample"
    if ESTIMATORS[estimator].needs_unit_interval and not -ROUNDING <= reward <= 1 + ROUNDING:
        return (
            f", but advantage_estimator='{estimator}' needs rewards in [0, 1] (it divides by a function of mu(1 - mu))"
            ". Scale the reward functions or reward_weights so that their weighted sum stays in [0, 1], or use "
            "advantage_estimator='group_std' or 'centered', which take any."
        )
    return None
