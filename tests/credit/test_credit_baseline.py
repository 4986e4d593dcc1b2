"""The optimal baseline by hand, and laws of its regression."""

from dataclasses import replace
from fractions import Fraction
from math import sqrt

import numpy as np
import plain_credit
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_trees import RandomBackend, forests, leaf_rewards
from test_credit_paths import two_by_two, uneven

from treerpo_trl.credit import ValuedTree, assign_batch, optimal_baseline
from treerpo_trl.credit.baseline import RIDGE, _without_each, fit_baselines
from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.tree import ROOT, Segment, Tree


def weighted(tree: Tree, rewards, norms=None) -> ValuedTree:
    valued = ValuedTree.of(tree, leaf_rewards(tree, rewards))
    return valued if norms is None else replace(valued, score_norms=tuple(map(float, (0, *norms))))


def with_rows(forest, below) -> list[ValuedTree]:
    """The trees, with the number of rows below a node given by depth."""
    return [replace(tree, rows=tuple(below[depth] for depth in tree.depths)) for tree in forest]


def flat(rewards, norms) -> ValuedTree:
    """Leaves right below the root."""
    tree = Tree.from_prompt([0]).grow({ROOT: [Segment((1,), True)] * len(rewards)})
    return weighted(tree, rewards, norms)


def test_golden_weighted_means_of_the_other_tree():
    """Two trees have no slope: a fit to one other tree cannot be tried on another.

    First tree: leaves 1, 0, 0, 1, all weights 1. Second: 1, 1, 0, 1; nodes 1 and 2 weigh 1 and 3, leaves 1, 1, 4, 1.
    Depth 1: b of the first is (1 x 1 + 3 x .5) / 4 = .625, of the second .5; times sqrt 2 for two rows below.
    Depth 2: b of the first is (1 + 1 + 0 + 1) / 7, of the second .5.
    """
    trees = [
        weighted(two_by_two(), [1.0, 0.0, 0.0, 1.0], [1] * 6),
        weighted(two_by_two(), [1.0, 1.0, 0.0, 1.0], [1, 3, 1, 1, 4, 1]),
    ]
    first, second = optimal_baseline(with_rows(trees, [4, 2, 1]))
    assert first == pytest.approx([0, *[sqrt(2) * -0.125] * 2, 4 / 7, -3 / 7, -3 / 7, 4 / 7])
    assert second == pytest.approx([0, sqrt(2) * 0.5, 0, 0.5, 0.5, -0.5, 0.5])


def test_golden_means_of_single_samples():
    """Branching 1: no siblings, so no features. b is the others' weighted mean: 1 x 3 / 4, 0, and 1 x 1 / 2."""
    trees = [flat([reward], [norm]) for reward, norm in ((0.0, 1.0), (1.0, 3.0), (0.0, 1.0))]
    assert [of_tree[1] for of_tree in optimal_baseline(with_rows(trees, [1, 1]))] == pytest.approx([-0.75, 1.0, -0.75])


def test_golden_regression_on_the_sibling():
    """Three trees with leaves (0, 0), (1, 1) and (.5, .5), equal weights: a sibling tells the value.

    For the last tree: the others' pairs (x, V) are (0, 0) and (1, 1), twice. Their means are .5, the variance of x is
    .25, so the slope is .25 / (.25 x 1.02) = 1/1.02 and at x = .5 the regression says .5: b = b0 = .5 whatever s is.
    For the first tree: others (1, 1) and (.5, .5), so b0 = .75, slope 1/1.02, and at x = 0 it says
    .75 - .75/1.02. s: each other tree, predicted from one alone, has no slope, so the regression moves nothing: s = 0.
    """
    trees = [flat([value, value], [1, 1]) for value in (0.0, 1.0, 0.5)]
    first, second, third = optimal_baseline(with_rows(trees, [2, 1]))
    assert first == pytest.approx([0, -0.75, -0.75])
    assert second == pytest.approx([0, 0.75, 0.75])
    assert third == pytest.approx([0, 0, 0])


