"""Laws of slots and ownership: a tree as the rows of a TRL batch."""

import random
from dataclasses import FrozenInstanceError, fields
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_trees import RandomBackend, any_forests, leaf_rewards, shapes

from treerpo_trl.credit import assign
from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.rows import (
    LOSS_WEIGHTINGS,
    NO_NODE,
    entropy_of_the_batch,
    lay_out,
    project,
    share_of_batch,
    shuffle_micro_batches,
)
from treerpo_trl.tree import ROOT, Segment, Tree


SHAPE = TreeShape((2, 2), 3, 6)


def example_tree() -> Tree:
    """Branching (2, 2); the first child ended early and fills two slots."""
    tree = Tree.from_prompt([9]).grow({ROOT: [Segment((1, 2), True), Segment((3, 4, 5), False)]})
    return tree.grow({2: [Segment((6,), True), Segment((7, 8), False)]})


def test_golden_layout():
    layout = lay_out([example_tree()], SHAPE, width=6)
    assert SHAPE.slots(example_tree()) == [1, 1, 3, 4]
    assert layout.node_BT.tolist() == [
        [1, 1, -1, -1, -1, -1],
        [1, 1, -1, -1, -1, -1],
        [2, 2, 2, 3, -1, -1],
        [2, 2, 2, 4, 4, -1],
    ]
    assert layout.owned_BT.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
    ]


def test_golden_projection_and_weights():
    node_BT = torch.tensor([[0, 1, 1, 2, NO_NODE]])
    assert project(node_BT, torch.tensor([9.0, 0.5, -1.0])).tolist() == [[9.0, 0.5, 0.5, -1.0, 0.0]]
    assert LOSS_WEIGHTINGS["token"](example_tree(), 3) == [1, 1, 1, 1, 1]
    assert LOSS_WEIGHTINGS["node"](example_tree(), 3) == [0, 1.5, 1, 3, 1.5]


@given(any_forests())
def test_rows_are_the_trees_paths_in_depth_first_order(forest):
    shape, trees = forest
    for tree in trees:
        rows = shape.slots(tree)
        assert len(rows) == shape.num_leaves
        assert list(dict.fromkeys(rows)) == list(tree.leaves)


