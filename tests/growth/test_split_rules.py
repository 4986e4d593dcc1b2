"""Where trees branch, without a model: the choice of forks, cuts, and the plans of every shape."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from random_trees import RandomBackend, any_forests, delimited_shapes, fork_shapes, plan

from treerpo_trl.growth import Delimiters, ForkShape, TreeShape, grow
from treerpo_trl.growth.forks import choose_forks
from treerpo_trl.tree import NO_PARENT, ROOT, Node, Segment, Tree


NAN = float("nan")


def drawn(*uncertainties: float, ended: bool = False) -> Segment:
    return Segment(tuple(range(2, 2 + len(uncertainties))), ended, uncertainties=uncertainties)


def trunks(*segments: Segment) -> Tree:
    return Tree.from_prompt([5, 6]).grow({ROOT: segments})


@pytest.mark.parametrize(
    ("uncertainties", "most", "shortest", "expected"),
    [
        ((9, 1, 3, 2), 2, 1, [(1, 2), (1, 3)]),  # the least certain first, and never the first token
        ((9, 1, 3, 2), 9, 1, [(1, 2), (1, 3), (1, 1)]),  # fewer places than asked for
        ((0, 4, 4, 4), 2, 1, [(1, 1), (1, 2)]),  # ties go to the earlier token
        ((0, 9, 1, 2, 9, 9), 9, 2, [(1, 4), (1, 2)]),  # two tokens on either side, at 1 and 5 there is one
        ((0, 0, 1, 5, 4, 0, 0), 9, 2, [(1, 3), (1, 5)]),  # 4 is too near to 3
        ((0, 0, 1, 5, 4, 0, 0), 9, 3, [(1, 3)]),
        ((0, NAN, 2, NAN), 9, 1, [(1, 2)]),  # what is no number is certain
        ((0, NAN), 1, 1, []),
        ((7,), 3, 1, []),  # a response of one token
        ((1, 2, 3), 3, 2, []),
        ((-1.0, float("inf"), 0.0), 1, 1, [(1, 1)]),
    ],
)
def test_golden_forks_of_one_response(uncertainties, most, shortest, expected):
    assert choose_forks(trunks(drawn(*uncertainties)), most, shortest) == expected


def test_each_trunk_forks_for_itself_and_ties_go_to_the_earlier_node():
    tree = trunks(drawn(0, 1, 9), drawn(0, 8, 8), drawn(5))
    assert choose_forks(tree, 1, 1) == [(1, 2), (2, 1)]
    # A trunk is what has grown from it: below the first one, a continuation is less certain.
    cut, before = trunks(drawn(0, 1, 9, 9), drawn(0, 3)).cut({1: [2]})
    grown = cut.grow({before[1, 2]: [drawn(7, 9, 9)]})
    # Nodes: 1 and 2 are the pieces of the first trunk, 3 is the second trunk, 4 the continuation.
    assert choose_forks(grown, 2, 1) == [(2, 1), (4, 1), (3, 1)]
    assert choose_forks(grown, 9, 1) == [(2, 1), (4, 1), (4, 2), (1, 1), (3, 1)]


def test_a_tree_without_uncertainties_cannot_fork():
    tree = trunks(drawn(1, 2), Segment((5, 6), False))
    with pytest.raises(ValueError, match="node 2 has no uncertainties; the backend that drew it reports none"):
        choose_forks(tree, 1, 1)


def test_a_prompt_alone_has_nothing_to_fork():
    assert choose_forks(Tree.from_prompt([5]), 3, 1) == []


def test_golden_cut():
    node = Segment((11, 12, 13, 14, 15), False, (-1.0, -2.0, -3.0, -4.0, -5.0), (1, 2, 3, 4, 5), (5, 4, 3, 2, 1))
    tree = trunks(node, Segment((20,), True)).grow({1: [Segment((30, 31), True), Segment((40,), False)]})
    cut, before = tree.cut({1: [1, 4], 3: [1]})
    assert before == {(1, 1): 1, (1, 4): 2, (3, 1): 5}
    assert cut.parents == (NO_PARENT, ROOT, 1, 2, ROOT, 3, 5, 3)
    assert [node.token_ids for node in cut.nodes] == [
        (5, 6), (11,), (12, 13, 14), (15,), (20,), (30,), (31,), (40,)
    ]  # fmt: skip
    assert [node.ended for node in cut.nodes] == [False] * 4 + [True, False, True, False]
    assert cut.nodes[2].logprobs == (-2.0, -3.0, -4.0)
    assert cut.nodes[2].score_norms == (2, 3, 4) and cut.nodes[2].score_norm == 9
    assert cut.nodes[2].uncertainties == (4, 3, 2)
    assert cut.nodes[5].logprobs is None
    assert [node.is_rest for node in cut.nodes] == [False, False, True, True, False, False, True, False]


def test_nothing_is_cut_without_offsets():
    tree = trunks(drawn(1, 2), drawn(3))
    assert tree.cut({}) == (tree, {})
    assert tree.cut({1: []}) == (tree, {})


@given(any_forests(), st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=60)
def test_a_cut_changes_no_path(forest, draw: random.Random):
    for tree in forest[1]:
        numbered = Tree(tuple(_number_tokens(node) for node in tree.nodes))
        offsets = {
            index: sorted(draw.sample(range(1, len(node.token_ids)), draw.randrange(len(node.token_ids))))
            for index, node in enumerate(tree.nodes[1:], start=1)
        }
        cut, before = numbered.cut(offsets)
        assert set(before) == {(index, offset) for index, of_node in offsets.items() for offset in of_node}
        assert len(cut.leaves) == len(tree.leaves)
        for old, new in zip(tree.leaves, cut.leaves, strict=True):
            assert cut.completion_ids(new) == tree.completion_ids(old)
            assert cut.completion_logprobs(new) == numbered.completion_logprobs(old)
            assert cut.nodes[new].ended == tree.nodes[old].ended
        inner = set(range(len(cut.nodes))) - set(cut.leaves)
        assert not any(cut.nodes[index].ended for index in inner)
        for (index, offset), piece in before.items():
            # The piece ends where the cut is, and what follows it is its only child so far.
            assert cut.completion_ids(piece) == [
                *tree.completion_ids(tree.parents[index]), *tree.nodes[index].token_ids[:offset]
            ]  # fmt: skip
            (rest,) = cut.children[piece]
            assert cut.nodes[rest].is_rest
        for node in cut.nodes[1:]:
            assert node.logprobs == tuple(map(float, node.score_norms)) == node.uncertainties
        assert sum(node.is_rest for node in cut.nodes) == len(before) + sum(node.is_rest for node in tree.nodes)


def _number_tokens(node: Node) -> Node:
    """With other numbers for each token, so that a slice of one field is told from that of another place."""
    numbers = tuple(float(place) for place in range(len(node.token_ids)))
    offset = float(hash(node.token_ids) % 97)
    own = tuple(offset + number for number in numbers)
    return replace(node, logprobs=own, score_norms=own, uncertainties=own)


def test_golden_plan_of_forks():
    shape = ForkShape(2, 2, 3, num_rounds=2, min_segment_length=1, max_completion_length=6)
    assert (shape.num_waves, shape.num_leaves, shape.max_depth, shape.longest_segment) == (3, 26, 5, 6)
    empty = [Tree.from_prompt([5]), Tree.from_prompt([6])]
    trees, wave = plan(shape, empty, 0)
    assert trees == empty and wave.branches == ((0, ROOT), (1, ROOT))
    assert (wave.num_children, wave.max_tokens, wave.is_last, wave.delimiters) == (2, (6, 6), True, None)
    grown = [
        trunks(drawn(0, 1, 3, 2), drawn(0, 1, ended=True)),
        trunks(drawn(5, ended=True), drawn(6, ended=True)),  # nothing to fork
    ]
    trees, wave = plan(shape, grown, 1)
    # The first trunk is cut at 2 and 3 into nodes 1, 2 and 3; the second at 1 into 4 and 5.
    assert [node.token_ids for node in trees[0].nodes[1:]] == [(2, 3), (4,), (5,), (2,), (3,)]
    assert trees[1] == grown[1]
    assert wave.branches == ((0, 1), (0, 2), (0, 4)) and wave.num_children == 3
    assert wave.max_tokens == (4, 3, 5)


def test_golden_rows_of_forks():
    shape = ForkShape(1, 2, 1, num_rounds=1, min_segment_length=1, max_completion_length=9)
    cut, before = trunks(drawn(0, 1, 2)).cut({1: [1]})
    tree = cut.grow({before[1, 1]: [drawn(0, ended=True)]})
    assert tree.leaves == (2, 3)
    assert shape.rows_below(tree) == [2, 2, 1, 1]
    assert shape.slots(tree) == [2, 3, 3]  # one leaf fewer than a tree may have: the last is repeated
    wide = trunks(*[drawn(0)] * 4)
    with pytest.raises(ValueError, match="a tree has 4 leaves, but its shape allows 3; pass the shape"):
        shape.slots(wide)


@given(fork_shapes(), st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0]))
@hypothesis_settings(max_examples=150)
def test_forks_keep_their_limits_and_every_path(shape, seed, ends):
    backend, trees = RandomBackend(seed, ends, 0.5), [Tree.from_prompt([5]), Tree.from_prompt([6, 7])]
    for wave_index in range(shape.num_waves):
        before = trees
        trees, wave = plan(shape, trees, wave_index)
        assert wave.branches == tuple(sorted(set(wave.branches)))  # no place forks twice
        for old, cut in zip(before, trees, strict=True):
            assert [cut.completion_ids(leaf) for leaf in cut.leaves] == [
                old.completion_ids(leaf) for leaf in old.leaves
            ]
        segments = backend.extend(trees, wave)
        grown = [dict[int, list[Segment]]() for _ in trees]
        for (tree, node), group in zip(wave.branches, segments, strict=True):
            assert wave_index == 0 or node != ROOT  # never at a branch's first token
            assert wave_index == 0 or trees[tree].children[node]  # what was drawn there stays, first
            grown[tree][node] = group
        trees = [tree.grow(group) for tree, group in zip(trees, grown, strict=True)]
    for tree in trees:
        assert len(tree.leaves) <= shape.num_leaves == len(shape.slots(tree))
        assert set(shape.slots(tree)) == set(tree.leaves)
        assert max(tree.depths) <= shape.max_depth
        assert max(tree.lengths) <= shape.max_completion_length
        assert len(tree.children[ROOT]) == shape.num_trunks
        for index, node in enumerate(tree.nodes):
            children = tree.children[index]
            if index != ROOT and children:
                assert len(children) == 1 + shape.continuations_per_fork
                assert [tree.nodes[child].is_rest for child in children] == [True] + [False] * (len(children) - 1)
            if index != ROOT and (children or node.is_rest):
                assert len(node.token_ids) >= shape.min_segment_length


DELIMITED = TreeShape((2, 2, 2), 4, 20, Delimiters(("\n",), 1))


def test_golden_limits_of_delimited_segments():
    """Inner segments have `segment_length` tokens or what is left, the last what is left."""
    (tree,), wave = plan(DELIMITED, [Tree.from_prompt([5])], 0)
    assert (wave.max_tokens, wave.is_last, wave.delimiters) == ((4,), False, DELIMITED.delimiters)
    tree = tree.grow({ROOT: [Segment((7,), False), Segment((7, 7, 7, 7), True)]})
    (tree,), wave = plan(DELIMITED, [tree], 1)
    assert (wave.branches, wave.max_tokens, wave.delimiters) == (((0, 1),), (4,), DELIMITED.delimiters)
    tree = tree.grow({1: [Segment((8, 8), False), Segment((8, 8, 8), False)]})
    (tree,), wave = plan(DELIMITED, [tree], 2)
    assert (wave.branches, wave.max_tokens) == (((0, 3), (0, 4)), (17, 16))
    assert (wave.is_last, wave.delimiters) == (True, None)
    assert DELIMITED.longest_segment == 20


def test_a_path_that_is_full_above_the_last_depth_is_a_leaf():
    shape = replace(DELIMITED, max_completion_length=6)
    tree = Tree.from_prompt([5]).grow({ROOT: [Segment((7,) * 4, False), Segment((7,) * 3, False)]})
    (tree,), wave = plan(shape, [tree], 1)
    assert wave.max_tokens == (2, 3)
    tree = tree.grow({1: [Segment((8, 8), False)] * 2, 2: [Segment((8,), False)] * 2})
    (tree,), wave = plan(shape, [tree], 2)
    assert wave.branches == ((0, 5), (0, 6))
    tree = tree.grow({5: [Segment((9,), True)] * 2, 6: [Segment((9, 9), False)] * 2})
    assert [tree.lengths[leaf] for leaf in tree.leaves] == [6, 6, 5, 5, 6, 6]
    assert shape.slots(tree) == [3, 3, 4, 4, 7, 8, 9, 10]


@given(delimited_shapes(), st.integers(0, 10_000), st.sampled_from([0.0, 0.3]))
@hypothesis_settings(max_examples=60)
def test_delimited_trees_keep_their_limits(shape, seed, ends):
    (tree,) = grow([[5]], shape, RandomBackend(seed, ends, 0.7))
    for index, node in enumerate(tree.nodes[1:], start=1):
        assert len(node.token_ids) <= shape.segment_length or tree.depths[index] == shape.max_depth
        assert tree.lengths[index] <= shape.max_completion_length
        is_over = node.ended or tree.depths[index] == shape.max_depth
        assert bool(tree.children[index]) != (is_over or tree.lengths[index] == shape.max_completion_length)
    assert len(shape.slots(tree)) == shape.num_leaves == shape.rows_below(tree)[ROOT]