def test_golden_share_of_the_regression():
    """A fourth tree: what it is worth on others is known, as two of three predict the third.

    For the tree (1, 0), the others are pairs (0, 0), (1, 1) and (.5, .5). Each alone, from the other two, k = 1/1.02:
      (0, 0): b0 = .75, moved by k (0 - .75) = -.75k, where -.75 was right
      (1, 1): b0 = .25, moved by .75k, where .75 was right
      (.5, .5): b0 = .5, moved by 0.
    s = sum of move x right / sum of move^2 = 1/k, above 1, so it is 1. All three: mean .5, slope k.
    Leaf 1 has the sibling 0: b = .5 - .5k, leaf 2 the sibling 1: b = .5 + .5k.
    """
    trees = [flat([value, value], [1, 1]) for value in (0.0, 1.0, 0.5)] + [flat([1.0, 0.0], [1, 1])]
    k = 1 / (1 + RIDGE)
    assert optimal_baseline(with_rows(trees, [2, 1]))[3] == pytest.approx([0, 0.5 + 0.5 * k, -0.5 - 0.5 * k])


def test_golden_share_of_a_regression_that_misleads():
    """Trees (0, 0), (1, 1), (0, 0), (1, 0): for the fifth, each of the four is predicted from three others.

    With k = 1/1.02, all weights 1, pairs (x, V), of (1, 0) the pairs (0, 1) and (1, 0):
      both (0, 0): others (1,1)x2, (0,0)x2, (0,1), (1,0): b0 = .5, mean x .5, covariance 1/12, variance 1/4, slope k/3;
        at x = 0 moved by -k/6, where -.5 was right, in two pairs each
      (1, 1): others (0,0)x4, (0,1), (1,0): b0 = 1/6, mean x 1/6, covariance -1/36, variance 5/36, slope -k/5;
        at x = 1 moved by -k/6, where 5/6 was right, twice
      (1, 0): others (0,0)x4, (1,1)x2: b0 = 1/3, mean x 1/3, covariance = variance = 2/9, slope k;
        at x = 0 moved by -k/3 where 2/3 was right, at x = 1 by 2k/3 where -1/3 was right
    Sum of move x right: k (4/12 - 10/36 - 2/9 - 2/9) = -7k/18 < 0, so s = 0 and the mean, 3/8, is left.
    """
    trees = [flat(pair, [1, 1]) for pair in ([0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0])]
    assert optimal_baseline(with_rows(trees, [2, 1]))[4] == pytest.approx([0, 0.625, 0.625])


def test_a_batch_of_one_tree_is_compared_with_the_leaves_outside():
    """And a leaf alone with 0."""
    (advantages,) = optimal_baseline(with_rows([flat([0.8, -0.1], [1, 1])], [2, 1]))
    assert advantages == pytest.approx([0, 0.9, -0.9])
    (advantages,) = optimal_baseline(with_rows([weighted(uneven(), [1.0, 1.0, 0.0, None, None])], [9, 3, 1]))
    # Node 1 against 1, 0; node 2 (V = .5) against 1; leaves against those other two.
    assert advantages == pytest.approx([0, sqrt(3) * 0.5, sqrt(3) * -0.5, 0, 0.5, -1, 0, 0])
    assert optimal_baseline(with_rows([flat([0.7], [1])], [1, 1])) == [[0, 0.7]]
    assert optimal_baseline([]) == []


def test_a_depth_that_no_other_tree_reaches_has_the_leaves_outside():
    ended = flat([0.0, 1.0], [1, 1])
    deep = weighted(two_by_two(), [1.0, 0.0, 0.0, 0.0], [1] * 6)
    advantages = optimal_baseline(with_rows([ended, deep], [4, 2, 1]))[1]
    assert advantages[3:] == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_by_default_the_deepest_tree_of_a_batch_is_credited_to_its_leaves():
    trees = [uneven(), Tree.from_prompt([0]).grow({ROOT: [Segment((1,), True)]})]
    first, _ = assign_batch(trees, [leaf_rewards(tree, [1.0, 0.5, 0.0]) for tree in trees], "optimal_baseline")
    assert all(first.kept[1:]) and len({*first.advantages[4:]}) == 3


