"""Credit that looks at a tree or at the whole batch, as plainly as it can be written; it shares no code with ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from math import prod, sqrt

import numpy as np

from treerpo_trl import Tree


Rewards = Mapping[int, Fraction | None]  # leaf -> reward
OF_TREE = ("parent", "tree_mean", "treerl", "treepo", "tree_grpo")
ROUNDING = 1e-6  # of the largest reward: advantages that small are none


def value_of(tree: Tree, node: int, rewards: Rewards) -> Fraction | None:
    """The plain mean of the children's values, down to the rewards of the leaves."""
    children = [child for child in range(len(tree.nodes)) if tree.nodes[child].parent == node]
    if not children:
        return rewards[node]
    values = [value for child in children if (value := value_of(tree, child, rewards)) is not None]
    return sum(values, Fraction(0)) / len(values) if values else None


def ancestors(tree: Tree, node: int) -> list[int]:
    """From the node's parent up to the root."""
    return [] if node == 0 else [tree.nodes[node].parent, *ancestors(tree, tree.nodes[node].parent)]


def scored_below(tree: Tree, node: int, rewards: Rewards) -> list[int]:
    """The leaves with a reward at or below a node."""
    return [leaf for leaf, reward in rewards.items() if reward is not None and node in (leaf, *ancestors(tree, leaf))]


