"""Estimators that look at a tree, by hand; and laws that every estimator keeps, of trees and of whole batches."""

from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_trees import forests, leaf_rewards

from treerpo_trl.credit import (
    ESTIMATORS,
    ValuedTree,
    assign,
    assign_batch,
    parent,
    tree_grpo,
    tree_mean,
    treepo,
    treerl,
)
from treerpo_trl.credit.assign import scale_to_unit_rms
from treerpo_trl.tree import ROOT, Node, Segment, Tree


HALF = sqrt(0.5)
eighths = st.integers(0, 8).map(lambda number: number / 8)
some_rewards = st.lists(st.one_of(st.none(), eighths, eighths), min_size=1, max_size=9)
TAKES_ANY = [name for name, estimator in ESTIMATORS.items() if not estimator.needs_unit_interval]
HAS_UNIT_RMS = [name for name, estimator in ESTIMATORS.items() if estimator.has_unit_rms]


def two_by_two() -> Tree:
    """Nodes 1 and 2, and two leaves below each, of one token each."""
    tree = Tree.from_prompt([0]).grow({ROOT: [Segment((1,), False)] * 2})
    return tree.grow({node: [Segment((2,), True)] * 2 for node in (1, 2)})


def uneven() -> Tree:
    """Node 1 ended at once, 2 has three leaves, 3 has one."""
    tree = Tree.from_prompt([0]).grow({ROOT: [Segment((1,), True), Segment((1,), False), Segment((1,), False)]})
    return tree.grow({2: [Segment((2,), True)] * 3, 3: [Segment((2,), True)]})


def valued(tree: Tree, rewards) -> ValuedTree:
    return ValuedTree.of(tree, leaf_rewards(tree, rewards))


# Values of nodes 1, 2 and of the root: .5, .5, .5 for leaves 1, 0, 0, 1; and 1, .5, .75 for leaves 1, 1, 0, 1.
@pytest.mark.parametrize(
    ("function", "even", "better"),
    [
        (parent, [0, 0, 0, 0.5, -0.5, -0.5, 0.5], [0, 0.25, -0.25, 0, 0, -0.5, 0.5]),
        # The first leaf against the three others: 1 - 1/3; of the better tree 1 - 2/3.
        (tree_mean, [0, 0, 0, 2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0.5, -0.5, 1 / 3, 1 / 3, -1, 1 / 3]),
        # Of the better tree sqrt 2 x ((1 - .75) + (1 - .75)); its first leaf (1 - .75) + (1 - 1).
        (treerl, [0, 0, 0, 1, -1, -1, 1], [0, HALF, -HALF, 0.25, 0.25, -1.25, 0.75]),
        # Rows of the better tree: ((1 - .75) + (1 - 1)) / 2, the same, ((0 - .75) + (0 - .5)) / 2, and .75 / 2.
        (treepo, [0, 0, 0, 0.5, -0.5, -0.5, 0.5], [0, 0.25, -0.25, 0.125, 0.125, -0.625, 0.375]),
        # The first leaf among two and among four, 1 and 0 each: .5 / sqrt(1/2) + .5 / sqrt(1/3). Of the better tree,
        # among two that tie 0, among four .25 / .5.
        (
            tree_grpo,
            [0, 0, 0, HALF + 0.75**0.5, -HALF - 0.75**0.5, -HALF - 0.75**0.5, HALF + 0.75**0.5],
            [0, 1, -1, 0.5, 0.5, -HALF - 1.5, HALF + 0.5],
        ),
    ],
)
def test_golden_advantages_of_two_by_two_trees(function, even, better):
    rounding = {"rel": 3e-4} if function is tree_grpo else {}  # of the 1e-4 in its standard deviations
    assert function(valued(two_by_two(), [1.0, 0.0, 0.0, 1.0])) == pytest.approx(even, **rounding)
    assert function(valued(two_by_two(), [1.0, 1.0, 0.0, 1.0])) == pytest.approx(better, **rounding)


# Leaves 1 (at depth 1); 1, 0 and none; none. The root's value is (1 + .5) / 2, the mean of the leaves 2 / 3.
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (parent, [0, 0.25, -0.25, 0, 0.5, -0.5, 0, 0]),
        (tree_mean, [0, 0.5, -0.5, 0, 0.5, -1, 0, 0]),
        (treerl, [0, 0.5, -HALF, 0, 0.75, -1.25, 0, 0]),
        (treepo, [0, 1 / 3, -1 / 6, 0, 5 / 12, -7 / 12, 0, 0]),
    ],
)
def test_golden_advantages_of_a_tree_with_an_early_end_and_unscored_leaves(function, expected):
    assert function(valued(uneven(), [1.0, 1.0, 0.0, None, None])) == pytest.approx(expected)


def test_golden_batch_of_leaving_one_out():
    trees = [two_by_two(), two_by_two()]
    rewards = [leaf_rewards(trees[0], values) for values in ([1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])]
    first, second = assign_batch(trees, rewards, "leave_one_out", prune_threshold=None)
    assert first.advantages == (0, 0, 0, 1, -1, -1, 1) and second.advantages == (0, 0.5, -0.5, 0, 0, -1, 1)