@given(shapes(), st.integers(0, 1000), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_a_plain_mean_over_a_nodes_rows_is_its_value(shape, seed, rewards):
    (tree,) = grow([[1]], shape, RandomBackend(seed, end_probability=0.4))
    scored = assign(tree, leaf_rewards(tree, rewards))
    rows = shape.slots(tree)
    for node, value in enumerate(scored.values):
        below = [scored.rewards[leaf] for leaf in rows if node == ROOT or node in tree.path(leaf)]
        assert sum(below) / len(below) == pytest.approx(value)


@given(any_forests())
def test_rows_spell_their_completions(forest):
    shape, trees = forest
    width = shape.max_completion_length + 1
    layout = lay_out(trees, shape, width)
    nodes = [node for tree in trees for node in tree.nodes]
    offsets = [sum(len(tree.nodes) for tree in trees[:index]) for index in range(len(trees))]
    leaves = [(index, leaf) for index, tree in enumerate(trees) for leaf in shape.slots(tree)]
    for (index, leaf), row in zip(leaves, layout.node_BT.tolist(), strict=True):
        path = [offsets[index] + node for node in trees[index].path(leaf)]
        spelled = [node for node in path for _ in nodes[node].token_ids]
        assert row == spelled + [NO_NODE] * (width - len(spelled))


@given(any_forests())
def test_each_sampled_token_is_owned_exactly_once(forest):
    shape, trees = forest
    layout = lay_out(trees, shape, shape.max_completion_length)
    owned = layout.node_BT[layout.owned_BT]
    num_nodes = sum(len(tree.nodes) for tree in trees)
    expected = [0 if index == ROOT else len(node.token_ids) for tree in trees for index, node in enumerate(tree.nodes)]
    assert torch.bincount(owned, minlength=num_nodes).tolist() == expected


@given(any_forests(), st.integers(0, 1000))
def test_a_node_is_owned_by_its_first_active_row(forest, seed):
    shape, trees = forest
    rows = shape.num_leaves * len(trees)
    active = [random.Random(seed + row).random() < 0.6 for row in range(rows)]
    layout = lay_out(trees, shape, shape.max_completion_length, active)
    for row in range(rows):
        for node in set(layout.node_BT[row].tolist()) - {NO_NODE}:
            is_first = active[row] and not any(active[r] and node in layout.node_BT[r] for r in range(row))
            tokens = layout.node_BT[row] == node
            assert layout.owned_BT[row][tokens].all() == is_first
            assert layout.owned_BT[row][tokens].any() == is_first


@given(any_forests())
def test_node_weights_sum_to_the_same_for_every_node(forest):
    shape, trees = forest
    for tree in trees:
        weights = LOSS_WEIGHTINGS["node"](tree, shape.longest_segment)
        for node, weight in list(zip(tree.nodes, weights, strict=True))[1:]:
            assert weight * len(node.token_ids) == pytest.approx(shape.longest_segment)
            assert weight >= 1


def test_a_layout_is_immutable():
    layout = lay_out([example_tree()], SHAPE, width=6)
    for each in fields(layout):
        with pytest.raises(FrozenInstanceError):
            setattr(layout, each.name, None)


def shuffled_micro_batches(count: int, size: int) -> list[dict]:
    """Rows 0, 1, 2 .. in any order, with what a batch holds beside them."""
    order = torch.randperm(count * size)
    columns = {"row": order, "ids": torch.stack([order, order + 1], dim=1)}
    return [
        {name: column[start : start + size] for name, column in columns.items()}
        | {"num_items": torch.tensor(7.0), "images": None}
        for start in range(0, count * size, size)
    ]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_shuffling_micro_batches_puts_rows_back_in_order(count, size, seed):
    """Each micro-batch holds neighbours again; together they hold every row once, in all columns."""
    torch.manual_seed(seed)
    batches = shuffle_micro_batches(shuffled_micro_batches(count, size))
    rows = [batch["row"].tolist() for batch in batches]
    assert sorted(rows) == [list(range(start, start + size)) for start in range(0, count * size, size)]
    for batch in batches:
        assert batch["ids"].tolist() == [[row, row + 1] for row in batch["row"].tolist()]
        assert batch["num_items"] == 7
        assert batch["images"] is None


def micro_batch(weights: list[float], everything: float) -> dict[str, torch.Tensor]:
    return {
        "completion_mask": torch.ones(1, len(weights)),
        "tool_mask": torch.tensor([weights]),
        "num_items_in_batch": torch.tensor(everything),
    }


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 1.5]), min_size=3, max_size=3), min_size=4, max_size=4))
def test_a_mean_over_the_batch_is_one_of_micro_batches_by_their_share(weights):
    """Two processes of two micro-batches: each one's own mean, times its share, is averaged as TRL averages them."""
    everything = sum(map(sum, weights))
    batches = [micro_batch(part, everything) for part in weights]
    values = torch.arange(12.0).view(4, 3)
    means = [(values[i] * batches[i]["tool_mask"]).sum() / max(sum(weights[i]), 1.0) for i in range(4)]
    mean = sum(share_of_batch(batch, 4) * mean for batch, mean in zip(batches, means, strict=True)) / 4
    assert mean.item() == pytest.approx((values * torch.tensor(weights)).sum().item() / max(everything, 1.0), rel=1e-5)


@pytest.mark.parametrize(("is_loss", "expected"), [(True, [1.5, 3.0]), (False, [1.0, 2.0])])
def test_only_the_loss_weighs_the_gradient_of_entropies(is_loss, expected):
    trainer = SimpleNamespace(
        args=SimpleNamespace(steps_per_generation=2), accelerator=SimpleNamespace(num_processes=1),
        _loss_inputs=micro_batch([1.0, 1.0, 1.0], 4.0) if is_loss else None,
    )  # fmt: skip
    entropies = torch.tensor([3.0, 4.0], requires_grad=True)
    outputs = entropy_of_the_batch(lambda self: ("logps", entropies * 1, "aux"))(trainer)
    assert outputs[1].tolist() == [3, 4]
    (outputs[1] * torch.tensor([1.0, 2.0])).sum().backward()
    assert entropies.grad.tolist() == expected


def test_shuffling_micro_batches_gives_them_any_order():
    torch.manual_seed(0)
    firsts = [[batch["row"][0].item() for batch in shuffle_micro_batches(shuffled_micro_batches(3, 2))]
              for _ in range(100)]  # fmt: skip
    assert len(set(map(tuple, firsts))) == 6
