"""A node against its tree: advantages from the values along its path and of the tree as a whole.

Each function takes a tree with values and returns an advantage for each node; that of the root, and of nodes without a
value, is 0. What "unbiased" means stands in `siblings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from .values import VALUE_ROUNDING, ValuedTree


def tree_mean(tree: ValuedTree) -> list[float]:
    """A(c) = V(c) - mean reward of the leaves that are not below c: the root's value, without c's own share.

    Unbiased at every depth. A node that has all leaves below it is compared with nothing, so it gets 0.
    """
    total, counts = leaf_sums(tree)
    outside = [(total[0] - own, counts[0] - count) for own, count in zip(total, counts, strict=True)]
    return _of_valued(tree, lambda c: tree.value(c) - outside[c][0] / outside[c][1] if outside[c][1] else 0.0)


def parent(tree: ValuedTree) -> list[float]:
    """A(c) = V(c) - V(p(c)), p(c) the parent: the segment advantage of SPO-tree (arXiv:2505.23564).

    Unbiased: that V(p(c)) holds a share of V(c) only scales the expectation by (N - 1) / N, N siblings.
    """
    return _of_valued(tree, lambda c: tree.value(c) - tree.value(tree.parents[c]))


def treerl(tree: ValuedTree) -> list[float]:
    """A(c) = sqrt(n(c)) ((V(c) - V(root)) + (V(c) - V(p(c)))), n(c) leaves below c: TreeRL (arXiv:2506.11902).

    TreeRL divides by the root of n(c) and trains a shared step once for every leaf below it; here each node is trained
    once, so it is multiplied. Its code differs from its paper: it scales values before it takes differences, counts
    only the leaves selected for training, and gives -1 to responses that did not end. Biased where branches end early,
    as n(c) depends on what c drew: cosines 0.995 and 0.994 (see `siblings`).
    """
    _, counts = leaf_sums(tree)
    return _of_valued(
        tree, lambda c: math.sqrt(counts[c]) * (2 * tree.value(c) - tree.value(0) - tree.value(tree.parents[c]))
    )


def treepo(tree: ValuedTree) -> list[float]:
    """A(c) = n(c) mean over the ancestors g of c's leaves of (V(c) - V(g)): TreePO (arXiv:2508.17445), eq. 5.

    TreePO gives a trajectory with reward R the mean over its ancestors (the leaf left out) of R - V(g), and trains a
    shared step once for every leaf below it. Summed over the leaves below c this is what stands here: terms of
    ancestors at or below c cancel out. Its code takes off the mean over all tokens and divides by their standard
    deviation; here advantages are divided by their root mean square over the batch. Biased where branches end early,
    as n(c) depends on what c drew: cosines 0.995 and 0.993 (see `siblings`).
    """
    totals, counts = leaf_sums(tree)
    advantages = [0.0] * len(tree.parents)
    for leaf, reward in tree.rewards.items():
        if reward is None:
            continue
        path = path_to(tree, leaf)
        advantage = fmean(reward - totals[g] / counts[g] for g in (*path[1:], 0))
        for node in path:
            advantages[node] += advantage
    return advantages


def tree_grpo(tree: ValuedTree) -> list[float]:
    """A(c) = sum over the leaves below c of (R - mean(T)) / std(T) + (R - mean(all)) / std(all), R a leaf's reward, T
    the leaves of its tree, all those of its prompt: Tree-GRPO (arXiv:2509.21240).

    Tree-GRPO grows several trees for a prompt; here they are what hangs below each child of the root. It gives a
    trajectory the sum of the two, and trains a shared step once for every leaf below it: summed over these leaves,
    that is what stands here. Standard deviations are GRPO's, with 1e-4 added. Advantages are divided by their root
    mean square over the batch. Biased, as these hold the node itself: cosines 0.988 and 0.652 (see `siblings`).
    """
    scored = {leaf: reward for leaf, reward in tree.rewards.items() if reward is not None}
    paths = {leaf: path_to(tree, leaf) for leaf in scored}
    of_trees: dict[int, list[float]] = {}
    for leaf, reward in scored.items():
        of_trees.setdefault(paths[leaf][-1], []).append(reward)
    advantages = [0.0] * len(tree.parents)
    for leaf, reward in scored.items():
        advantage = sum(_normalized(reward, group) for group in (of_trees[paths[leaf][-1]], list(scored.values())))
        for node in paths[leaf]:
            advantages[node] += advantage
    return advantages


def path_to(tree: ValuedTree, node: int) -> list[int]:
    """From a node up to a child of the root."""
    path = [node]
    while tree.parents[path[-1]] != 0:
        path.append(tree.parents[path[-1]])
    return path


def _normalized(reward: float, group: Sequence[float]) -> float:
    """The reward by the mean and standard deviation of a group; 0 where all of it is equal but for rounding."""
    if max(group) - min(group) <= VALUE_ROUNDING * max(map(abs, group)):
        return 0.0
    return (reward - fmean(group)) / (stdev(group) + 1e-4)


def leaf_sums(tree: ValuedTree) -> tuple[list[float], list[int]]:
    """[N] sum of the rewards of the scored leaves at or below each node, [N] how many they are."""
    totals, counts = [0.0] * len(tree.parents), [0] * len(tree.parents)
    for leaf, reward in tree.rewards.items():
        if reward is not None:
            totals[leaf], counts[leaf] = reward, 1
    for node in range(len(tree.parents) - 1, 0, -1):
        totals[tree.parents[node]] += totals[node]
        counts[tree.parents[node]] += counts[node]
    return totals, counts


def _of_valued(tree: ValuedTree, advantage: Callable[[int], float]) -> list[float]:
    return [0.0 if node == 0 or tree.values[node] is None else advantage(node) for node in range(len(tree.parents))]
