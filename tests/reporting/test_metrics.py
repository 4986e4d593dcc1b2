"""The tree/* numbers: a tree small enough to count by hand, and laws on random trees."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_trees import any_forests, leaf_rewards

from treerpo_trl.credit import ScoredTree, assign
from treerpo_trl.growth import TreeShape
from treerpo_trl.reporting.metrics import Mean, Metrics, Std, pool, step_metrics, tree_metrics
from treerpo_trl.rows import DistinctRows, RowRewards
from treerpo_trl.tree import ROOT, Segment, Tree


REWARDS = st.lists(st.sampled_from([0.0, 0.25, 1.0, None]), min_size=1, max_size=5)
NUMBERS = st.lists(st.floats(-1e3, 1e3), max_size=6)


def metrics_of(scored: list[ScoredTree], shape: TreeShape) -> Metrics:
    """The metrics of trees as the trainer has them: by way of the rows."""
    rows = [(tree, leaf) for tree in scored for leaf in shape.slots(tree.tree)]
    distinct = DistinctRows.of([tree.tree.completion_ids(leaf) for tree, leaf in rows], shape.num_leaves)
    rewards = torch.tensor(
        [[float("nan") if (reward := tree.rewards[leaf]) is None else reward] for tree, leaf in rows]
    )
    given = RowRewards.of(rewards.view(-1, 1), torch.ones(1), ["only"], distinct)
    nodes = [pair for tree in scored for pair in zip(tree.tree.nodes, tree.kept, strict=True)]
    trained_tokens = sum(len(node.token_ids) for node, is_kept in nodes if is_kept)
    return tree_metrics(scored, shape, given.distinct, given.by_func, trained_tokens)


def test_golden_numbers():
    tree = Tree.from_prompt([9]).grow({ROOT: [Segment((1, 2), True), Segment((3, 4, 5), False)]})
    tree = tree.grow({2: [Segment((6,), True), Segment((7, 8), False)]})
    scored = assign(tree, {1: 1.0, 3: 0.5, 4: 0.5})
    by_func = {"a": [1.0, 0.0, 0.25], "b": [math.nan, 1, 1]}
    metrics = pool([tree_metrics([scored], TreeShape((2, 2), 3, 6), [1.0, 0.5, 0.5], by_func, trained_tokens=5)])
    assert metrics == {
        "tree/nodes": 4,
        "tree/leaves": 3,
        "tree/unique_leaves": 3,
        "tree/depth": pytest.approx(5 / 3),
        "tree/max_depth": 2,
        "tree/sampled_tokens": 8,
        "tree/token_sharing": (2 + 2 + 4 + 5) / 8,
        "tree/trained_tokens": 5 / 8,
        "tree/reward": pytest.approx(2 / 3),
        "tree/reward_std": pytest.approx(statistics.stdev([1, 0.5, 0.5])),
        "tree/rewards/a/mean": pytest.approx(1.25 / 3),
        "tree/rewards/a/std": pytest.approx(statistics.stdev([1, 0, 0.25])),
        "tree/rewards/b/mean": 1,
        "tree/rewards/b/std": 0,
        "tree/kept_groups": 0.5,
        "tree/advantage_abs": pytest.approx(0.25 / (0.75 * 0.25)),
        "tree/kept_groups/depth_1": 1,
        "tree/value_mean/depth_1": 0.75,
        "tree/value_std/depth_1": pytest.approx(statistics.stdev([1, 0.5])),
        "tree/value_range_max": 0.5,
        "tree/value_range/depth_1": 0.5,
        "tree/advantage_abs/depth_1": pytest.approx(0.25 / (0.75 * 0.25)),
        "tree/kept_groups/depth_2": 0,  # so no advantage has a size there
        "tree/value_mean/depth_2": 0.5,
        "tree/value_std/depth_2": 0,
        "tree/value_range/depth_2": 0,
    }


def test_advantages_by_depth():
    tree = Tree.from_prompt([9]).grow({ROOT: [Segment((1,), True), Segment((3,), False)]})
    tree = tree.grow({2: [Segment((6,), True), Segment((7,), True)]})
    metrics = pool([metrics_of([assign(tree, {1: 1.0, 3: 1.0, 4: 0.0})], TreeShape((2, 2), 3, 6))])
    sizes = [metrics[f"tree/advantage_abs{depth}"] for depth in ("/depth_1", "/depth_2", "")]
    assert sizes == pytest.approx([0.25 / (0.75 * 0.25), 2, (4 / 3 + 2) / 2])


def test_leaves_with_the_same_tokens_are_one_trajectory():
    """Unlike in TRL's `reward`, where each of the rows counts: 2 of the right leaf, of 4."""
    tree = Tree.from_prompt([9]).grow({ROOT: [Segment((1,), True), Segment((2,), False)]})
    tree = tree.grow({2: [Segment((3,), True), Segment((3,), True)]})
    metrics = pool([metrics_of([assign(tree, {1: 1.0, 3: 0.25, 4: 0.25})], TreeShape((2, 2), 3, 6))])
    assert (metrics["tree/leaves"], metrics["tree/unique_leaves"]) == (3, 2)
    assert metrics["tree/reward"] == metrics["tree/rewards/only/mean"] == 0.625
    assert metrics["tree/reward_std"] == pytest.approx(statistics.stdev([1, 0.25]))


