"""The tree/* numbers on a tree small enough to count by hand."""

import math

import pytest
from conftest import forests, leaf_rewards
from hypothesis import given

from treerpo_trl.credit import assign
from treerpo_trl.metrics import tree_metrics
from treerpo_trl.rows import slots
from treerpo_trl.tree import ROOT, Segment, Tree


def test_golden_numbers():
    tree = Tree.from_prompt([9]).grow({ROOT: [Segment((1, 2), True), Segment((3, 4, 5), False)]})
    tree = tree.grow({2: [Segment((6,), True), Segment((7, 8), False)]})
    scored = assign(tree, {1: 1.0, 3: 0.5, 4: 0.5})
    means = tree_metrics([scored], 4, 2)
    assert means.pop("tree/advantage_abs/depth_2").count == 0  # no group is kept there
    metrics = {name: mean.total / mean.count for name, mean in means.items()}
    assert metrics == {
        "tree/nodes": 4,
        "tree/leaves": 3,
        "tree/depth": pytest.approx(5 / 3),
        "tree/sampled_tokens": 8,
        "tree/token_sharing": (2 + 2 + 4 + 5) / 8,
        "tree/trained_tokens": 5 / 8,
        "tree/advantage_abs": pytest.approx(0.25 / (0.75 * 0.25)),
        "tree/kept_groups": 0.5,
        "tree/kept_groups/depth_1": 1,
        "tree/value_range/depth_1": 0.5,
        "tree/advantage_abs/depth_1": pytest.approx(0.25 / (0.75 * 0.25)),
        "tree/kept_groups/depth_2": 0,
        "tree/value_range/depth_2": 0,
    }


def test_advantages_by_depth():
    tree = Tree.from_prompt([9]).grow({ROOT: [Segment((1,), True), Segment((3,), False)]})
    tree = tree.grow({2: [Segment((6,), True), Segment((7,), True)]})
    means = tree_metrics([assign(tree, {1: 1.0, 3: 1.0, 4: 0.0})], 4, 2)
    sizes = [means[f"tree/advantage_abs{depth}"] for depth in ("/depth_1", "/depth_2", "")]
    assert [mean.total / mean.count for mean in sizes] == pytest.approx([0.25 / (0.75 * 0.25), 2, (4 / 3 + 2) / 2])


@given(forests())
def test_token_sharing_counts_the_rows(forest):
    shape, trees = forest
    scored = [assign(tree, leaf_rewards(tree, [0.0, 1.0])) for tree in trees]
    metrics = tree_metrics(scored, shape.num_leaves, shape.max_depth)
    rows = sum(len(tree.completion_ids(leaf)) for tree in trees for leaf in slots(tree, shape.branching))
    assert metrics["tree/token_sharing"].total == pytest.approx(rows)


@given(forests())
def test_names_do_not_depend_on_the_trees(forest):
    """Processes add the numbers up by position, so they must agree on the names."""
    shape, trees = forest
    scored = [assign(tree, leaf_rewards(tree, [None])) for tree in trees]
    metrics = tree_metrics(scored, shape.num_leaves, shape.max_depth)
    assert list(metrics) == list(tree_metrics([], shape.num_leaves, shape.max_depth))
    assert all(math.isfinite(mean.total) and mean.count >= 0 for mean in metrics.values())