@pytest.mark.parametrize("tiny", [0.0, 1e-30])
def test_weights_many_powers_of_ten_apart_leave_no_rounding_behind(tiny):
    """A sure token weighs next to nothing. A difference of sums would make anything of what is left: here 0 / 0."""
    trees = [flat([1.0], [100.0]), flat([0.25], [tiny]), flat([0.75], [tiny])]
    (_, first), *_ = optimal_baseline(with_rows(trees, [1, 1]))
    # Weights of 0 tell nothing; then a tree is compared with its own leaves, of which there are none.
    assert first == pytest.approx(1.0 - 0.5 if tiny else 1.0)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8), st.integers(1, 9)), min_size=2, max_size=8),
    st.integers(0, 3),
)
def test_without_features_the_baseline_is_within_the_others_values(nodes, shift):
    tree_M, value_M, weight_M = (np.array(column) for column in zip(*nodes, strict=True))
    found = fit_baselines(tree_M, value_M / 8.0, weight_M * 10.0 ** (4 * shift * tree_M), np.ones((len(nodes), 1)), 4)
    for tree, baseline in zip(tree_M, found, strict=True):
        others = value_M[tree_M != tree] / 8
        assert np.isnan(baseline) if not len(others) else others.min() - 1e-9 <= baseline <= others.max() + 1e-9


@given(forests(min_branching=1, most=4), st.integers(0, 3), st.integers(0, 99))
def test_a_baseline_does_not_depend_on_what_lies_below_its_node(forest, place, seed):
    """Change the rewards below one node, and its own score norm: V(c) - A(c) / sqrt(r) stays as it was."""
    shape, trees = forest
    draw = np.random.default_rng(seed)
    rewards = [{leaf: draw.integers(0, 5) / 4 for leaf in tree.leaves} for tree in trees]
    index = place % len(trees)
    node = int(draw.integers(1, len(trees[index].nodes)))
    changed = [dict(each) for each in rewards]
    for leaf in trees[index].leaves:
        if node in trees[index].path(leaf):
            changed[index][leaf] = draw.integers(0, 5) / 4

    def baseline(of_trees, factor):
        forest = [ValuedTree.of(tree, each, shape.rows_below) for tree, each in zip(trees, of_trees, strict=True)]
        norms = [norm * (factor if at == node else 1) for at, norm in enumerate(forest[index].score_norms)]
        forest[index] = replace(forest[index], score_norms=tuple(norms))
        advantage = optimal_baseline(forest)[index][node]
        return forest[index].value(node) - advantage / sqrt(shape.rows_below(trees[index])[node])

    assert baseline(changed, 7.0) == pytest.approx(baseline(rewards, 1.0), abs=1e-9)


@given(st.lists(st.integers(0, 2**20), max_size=6))
def test_sums_without_each_are_sums_of_the_others(numbers):
    parts = np.array(numbers, dtype=float)
    assert _without_each(parts).tolist() == [sum(numbers) - number for number in numbers]


