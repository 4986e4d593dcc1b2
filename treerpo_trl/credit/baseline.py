"""A node against the whole batch: the baseline that leaves the least noise in the gradient.

Legend: T trees, M nodes at one depth, F features of the baseline (the constant 1 is the first).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .values import ValuedTree


Array = NDArray[Any]
RIDGE = 0.02  # on the slopes, as a share of the weighted variance of what they belong to
FLAT = 1e-10  # share of a square below which a variance is taken for rounding
ROUNDING = 1e-7  # share of the largest value below which deviations are rounding; rewards are float32


def optimal_baseline(forest: Sequence[ValuedTree]) -> list[list[float]]:
    """A(c) = sqrt(r(c)) (V(c) - b_d(c)): the variance-optimal baseline, fitted to the other trees of the batch.

    A baseline that does not depend on c's own sample leaves the expected gradient as it is. The one with the least
    variance is not the mean of V but the mean weighted by the squared norm of the score, E[|S|^2 V] / E[|S|^2]
    (the constant baseline of Greensmith, Bartlett & Baxter, JMLR 2004; within a prompt, with lengths for norms: OPO,
    arXiv:2505.23585; with the norm of the gradient of the logits, by token: Optimal Token Baseline, arXiv:2602.07078).
    Here, for each depth d,

        b_d(c) = b0 + s (a_0 + sum_k a_k x_k(c) - b0),

    with b0 the weighted mean at that depth and x_k(c) the mean value of the siblings of c's ancestor at depth k (c
    itself at k = d), which tell how the path was going. a is a weighted ridge regression, s in [0, 1] what the
    regression was worth on trees that it had not seen; where the batch does not support it, s is 0 and the weighted
    mean is left. b0, a and s are fitted without c's tree (s without it twice: each tree is predicted from the rest),
    and x_k does not depend on c either. So the estimator is unbiased up to a positive factor for each depth. Where no
    other tree has a node at the depth, b is the mean reward of the tree's leaves outside c, and 0 where there is none.
    r(c) are the rows of the batch that pass through c: what a sample of its value costs.

    Args:
        forest: The trees of the whole batch, of all processes.

    Returns:
        [T][N] advantages; 0 at roots and at nodes without a value.
    """
    advantages = [[0.0] * len(tree.parents) for tree in forest]
    features = [_sibling_means(tree) for tree in forest]
    for depth in range(1, max((max(tree.depths) for tree in forest), default=0) + 1):
        nodes = [
            (index, node)
            for index, tree in enumerate(forest)
            for node in range(1, len(tree.parents))
            if tree.depths[node] == depth and tree.values[node] is not None
        ]
        if not nodes:
            continue
        tree_M = np.array([index for index, _ in nodes])
        value_M = np.array([forest[index].value(node) for index, node in nodes])
        weight_M = np.array([forest[index].score_norms[node] for index, node in nodes])
        feature_MF = np.array([[1.0, *features[index][node]] for index, node in nodes])
        baseline_M = fit_baselines(tree_M, value_M, weight_M, feature_MF, len(forest))
        for (index, node), value, baseline in zip(nodes, value_M, baseline_M, strict=True):
            if math.isnan(baseline):
                baseline = _mean_outside(forest[index], node)
            advantages[index][node] = math.sqrt(forest[index].rows[node]) * float(value - baseline)
    return advantages


def fit_baselines(tree_M: Array, value_M: Array, weight_M: Array, feature_MF: Array, num_trees: int) -> Array:
    """[M] the baseline of each node, from the nodes of other trees; NaN where there is none with a weight.

    Args:
        tree_M: [M] index of each node's tree.
        value_M: [M] values.
        weight_M: [M] squared norms of the scores.
        feature_MF: [M, F] a 1, then the means of siblings; NaN where one does not exist.
        num_trees: T.
    """
    feature_MF = feature_MF[:, ~np.isnan(feature_MF).all(axis=0)]  # at some depths nothing has siblings
    is_known_M: Array = np.asarray(~np.isnan(feature_MF).any(axis=1))
    # Sums of squares of values far from 0 would lose the variance to rounding, so all is measured from the mean.
    zero, rounding = value_M.mean(), (ROUNDING * np.abs(value_M).max()) ** 2
    value_M = value_M - zero
    feature_MF = np.where(is_known_M[:, None], feature_MF, 0.0)
    feature_MF[is_known_M, 1:] -= zero
    # All that a fit needs to know of a tree: sums over its nodes of w x x', w x V; and of all nodes w and w V.
    weighted_MF = feature_MF * (weight_M * is_known_M)[:, None]
    gram_TFF = np.zeros((num_trees, feature_MF.shape[1], feature_MF.shape[1]))
    np.add.at(gram_TFF, tree_M, weighted_MF[:, :, None] * feature_MF[:, None, :])
    moment_TF = np.zeros((num_trees, feature_MF.shape[1]))
    np.add.at(moment_TF, tree_M, weighted_MF * value_M[:, None])
    weight_T, sum_T = np.zeros(num_trees), np.zeros(num_trees)
    np.add.at(weight_T, tree_M, weight_M)
    np.add.at(sum_T, tree_M, weight_M * value_M)

    mean_T = _without_each(sum_T) / _positive(_without_each(weight_T))
    baseline_M = mean_T[tree_M]
    for tree in np.unique(tree_M):
        share, slope_F = _fit_without(tree, gram_TFF, moment_TF, weight_T, sum_T, rounding)
        own = (tree_M == tree) & is_known_M
        baseline_M[own] += share * (feature_MF[own] @ slope_F - baseline_M[own])
    return baseline_M + zero


def _fit_without(
    tree: int, gram_TFF: Array, moment_TF: Array, weight_T: Array, sum_T: Array, rounding: float
) -> tuple[float, Array]:
    """The share s and the coefficients a of a regression on all trees but one.

    s minimises the weighted squared error of b0 + s (a'x - b0) over the other trees, each predicted without itself.
    """
    others = np.arange(len(weight_T)) != tree
    gram_TFF, moment_TF, weight_T, sum_T = (sums[others] for sums in (gram_TFF, moment_TF, weight_T, sum_T))
    gram_FF = gram_TFF.sum(axis=0)
    slope_F = _ridge(gram_FF[None], moment_TF.sum(axis=0)[None], rounding)[0]
    rest_TFF = _without_each(gram_TFF)
    is_fitted_T = rest_TFF[:, 0, 0] > 0  # if not, nothing moves
    mean_T = np.where(is_fitted_T, _without_each(sum_T) / _positive(_without_each(weight_T)), 0.0)
    move_TF = _ridge(rest_TFF, _without_each(moment_TF), rounding)
    move_TF[:, 0] -= mean_T  # coefficients of a'x - b0
    gain = np.einsum("tf,tf->", move_TF, moment_TF) - np.einsum("t,tf,tf->", mean_T, move_TF, gram_TFF[:, 0, :])
    size = np.einsum("tf,tfg,tg->", move_TF, gram_TFF, move_TF)
    variance = (np.diagonal(gram_FF) - gram_FF[0] ** 2 / max(gram_FF[0, 0], np.finfo(float).tiny)).sum()
    is_sound = size > max(FLAT * variance, 0.0)  # or the share would be the quotient of what rounding left
    return (float(np.clip(gain / size, 0.0, 1.0)) if is_sound else 0.0), slope_F


def _ridge(gram_TFF: Array, moment_TF: Array, rounding: float) -> Array:
    """[T, F] coefficients of weighted ridge regressions; the constant is not shrunk.

    Slopes are found from deviations from the weighted means, and the penalty is a share of their variance, so that
    neither the zero of the rewards nor their unit matters. A variance of no more than `rounding` is none.
    """
    weight_T = np.where(gram_TFF[:, 0, 0] > 0, gram_TFF[:, 0, 0], 1.0)[:, None]
    mean_TF = gram_TFF[:, 0, 1:] / weight_T
    gram_TFF, sum_T, moment_TF = gram_TFF[:, 1:, 1:], moment_TF[:, :1], moment_TF[:, 1:]
    centered_TFF = gram_TFF - (weight_T * mean_TF)[:, :, None] * mean_TF[:, None, :]
    variance_TF = np.diagonal(centered_TFF, axis1=1, axis2=2)
    is_flat_TF = variance_TF <= FLAT * np.diagonal(gram_TFF, axis1=1, axis2=2) + rounding * weight_T
    # A feature that does not vary has no slope, and no part in the others'.
    centered_TFF = np.where(is_flat_TF[:, :, None] | is_flat_TF[:, None, :], 0.0, centered_TFF)
    penalty_TF = np.where(is_flat_TF, 1.0, RIDGE * variance_TF)
    moment_TF = np.where(is_flat_TF, 0.0, moment_TF - mean_TF * sum_T)
    penalized_TFF = centered_TFF + penalty_TF[:, :, None] * np.eye(penalty_TF.shape[1])
    slope_TF: Array = np.linalg.solve(penalized_TFF, moment_TF[..., None])[..., 0]
    constant_T = sum_T / weight_T - (mean_TF * slope_TF).sum(axis=1, keepdims=True)
    return np.concatenate([constant_T, slope_TF], axis=1)


def _sibling_means(tree: ValuedTree) -> list[list[float]]:
    """[N] of each node: the mean value of the siblings of its ancestor at depth 1, 2, .., and of its own.

    NaN where an ancestor has no valued sibling.
    """
    means: list[list[float]] = [[] for _ in tree.parents]
    siblings = {node: [other for other in group if other != node] for group in tree.groups for node in group}
    for node in range(1, len(tree.parents)):
        others = [tree.value(other) for other in siblings.get(node, ())]
        means[node] = [*means[tree.parents[node]], sum(others) / len(others) if others else math.nan]
    return means


def _mean_outside(tree: ValuedTree, node: int) -> float:
    """Where no other tree is there: the mean reward of the tree's leaves that are not below the node; 0 for none."""
    is_below = [False] * len(tree.parents)
    is_below[node] = True
    for index in range(node + 1, len(tree.parents)):
        is_below[index] = is_below[index] or is_below[tree.parents[index]]
    outside = [reward for leaf, reward in tree.rewards.items() if reward is not None and not is_below[leaf]]
    return sum(outside) / len(outside) if outside else 0.0


def _without_each(part_T: Array) -> Array:
    """[T, ..] the sum of all trees' parts but one's, for each tree.

    Never as a difference, whose rounding may exceed what is left: some weights are many powers of ten below others.
    """
    zero = np.zeros_like(part_T[:1])
    before_T = np.concatenate([zero, part_T.cumsum(axis=0)[:-1]])
    after_T = np.concatenate([part_T[::-1].cumsum(axis=0)[:-1][::-1], zero])
    rest_T: Array = before_T + after_T
    return rest_T


def _positive(weights: Array) -> Array:
    return np.where(weights > 0, weights, np.nan)