@pytest.mark.parametrize("function", [parent, tree_mean, treerl, treepo, tree_grpo])
def test_a_path_without_branches_is_compared_with_nothing(function):
    tree = Tree.from_prompt([0]).grow({ROOT: [Segment((1,), False)]}).grow({1: [Segment((2,), True)]})
    assert function(valued(tree, [0.7])) == [0.0] * 3


@given(forests(), some_rewards)
def test_the_sum_over_the_leaves_of_treepo_is_zero(forest, rewards):
    """Each trajectory's advantage is relative to its ancestors, so a node has the sum of its children's."""
    for tree in forest[1]:
        advantages = treepo(valued(tree, rewards))
        for node, children in enumerate(tree.children):
            if node and children:
                assert advantages[node] == pytest.approx(sum(advantages[child] for child in children))


def with_norms(trees: list[Tree]) -> list[Tree]:
    """The trees, with score norms that differ between nodes."""
    return [
        Tree(tuple(replace(node, score_norms=(0.1 + sum(node.token_ids) % 7,)) for node in tree.nodes))
        for tree in trees
    ]


def advantages_of(name: str, trees, rewards, shape) -> list[tuple[float, ...]]:
    scored = assign_batch(trees, rewards, name, prune_threshold=None, rows_below=shape.rows_below)
    return [one.advantages for one in scored]


def approx(advantages):
    return [pytest.approx(of_tree, rel=1e-6, abs=1e-9) for of_tree in advantages]


def mirrored(tree: Tree) -> tuple[Tree, list[int]]:
    """The tree with the children of every node in reverse order, and the new place of each node."""
    nodes, places, waiting = [tree.nodes[ROOT]], [0] * len(tree.nodes), [ROOT]
    for node in waiting:
        for child in reversed(tree.children[node]):
            places[child] = len(nodes)
            nodes.append(replace(tree.nodes[child], parent=places[node]))
            waiting.append(child)
    return Tree(tuple(nodes)), places


batches = forests(min_branching=1, most=4)


@pytest.mark.parametrize("name", ESTIMATORS)
@given(forest=batches, rewards=some_rewards)
def test_relabelling_siblings_of_a_batch_changes_nothing(name, forest, rewards):
    shape, trees = forest[0], with_norms(forest[1])
    given_rewards = [leaf_rewards(tree, rewards) for tree in trees]
    pairs = [mirrored(tree) for tree in trees]
    moved = [
        {places[leaf]: reward for leaf, reward in of_tree.items()}
        for (_, places), of_tree in zip(pairs, given_rewards, strict=True)
    ]
    expected = advantages_of(name, trees, given_rewards, shape)
    found = advantages_of(name, [tree for tree, _ in pairs], moved, shape)
    assert [[of_tree[place] for place in places] for of_tree, (_, places) in zip(found, pairs, strict=True)] == approx(
        expected
    )


@pytest.mark.parametrize("name", ESTIMATORS)
@given(forest=batches, rewards=some_rewards, draw=st.randoms())
def test_permuting_trees_permutes_advantages(name, forest, rewards, draw):
    shape, trees = forest[0], with_norms(forest[1])
    given_rewards = [leaf_rewards(tree, rewards[index:] + rewards[:index]) for index, tree in enumerate(trees)]
    order = list(range(len(trees)))
    draw.shuffle(order)
    expected = advantages_of(name, trees, given_rewards, shape)
    found = advantages_of(name, [trees[i] for i in order], [given_rewards[i] for i in order], shape)
    assert found == approx([expected[i] for i in order])


@pytest.mark.parametrize("name", TAKES_ANY)
@given(forest=forests(most=4), rewards=some_rewards, shift=st.sampled_from([-100.0, -1.0, 0.5, 3.0]))
def test_the_zero_of_rewards_does_not_matter(name, forest, rewards, shift):
    """Of estimators that need no interval. Only the optimal baseline is 0 where nothing else was scored."""
    shape, trees = forest[0], with_norms(forest[1])
    if name == "optimal_baseline":
        rewards = [0.5 if each is None else each for each in rewards]
    given_rewards = [leaf_rewards(tree, rewards) for tree in trees]
    shifted = [leaf_rewards(tree, [None if each is None else each + shift for each in rewards]) for tree in trees]
    expected = advantages_of(name, trees, given_rewards, shape)
    for of_tree, other in zip(expected, advantages_of(name, trees, shifted, shape), strict=True):
        assert other == pytest.approx(of_tree, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "name", sorted({*TAKES_ANY} - {"group_std", "tree_grpo"})
)  # their 1e-4 has the unit of rewards
@given(forest=batches, rewards=some_rewards, factor=st.sampled_from([1e-3, 0.3, 50.0]))
def test_the_unit_of_rewards_is_that_of_advantages_or_does_not_matter(name, forest, rewards, factor):
    shape, trees = forest[0], with_norms(forest[1])
    scaled = [leaf_rewards(tree, [None if each is None else each * factor for each in rewards]) for tree in trees]
    expected = advantages_of(name, trees, [leaf_rewards(tree, rewards) for tree in trees], shape)
    unit = 1.0 if ESTIMATORS[name].has_unit_rms else factor
    for of_tree, other in zip(expected, advantages_of(name, trees, scaled, shape), strict=True):
        assert other == pytest.approx([unit * advantage for advantage in of_tree], rel=1e-6, abs=1e-9 * unit)