@pytest.mark.parametrize("zero", [-100.0, 3.0, 1000.0])
def test_rewards_far_from_zero_lose_nothing(zero):
    """Sums of their squares would: of a variance of 1e-4, around 1000, one digit in ten thousand would be wrong."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        tree_M, value_M = np.repeat(np.arange(4), 3), draw.integers(0, 9, 12) / 8
        x_M = draw.integers(0, 3, 4)[tree_M] / 4 + draw.integers(0, 2, 12) / 64
        found, shifted = (
            fit_baselines(tree_M, value_M + at, np.ones(12), np.stack([np.ones(12), x_M + at], 1), 4)
            for at in (0.0, zero)
        )
        assert shifted - zero == pytest.approx(found, abs=1e-10)


@pytest.mark.parametrize(("zero", "noise"), [(0.7, 1e-16), (1000.0, 1e-5)])
def test_a_feature_that_does_not_vary_has_no_slope(zero, noise):
    """Siblings that are all the same but for rounding tell nothing, and do not spoil what others tell."""
    draw = np.random.default_rng(0)
    tree_M, x_M = np.repeat(np.arange(5), 4), zero + draw.uniform(size=20)
    value_M, weight_M = zero + 0.5 * (x_M - zero) + 0.1 * draw.uniform(size=20), np.full(20, 100.0)
    constant_M = zero + noise * draw.integers(-1, 2, size=20)
    alone = fit_baselines(tree_M, value_M, weight_M, np.stack([np.ones(20), x_M], 1), 5)
    both = fit_baselines(tree_M, value_M, weight_M, np.stack([np.ones(20), constant_M, x_M], 1), 5)
    assert both - zero == pytest.approx(alone - zero, rel=1e-4)
    assert np.abs(both - value_M).mean() < 0.05 < np.abs(value_M - value_M.mean()).mean()


def test_by_default_a_node_has_one_row_and_score_norms_are_lengths():
    tree = Tree.from_prompt([0]).grow({ROOT: [Segment((1,) * 3, True), Segment((1,), True)]})
    rewards = [leaf_rewards(tree, values) for values in ([1.0, 0.0], [0.5, 0.5])]
    found = assign_batch([tree, tree], rewards, "optimal_baseline")
    # b is .5 for the first tree and (3 x 1 + 1 x 0) / 4 for the second.
    raw = [[0.5, -0.5], [-0.25, -0.25]]
    rms = sqrt(sum(length * a**2 for pair in raw for length, a in zip((3, 1), pair, strict=True)) / 8)
    assert [one.advantages[1:] for one in found] == [pytest.approx([a / rms for a in pair]) for pair in raw]
    assert all(one.kept == (False, True, True) for one in found)


def assert_as_plain(trees, rewards, shape) -> list[list[float]]:
    """Advantages are those of least squares from a library, with the fits that leave trees out written as loops."""
    expected = plain_credit.optimal_baseline(trees, rewards, shape.branching)
    forest = [
        ValuedTree.of(
            tree, {leaf: None if each is None else float(each) for leaf, each in of_tree.items()}, shape.rows_below
        )
        for tree, of_tree in zip(trees, rewards, strict=True)
    ]
    with np.errstate(divide="raise", invalid="raise"):
        advantages = optimal_baseline(forest)
    for found, of_nodes in zip(advantages, expected, strict=True):
        assert found == pytest.approx([of_nodes.get(node, 0.0) for node in range(len(found))], abs=1e-7)
    return advantages


@given(
    forests(min_branching=1, most=5),
    st.lists(st.one_of(st.none(), *[st.integers(0, 6)] * 4), min_size=1, max_size=9),
    st.integers(0, 99),
)
def test_any_batch_has_the_plain_references_advantages(forest, sixths, seed):
    shape, trees = forest
    draw = np.random.default_rng(seed)
    trees = [Tree(tuple(replace(node, score_norms=(draw.uniform(),)) for node in tree.nodes)) for tree in trees]
    exact = [None if each is None else Fraction(each, 6) for each in sixths]
    assert_as_plain(
        trees, [leaf_rewards(tree, exact[index:] + exact[:index]) for index, tree in enumerate(trees)], shape
    )


@pytest.mark.parametrize("branching", [(3,), (2, 2), (1, 3), (2, 1), (2, 1, 2), (3, 2)])
@pytest.mark.parametrize("none_share", [0.0, 0.15])
def test_siblings_that_tell_something_are_listened_to_as_the_plain_reference_does(branching, none_share):
    """Prompts of which some are easy: a regression is worth something, but not all. Some branches end early."""
    shape = TreeShape(branching, 3, 3 * len(branching))
    draw, trees, rewards = np.random.default_rng(7), [], []
    for index in range(7):
        (tree,) = grow([[1]], shape, RandomBackend(index, 0.1))
        trees.append(Tree(tuple(replace(node, score_norms=(draw.uniform(),)) for node in tree.nodes)))
        ease = draw.integers(0, 9)
        drawn = [Fraction(int(ease + draw.integers(0, 5)), 12) for _ in tree.leaves]
        rewards.append(leaf_rewards(tree, [None if draw.uniform() < none_share else each for each in drawn]))
    advantages = assert_as_plain(trees, rewards, shape)
    deaf = with_means_alone(trees, rewards, shape)
    changed = [a != pytest.approx(b) for a, b in zip(advantages, deaf, strict=True)]
    assert any(changed)


def with_means_alone(trees, rewards, shape) -> list[list[float]]:
    """What the weighted mean alone would give, depth by depth."""
    advantages = [[0.0] * len(tree.nodes) for tree in trees]
    for index, tree in enumerate(trees):
        for node in range(1, len(tree.nodes)):
            points = [
                plain_credit.point_of(other, trees[other], at, rewards[other])
                for other in range(len(trees))
                for at in range(1, len(trees[other].nodes))
                if other != index and trees[other].depths[at] == tree.depths[node]
                and plain_credit.value_of(trees[other], at, rewards[other]) is not None
            ]  # fmt: skip
            value, mean = plain_credit.value_of(tree, node, rewards[index]), plain_credit.weighted_mean(points)
            if value is not None and mean is not None:
                advantages[index][node] = sqrt(shape.rows_below(tree)[node]) * (float(value) - mean)
    return advantages