def mean(values: Sequence[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def of_tree(tree: Tree, rewards: Rewards, estimator: str) -> dict[int, float]:
    """Node -> advantage, of every node with a value."""
    values = {node: value_of(tree, node, rewards) for node in range(len(tree.nodes))}
    advantages = {}
    for node in range(1, len(tree.nodes)):
        if values[node] is None:
            continue
        parent, below = values[tree.nodes[node].parent], scored_below(tree, node, rewards)
        if estimator == "parent":
            advantages[node] = float(values[node] - parent)
        elif estimator == "tree_mean":
            outside = [rewards[leaf] for leaf in scored_below(tree, 0, rewards) if leaf not in below]
            advantages[node] = float(values[node] - mean(outside)) if outside else 0.0
        elif estimator == "treerl":
            advantages[node] = sqrt(len(below)) * float(values[node] - values[0] + values[node] - parent)
        elif estimator == "tree_grpo":
            advantages[node] = sum(trajectory_of_tree_grpo(tree, leaf, rewards) for leaf in below)
        else:
            advantages[node] = float(sum(trajectory_of_treepo(tree, leaf, rewards) for leaf in below))
    return advantages


def trajectory_of_treepo(tree: Tree, leaf: int, rewards: Rewards) -> Fraction:
    """Its reward against the mean of the leaves below each of its ancestors, on average."""
    above = [[rewards[other] for other in scored_below(tree, node, rewards)] for node in ancestors(tree, leaf)]
    return mean([rewards[leaf] - mean(group) for group in above])


def trajectory_of_tree_grpo(tree: Tree, leaf: int, rewards: Rewards) -> float:
    """Its reward, normalized among the leaves below the same child of the root, and among all."""
    top = [leaf, *ancestors(tree, leaf)][-2]
    total = 0.0
    for node in (top, 0):
        group = [rewards[other] for other in scored_below(tree, node, rewards)]
        if len(group) > 1:
            variance = sum((reward - mean(group)) ** 2 for reward in group) / (len(group) - 1)
            total += float(rewards[leaf] - mean(group)) / (sqrt(variance) + 1e-4)
    return total


def rows_below(tree: Tree, node: int, branching: Sequence[int] | None) -> int:
    """The rows that pass a node: the leaves below its place in the complete tree or, without `branching`, its own."""
    if branching is not None:
        return prod(branching[len(ancestors(tree, node)) :])
    parents = {each.parent for each in tree.nodes}
    return sum(leaf not in parents and node in (leaf, *ancestors(tree, leaf)) for leaf in range(len(tree.nodes)))


def optimal_baseline(trees: Sequence[Tree], rewards: Sequence[Rewards], branching: Sequence[int] | None) -> list[dict]:
    """Of each tree, node -> sqrt(rows below) (V - b), b from the other trees alone."""
    advantages: list[dict[int, float]] = [{} for _ in trees]
    deepest = max(len(ancestors(tree, node)) for tree in trees for node in range(len(tree.nodes)))
    for depth in range(1, deepest + 1):
        points = [
            point_of(index, tree, node, rewards[index])
            for index, tree in enumerate(trees)
            for node in range(1, len(tree.nodes))
            if len(ancestors(tree, node)) == depth and value_of(tree, node, rewards[index]) is not None
        ]
        columns = [k for k in range(depth) if any(point["x"][k] is not None for point in points)]
        for point in points:
            point["known"] = all(point["x"][k] is not None for k in columns)
            point["x"] = np.array([1.0] + [float(point["x"][k]) for k in columns] if point["known"] else [])
        for point in points:
            others = [other for other in points if other["tree"] != point["tree"]]
            b = baseline(point, others)
            if b is None:
                index, node = point["tree"], point["node"]
                below = scored_below(trees[index], node, rewards[index])
                outside = [r for leaf, r in rewards[index].items() if r is not None and leaf not in below]
                b = float(mean(outside)) if outside else 0.0
            rows = rows_below(trees[point["tree"]], point["node"], branching)
            advantages[point["tree"]][point["node"]] = sqrt(rows) * (point["value"] - b)
    return advantages


def point_of(index: int, tree: Tree, node: int, rewards: Rewards) -> dict:
    """A node with its value, weight, and the mean value of the siblings of each node on its path; `None` for none."""
    path, means = [node, *ancestors(tree, node)][::-1], []
    for parent, own in pairwise(path):
        siblings = [other for other in range(len(tree.nodes)) if tree.nodes[other].parent == parent and other != own]
        values = [value for other in siblings if (value := value_of(tree, other, rewards)) is not None]
        means.append(mean(values) if values else None)
    norm = tree.nodes[node].score_norm
    weight = float(len(tree.nodes[node].token_ids)) if norm is None else norm
    return {"tree": index, "node": node, "value": float(value_of(tree, node, rewards)), "weight": weight, "x": means}


def baseline(point: dict, others: list[dict]) -> float | None:
    """b0 + s (a'x - b0)."""
    b0 = weighted_mean(others)
    if b0 is None or not point["known"] or len(point["x"]) == 1:
        return b0
    coefficients = regression(others)
    if coefficients is None:
        return b0
    return b0 + share(others) * (float(point["x"] @ coefficients) - b0)


def weighted_mean(points: list[dict]) -> float | None:
    weight = sum(point["weight"] for point in points)
    return sum(point["weight"] * point["value"] for point in points) / weight if weight > 0 else None


def regression(points: list[dict]) -> np.ndarray | None:
    """Least squares, weighted; the penalty is 0.02 of the weighted variance of each feature."""
    points = [point for point in points if point["known"] and point["weight"] > 0]
    if not points:
        return None
    x, weight = np.stack([point["x"] for point in points]), np.array([point["weight"] for point in points])
    value = np.array([point["value"] for point in points])
    center = weight @ x / weight.sum()
    variance = weight @ (x - center) ** 2
    moving = [k for k in range(1, x.shape[1]) if variance[k] > 1e-10 * (weight @ x[:, k] ** 2)]
    kept = [0, *moving]
    penalty = np.diag(np.sqrt(0.02 * variance))[np.ix_(moving, kept)]
    rows = np.concatenate([np.sqrt(weight)[:, None] * x[:, kept], penalty])
    targets = np.concatenate([np.sqrt(weight) * value, np.zeros(len(moving))])
    coefficients = np.zeros(x.shape[1])
    coefficients[kept] = np.linalg.lstsq(rows, targets, rcond=None)[0]
    return coefficients


def share(points: list[dict]) -> float:
    """What part of the regression's moves away from the mean was right, on trees left out of it one by one."""
    gain = size = 0.0
    for tree in {point["tree"] for point in points}:
        rest = [point for point in points if point["tree"] != tree]
        b0, coefficients = weighted_mean(rest), regression(rest)
        if b0 is None or coefficients is None:
            continue
        for point in points:
            if point["tree"] == tree and point["known"]:
                move = float(point["x"] @ coefficients) - b0
                gain += point["weight"] * move * (point["value"] - b0)
                size += point["weight"] * move**2
    known = [point for point in points if point["known"]]
    x, weight = np.stack([point["x"] for point in known]), np.array([point["weight"] for point in known])
    variance = (weight @ (x - weight @ x / weight.sum()) ** 2).sum() if weight.sum() > 0 else 0.0
    return min(max(gain / size, 0.0), 1.0) if size > 1e-10 * variance else 0.0


def to_unit_rms(trees: Sequence[Tree], rewards: Sequence[Rewards], advantages: list[dict]) -> list[dict]:
    """Divided by the root mean square over the tokens that have an advantage."""
    squares = tokens = 0.0
    for tree, of_nodes in zip(trees, advantages, strict=True):
        for node, advantage in of_nodes.items():
            squares += len(tree.nodes[node].token_ids) * advantage**2
            tokens += len(tree.nodes[node].token_ids)
    largest = max((float(abs(r)) for each in rewards for r in each.values() if r is not None), default=0.0)
    rms = sqrt(squares / tokens) if tokens else 0.0
    is_zero = rms <= ROUNDING * largest
    return [{node: 0.0 if is_zero else a / rms for node, a in of_nodes.items()} for of_nodes in advantages]
