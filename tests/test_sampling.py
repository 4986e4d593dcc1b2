"""Laws of growth: who branches, how wide and how long."""

from dataclasses import FrozenInstanceError, fields

import pytest
from conftest import RandomBackend, forests, shapes
from hypothesis import given
from hypothesis import strategies as st

from treerpo_trl.growth import Delimiters, ForkShape, TreeShape, grow
from treerpo_trl.tree import ROOT, Segment, Tree


def test_shape_counts_leaves_and_tokens():
    shape = TreeShape(branching=(8, 4, 2), segment_length=10, max_completion_length=27)
    assert shape.max_depth == 3
    assert shape.num_leaves == 64
    (tree,) = grow([[1]], shape, RandomBackend(0, end_probability=0.0))
    assert max(tree.lengths) <= 27 and max(len(node.token_ids) for node in tree.nodes) == 10


def test_only_unfinished_nodes_of_the_depth_above_branch():
    tree = Tree.from_prompt([5]).grow({ROOT: [Segment((1,), True), Segment((2,), False)]})
    done = Tree.from_prompt([6]).grow({ROOT: [Segment((1,), True), Segment((2,), True)]})
    shape = TreeShape((2, 3), 4, 8)
    trees, wave = shape.plan([tree, done, tree], 1)
    assert trees == [tree, done, tree]
    assert wave.branches == ((0, 2), (2, 2))
    assert (wave.num_children, wave.max_tokens, wave.is_last) == (3, (4, 4), True)
    assert not shape.plan([tree], 0)[1].is_last


@given(forests())
def test_unfinished_nodes_have_all_their_children(forest):
    shape, trees = forest
    for tree in trees:
        for index, node in enumerate(tree.nodes):
            depth = tree.depths[index]
            expected = 0 if node.ended or depth == shape.max_depth else shape.branching[depth]
            assert len(tree.children[index]) == expected
            assert index == ROOT or 1 <= len(node.token_ids) <= shape.segment_length
        assert all(len(tree.completion_ids(leaf)) <= shape.max_completion_length for leaf in tree.leaves)


@given(shapes(), st.integers(0, 100))
def test_a_tree_without_early_ends_is_complete(shape, seed):
    (tree,) = grow([[1]], shape, RandomBackend(seed, end_probability=0.0))
    assert len(tree.leaves) == shape.num_leaves


def test_the_backend_is_asked_once_a_depth_even_when_all_paths_have_ended():
    class Counting(RandomBackend):
        calls = []

        def extend(self, trees, wave):
            self.calls.append(len(wave.branches))
            return super().extend(trees, wave)

    backend = Counting(0, end_probability=1.0)
    grow([[1], [2]], TreeShape((2, 2, 2), 3, 9), backend)
    assert backend.calls == [2, 0, 0]


def test_a_backend_must_draw_for_every_branch():
    class Forgetful(RandomBackend):
        def extend(self, *args):
            return super().extend(*args)[1:]

    with pytest.raises(ValueError, match="shorter"):
        grow([[1], [2]], TreeShape((2, 2), 3, 6), Forgetful(0, end_probability=0.0))


def test_shapes_and_waves_are_immutable():
    shape = TreeShape((2, 3), 4, 8)
    for data in (shape, shape.plan([], 0)[1], ForkShape(1, 1, 1, 1, 1, 8), Delimiters(("\n",), 1)):
        assert not hasattr(data, "__dict__")  # there is no room for other fields either
        for each in fields(data):
            with pytest.raises(FrozenInstanceError):
                setattr(data, each.name, None)
