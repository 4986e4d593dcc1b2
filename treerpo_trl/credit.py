"""From the rewards of the leaves to the advantage of every node: back up, prune, estimate.

One pure function per equation of TreeRPO (arXiv:2506.05183). `None` stands for "no value": a leaf that no reward
function could score, or a node with no scored leaf below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .tree import Tree


# Rewards arrive as float32, so values and their differences carry its rounding: up to 6e-8 of a value for each sum.
VALUE_ROUNDING = 4 * 2.0**-24
# How far outside [0, 1] a weighted sum of rewards may lie by rounding.
ROUNDING = 1e-6


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


def treerpo(values: Sequence[float]) -> list[float]:
    """A(c) = (V(c) - mu) / (mu (1 - mu)), mu = mean of the group (TreeRPO, eq. 4). There is no square root.

    For values in [0, 1]; then |A| is at most the size of the group.
    """
    return _scaled_by_bernoulli(values, lambda variance: variance)


def bernoulli_std(values: Sequence[float]) -> list[float]:
    """A(c) = (V(c) - mu) / sqrt(mu (1 - mu)): TreeRPO's eq. 4 with the standard deviation of a Bernoulli variable.

    For values in [0, 1].
    """
    return _scaled_by_bernoulli(values, math.sqrt)


def group_std(values: Sequence[float]) -> list[float]:
    """A(c) = (V(c) - mu) / (sigma + 1e-4), sigma with Bessel's correction: GRPO (arXiv:2402.03300), as in TRL."""
    mean = fmean(values)
    scale = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) + 1e-4
    return [(value - mean) / scale for value in values]


def centered(values: Sequence[float]) -> list[float]:
    """A(c) = V(c) - mu: Dr. GRPO (arXiv:2503.20783)."""
    mean = fmean(values)
    return [value - mean for value in values]


def _scaled_by_bernoulli(values: Sequence[float], scale: Callable[[float], float]) -> list[float]:
    clipped = [min(max(value, 0.0), 1.0) for value in values]
    mean = fmean(clipped)
    variance = mean * (1 - mean)
    # Only a group whose values are all 0 or all 1 has no variance, and there every value is the mean.
    if variance <= 0:
        return [0.0] * len(clipped)
    return [(value - mean) / scale(variance) for value in clipped]


ESTIMATORS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "treerpo": treerpo,
    "bernoulli_std": bernoulli_std,
    "group_std": group_std,
    "centered": centered,
}
UNIT_INTERVAL_ESTIMATORS = frozenset({"treerpo", "bernoulli_std"})


@dataclass(frozen=True)
class ScoredTree:
    """A tree with its rewards, values and advantages.

    Args:
        tree: What was sampled, N nodes.
        rewards: Leaf index -> reward (the weighted sum over the reward functions), `None` if unscorable.
        values: [N] values; `None` where no leaf below could be scored.
        advantages: [N] advantage of each node within its group; 0 for nodes that are not kept.
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
    """Values, kept groups and advantages of a whole tree, from the rewards of its leaves.

    Args:
        tree: N nodes.
        rewards: Leaf index -> reward, `None` if unscorable.
        estimator: A name in `ESTIMATORS`.
        prune_threshold: tau of [`is_kept`].

    Raises:
        ValueError: A reward is not finite, or outside [0, 1] with an estimator made for that interval.
    """
    for leaf, reward in rewards.items():
        check_reward(reward, leaf, estimator)
    values = back_up(tree.parents, rewards)
    scale = max((abs(reward) for reward in rewards.values() if reward is not None), default=0.0)
    advantages, kept = [0.0] * len(values), [False] * len(values)
    for group in tree.children:
        valued = [(child, value) for child in group if (value := values[child]) is not None]
        group_values = [value for _, value in valued]
        if not is_kept(group_values, prune_threshold, scale):
            continue
        for (child, _), advantage in zip(valued, ESTIMATORS[estimator](group_values), strict=True):
            advantages[child], kept[child] = advantage, True
    return ScoredTree(tree, dict(rewards), tuple(values), tuple(advantages), tuple(kept))


def check_reward(reward: float | None, leaf: int, estimator: str) -> None:
    """Raise a ValueError that names the reward and the fix if `estimator` cannot work with it."""
    if reward is not None and (fault := find_reward_fault(reward, estimator)) is not None:
        raise ValueError(f"the reward of leaf {leaf} is {reward}{fault}")


def find_reward_fault(reward: float, estimator: str) -> str | None:
    """Why `estimator` cannot work with a leaf's reward and what to do, to go on with after it; `None` if it can."""
    if not math.isfinite(reward):
        return "; return a finite number, of which the weighted sum is finite too, or None to skip the sample"
    if estimator in UNIT_INTERVAL_ESTIMATORS and not -ROUNDING <= reward <= 1 + ROUNDING:
        return (
            f", but advantage_estimator='{estimator}' needs rewards in [0, 1] (it divides by a function of mu(1 - mu))"
            ". Scale the reward functions or reward_weights so that their weighted sum stays in [0, 1], or use "
            "advantage_estimator='group_std' or 'centered', which take any."
        )
    return None