@pytest.mark.parametrize("name", HAS_UNIT_RMS)
@given(forest=batches, rewards=some_rewards)
def test_the_root_mean_square_over_trained_tokens_is_one(name, forest, rewards):
    shape, trees = forest
    scored = assign_batch(trees, [leaf_rewards(tree, rewards) for tree in trees], name, rows_below=shape.rows_below)
    squares = tokens = 0.0
    for one in scored:
        for node, advantage, kept in zip(one.tree.nodes, one.advantages, one.kept, strict=True):
            squares += len(node.token_ids) * advantage**2 * kept
            tokens += len(node.token_ids) * kept
    assert squares == 0 or squares / tokens == pytest.approx(1)


@pytest.mark.parametrize("name", ESTIMATORS)
@given(forest=batches, rewards=some_rewards, cut=st.integers(0, 4))
def test_two_processes_give_what_one_does_bit_for_bit(name, forest, rewards, cut):
    shape, trees = forest[0], with_norms(forest[1])
    given_rewards = [leaf_rewards(tree, rewards[index:] + rewards[:index]) for index, tree in enumerate(trees)]
    everything = [ValuedTree.of(*pair, shape.rows_below) for pair in zip(trees, given_rewards, strict=True)]
    found, cut = [], min(cut, len(trees))
    for start, end in ((0, cut), (cut, len(trees))):
        found += assign_batch(
            trees[start:end], given_rewards[start:end], name, rows_below=shape.rows_below,
            gather=lambda own, start=start: (everything, start),
        )  # fmt: skip
    assert found == assign_batch(trees, given_rewards, name, rows_below=shape.rows_below)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_batches_with_nothing_to_learn_have_no_advantage(name):
    """No reward; all equal, up to rounding, over the batch; a single path that earned nothing."""
    path = Tree.from_prompt([0]).grow({ROOT: [Segment((1,), True)]})
    trees = [two_by_two(), uneven(), two_by_two()]
    for reward in (None, 0.0, 1.0, 0.7, 0.1 + 0.2):
        scored = assign_batch(trees, [leaf_rewards(tree, [reward]) for tree in trees], name, prune_threshold=None)
        assert all(one.advantages == pytest.approx([0.0] * len(one.values), abs=1e-9) for one in scored)
    assert assign(path, {1: 0.0}, name).advantages == (0.0, 0.0)
    assert assign_batch([], [], name) == []


@pytest.mark.parametrize("name", HAS_UNIT_RMS)
def test_rounding_is_not_scaled_up(name):
    """Values that tie but for rounding would otherwise have the root mean square of real differences."""
    trees = [two_by_two()] * 3
    rewards = [leaf_rewards(tree, [0.7, 0.1 + 0.6, 0.7 + 1e-8, 0.7]) for tree in trees]
    assert all(set(one.advantages) == {0.0} for one in assign_batch(trees, rewards, name))
    rewards = [leaf_rewards(tree, [0.7, 0.7, 0.7 + 1e-4, 0.7]) for tree in trees]
    assert all(max(map(abs, one.advantages)) > 1 for one in assign_batch(trees, rewards, name))


def test_scaling_counts_the_tokens_of_valued_nodes_only():
    """Of 1, 2 and 5 tokens, the last without a value: sqrt((1 x 4^2 + 2 x 1^2) / 3) = sqrt 6."""
    nodes = (Node(-1, (0,)), Node(0, (1,), True), Node(0, (1, 1), True), Node(0, (1,) * 5, True))
    tree = ValuedTree.of(Tree(nodes), {1: 1.0, 2: 0.0, 3: None})
    (scaled,) = scale_to_unit_rms([tree], [[0.0, 4.0, 1.0, 9.0]])
    assert scaled[1:3] == pytest.approx([4 / sqrt(6), 1 / sqrt(6)])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_only_estimators_that_look_at_the_batch_gather_it(name):
    """Which costs communication, in every process or in none."""
    calls, tree = [], two_by_two()
    assign_batch([tree], [leaf_rewards(tree, [1.0, 0.0])], name, gather=lambda own: (calls.append(own), (own, 0))[1])
    assert len(calls) == ESTIMATORS[name].needs_batch == (name in ("treepo", "tree_grpo", "optimal_baseline"))
    assert ESTIMATORS[name].needs_siblings == (name != "optimal_baseline")
