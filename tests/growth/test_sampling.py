"""Laws of growth: who branches, how wide and how long."""

from collections import Counter
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_trees import RandomBackend, any_forests, forests, plan, shapes

from treerpo_trl.growth import Delimiters, ForkShape, TreeShape, Wave, grow
from treerpo_trl.growth.waves import drawn_nodes, in_blocks
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
    trees, wave = plan(shape, [tree, done, tree], 1)
    assert trees == [tree, done, tree]
    assert wave.branches == ((0, 2), (2, 2))
    assert (wave.num_children, wave.max_tokens, wave.is_last) == (3, (4, 4), True)
    assert not plan(shape, [tree], 0)[1].is_last


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


class Counting(RandomBackend):
    """Notes the branches of each wave."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def extend(self, trees, wave):
        self.calls.append(len(wave.branches))
        return super().extend(trees, wave)


def test_growth_ends_with_the_last_path():
    backend = Counting(0, end_probability=1.0)
    grow([[1], [2]], TreeShape((2, 2, 2), 3, 9), backend)
    assert backend.calls == [2]


def test_processes_that_call_together_get_empty_waves_until_the_last_has_no_branches():
    class Together(Counting):
        def goes_on(self, has_branches):
            return has_branches or len(self.calls) < 3

    backend = Together(0, end_probability=1.0)
    grow([[1], [2]], TreeShape((2, 2, 2), 3, 9), backend)
    assert backend.calls == [2, 0, 0]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_blocks_are_the_parts_of_a_wave(branches_by_tree, num_children, most_rows, whole_trees):
    branches = tuple((tree, node) for tree, count in enumerate(branches_by_tree) for node in range(count))
    wave = Wave(branches, num_children, tuple(range(len(branches))), is_last=True)
    blocks = in_blocks(wave, most_rows, whole_trees)
    assert tuple(branch for block in blocks for branch in block.branches) == branches
    assert tuple(most for block in blocks for most in block.max_tokens) == wave.max_tokens
    if whole_trees:
        assert sum(len({tree for tree, _ in block.branches}) for block in blocks) == len(branches_by_tree)


@given(any_forests(), st.integers(1, 12), st.integers(0, 100))
def test_blocks_bound_what_is_drawn_and_what_waits(forest, block_rows, seed):
    """Depth first: of each depth, what waits to branch was drawn in one block."""
    shape, trees = forest

    class Blocks(RandomBackend):
        def __init__(self, end_probability):
            super().__init__(seed, end_probability)
            self.waiting = {}  # node -> depth

        @property
        def block_rows(self):
            return block_rows

        def extend(self, trees, wave):
            if shape.plans_whole_trees:
                assert len(wave.branches) * wave.num_children <= block_rows or len(set(dict(wave.branches))) == 1
            else:
                assert len(wave.branches) * wave.num_children <= max(block_rows, wave.num_children)
            groups = super().extend(trees, wave)
            for branch in wave.branches:
                self.waiting.pop(branch, None)
            for nodes, group in zip(drawn_nodes(trees, wave), groups, strict=True):
                for node, segment in zip(nodes, group, strict=True):
                    if not (segment.ended or wave.is_last):
                        self.waiting[node] = trees[node[0]].depths[wave.branches[0][1]] + 1
            by_depth = Counter(self.waiting.values())
            assert all(count <= max(block_rows, wave.num_children) for count in by_depth.values())
            return groups

        def release(self, nodes):
            for node in nodes:
                self.waiting.pop(node, None)

    backend = Blocks(end_probability=0.2)
    grown = grow([tree.prompt_ids for tree in trees], shape, backend)
    assert not backend.waiting
    for tree in grown:
        assert len(shape.slots(tree)) == shape.num_leaves
        assert all(node.parent < index for index, node in enumerate(tree.nodes) if index)
    without_ends = grow([[1], [2, 3]], shape, Blocks(end_probability=0.0))
    if isinstance(shape, TreeShape) and shape.delimiters is None:
        assert all(len(tree.leaves) == shape.num_leaves for tree in without_ends)


@given(any_forests(), st.one_of(st.none(), st.integers(1, 12)), st.integers(0, 100))
def test_the_end_of_a_tree_is_told_once_and_at_once(forest, block_rows, seed):
    """After the block that draws its last segments, and before the next; in any shape, it is what it will be."""
    shape, trees = forest
    drawn, told = [], {}

    class Blocks(RandomBackend):
        @property
        def block_rows(self):
            return block_rows

        def extend(self, trees, wave):
            drawn.append({tree for tree, _ in wave.branches})
            return super().extend(trees, wave)

    def on_end(trees, ended):
        assert list(ended) == sorted(ended) and not told.keys() & set(ended)
        told.update({index: (len(drawn), trees[index]) for index in ended})

    grown = grow([tree.prompt_ids for tree in trees], shape, Blocks(seed, 0.2), on_end=on_end)
    last = {index: number for number, block in enumerate(drawn, 1) for index in block}
    assert told == {index: (last[index], tree) for index, tree in enumerate(grown)}


def test_a_backend_must_draw_for_every_branch():
    class Forgetful(RandomBackend):
        def extend(self, *args):
            return super().extend(*args)[1:]

    with pytest.raises(ValueError, match="shorter"):
        grow([[1], [2]], TreeShape((2, 2), 3, 6), Forgetful(0, end_probability=0.0))


def test_shapes_and_waves_are_immutable():
    shape = TreeShape((2, 3), 4, 8)
    for data in (shape, plan(shape, [], 0)[1], ForkShape(1, 1, 1, 1, 1, 8), Delimiters(("\n",), 1)):
        assert not hasattr(data, "__dict__")  # there is no room for other fields either
        for each in fields(data):
            with pytest.raises(FrozenInstanceError):
                setattr(data, each.name, None)