@given(any_forests())
def test_token_sharing_counts_the_rows(forest):
    """But for those that only fill the batch, where a tree forked less often than it could."""
    shape, trees = forest
    scored = [assign(tree, leaf_rewards(tree, [0.0, 1.0])) for tree in trees]
    rows = sum(shape.rows_below(tree)[leaf] * tree.lengths[leaf] for tree in trees for leaf in tree.leaves)
    assert metrics_of(scored, shape)["tree/token_sharing"].total == pytest.approx(rows)


@given(any_forests(), REWARDS)
def test_values_by_depth_are_those_of_all_nodes(forest, rewards):
    shape, trees = forest
    scored = [assign(tree, leaf_rewards(tree, rewards)) for tree in trees]
    metrics = pool([metrics_of(scored, shape)])
    for depth in range(1, shape.max_depth + 1):
        values = [
            value
            for tree in scored
            for value, its_depth in zip(tree.values, tree.tree.depths, strict=True)
            if value is not None and its_depth == depth
        ]
        name = f"/depth_{depth}"
        assert metrics.get(f"tree/value_mean{name}") == (pytest.approx(statistics.fmean(values)) if values else None)
        expected = pytest.approx(statistics.stdev(values), abs=1e-9) if len(values) > 1 else None
        assert metrics.get(f"tree/value_std{name}") == expected


@given(any_forests())
def test_the_value_at_depth_one_is_that_of_the_prompts(forest):
    shape, trees = forest
    scored = [assign(tree, leaf_rewards(tree, [0.0, 1.0, 0.5])) for tree in trees]
    mean = metrics_of(scored, shape)["tree/value_mean/depth_1"].value
    assert mean == pytest.approx(statistics.fmean(tree.values[ROOT] for tree in scored))


@given(any_forests(), REWARDS)
def test_numbers_by_depth_add_up_to_those_of_the_tree(forest, rewards):
    shape, trees = forest
    metrics = metrics_of([assign(tree, leaf_rewards(tree, rewards)) for tree in trees], shape)
    for name in ("tree/kept_groups", "tree/advantage_abs"):
        depths = [metrics[f"{name}/depth_{depth}"] for depth in range(1, shape.max_depth + 1)]
        assert sum(mean.count for mean in depths) == metrics[name].count
        assert sum(mean.total for mean in depths) == pytest.approx(metrics[name].total)


@given(any_forests())
def test_the_shape_of_a_tree_is_bounded_by_the_complete_one(forest):
    shape, (tree, *_) = forest
    metrics = pool([metrics_of([assign(tree, leaf_rewards(tree, [1.0]))], shape)])
    assert 1 <= metrics["tree/unique_leaves"] <= metrics["tree/leaves"] <= shape.num_leaves
    assert 1 <= metrics["tree/depth"] <= metrics["tree/max_depth"] <= shape.max_depth
    assert metrics["tree/token_sharing"] >= 1 - 1e-9
    assert metrics["tree/trained_tokens"] == 0  # every group is tied


@given(any_forests(), REWARDS, st.integers(0, 3))
def test_processes_pool_to_what_one_process_would_have(forest, rewards, split):
    shape, trees = forest
    scored = [assign(tree, leaf_rewards(tree, rewards)) for tree in trees]
    parts = [metrics_of(part, shape) for part in (scored[:split], scored[split:])]
    assert pool(parts) == pytest.approx(pool([metrics_of(scored, shape)]), abs=1e-9)


@given(NUMBERS, NUMBERS)
def test_a_pooled_standard_deviation_is_that_of_the_whole(first, second):
    pooled = (Std.of(first) + Std.of(second)).value
    both = [*first, *second]
    assert pooled == (pytest.approx(statistics.stdev(both), abs=1e-6) if len(both) > 1 else None)


def test_equal_values_far_from_zero_have_no_spread():
    assert (Std.of([1e6 + 0.7] * 3) + Std.of([1e6 + 0.7] * 5)).value == pytest.approx(0, abs=1e-8)


def test_what_is_undefined_is_left_out():
    assert pool([{"a": Mean(0, 0), "b": Mean(1, 2), "c": Std.of([1.0]), "d": Std.of([])}]) == {"b": 0.5}


@given(any_forests())
def test_names_do_not_depend_on_the_trees(forest):
    """Processes pool their numbers by name, also one whose rewards are all None."""
    shape, trees = forest
    metrics = metrics_of([assign(tree, leaf_rewards(tree, [None])) for tree in trees], shape)
    assert list(metrics) == list(tree_metrics([], shape, [], {"only": []}, 0))
    assert all(math.isfinite(value) for value in pool([metrics]).values())
    assert pool([tree_metrics([], shape, [], {"only": []}, 0)]) == {}


def test_a_step_of_two_processes():
    """Seconds are a mean over processes; sharing is that of all tokens."""
    parts = [step_metrics({"sampling": 1.0}, 300, 100), step_metrics({"sampling": 3.0}, 100, 60)]
    assert pool(parts) == {"tree/seconds/sampling": 2.0, "tree/token_sharing_training": 2.5}
