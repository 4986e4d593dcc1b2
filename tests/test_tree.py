"""Laws of Tree: indices, paths and what may grow where."""

import pytest
from hypothesis import given
from random_trees import forests

from treerpo_trl.tree import NO_PARENT, ROOT, Node, Segment, Tree


def example_tree() -> Tree:
    """A root with children 1 (inner) and 2 (ended); 1 has the leaves 3 and 4."""
    tree = Tree.from_prompt([7, 8])
    tree = tree.grow({ROOT: [Segment((1, 2), False), Segment((3,), True)]})
    return tree.grow({1: [Segment((4,), True), Segment((5, 6), False)]})


def test_derived_structure():
    tree = example_tree()
    assert tree.prompt_ids == (7, 8)
    assert tree.parents == (NO_PARENT, 0, 0, 1, 1)
    assert tree.children == ((1, 2), (3, 4), (), (), ())
    assert tree.depths == (0, 1, 1, 2, 2)
    assert tree.leaves == (3, 4, 2)  # depth first, not by index
    assert tree.path(4) == (1, 4)
    assert tree.path(ROOT) == ()
    assert tree.completion_ids(4) == [1, 2, 5, 6]
    assert tree.num_sampled_tokens == 6


def test_growing_leaves_the_old_tree_alone():
    old = Tree.from_prompt([7])
    new = old.grow({ROOT: [Segment((1,), False)]})
    assert len(old.nodes) == 1 and len(new.nodes) == 2
    assert old.leaves == ()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((), "starts with a root"),
        ((Node(0, (1,)),), "starts with a root"),
        ((Node(NO_PARENT, (1,)), Node(1, (2,))), "node 1 has parent 1; it must be between 0 and 0"),
        ((Node(NO_PARENT, (1,)), Node(0, (2,), ended=True), Node(1, (3,))), "node 2 hangs below node 1, which ended"),
        ((Node(NO_PARENT, (1,)), Node(0, ())), "node 1 adds no token"),
    ],
)
def test_bad_trees_are_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        Tree(nodes)


@given(forests())
def test_every_leaf_is_reached_and_depths_count_the_path(forest):
    shape, trees = forest
    for tree in trees:
        assert sorted(tree.leaves) == [i for i, children in enumerate(tree.children) if not children and i != ROOT]
        for leaf in tree.leaves:
            assert len(tree.path(leaf)) == tree.depths[leaf] <= shape.max_depth
            assert tree.nodes[leaf].ended or tree.depths[leaf] == shape.max_depth


def test_a_node_goes_on_after_tools_answered():
    """Tokens 1, 2 were sampled, 7, 8 answered, 3 was sampled after that."""
    segment = Segment((1, 2), True, logprobs=(-0.5, -0.25), score_norms=(0.1, 0.2)).answered([7, 8])
    tree = Tree.from_prompt([0]).grow({ROOT: [segment]})
    assert not tree.nodes[1].ended and tree.turn_ids(1) == []
    tree = tree.extend({1: Segment((3,), True, logprobs=(-1.0,), score_norms=(0.4,))})
    node = tree.nodes[1]
    assert tree.completion_ids(1) == [1, 2, 7, 8, 3] and node.ended
    assert tree.sampled_mask(1) == [True, True, False, False, True]
    assert tree.completion_logprobs(1) == [-0.5, -0.25, 0.0, 0.0, -1.0]
    assert (node.num_sampled, tree.num_sampled_tokens, tree.lengths) == (3, 3, (0, 5))
    assert node.score_norm == pytest.approx(0.7) and node.uncertainties is None
    assert tree.turn_ids(1) == [3]
    assert Tree.from_prompt([0]).grow({ROOT: [Segment((1, 2), True)]}).turn_ids(1) == [1, 2]
    with pytest.raises(ValueError, match="node 1 cannot go on"):
        tree.extend({1: Segment((4,), True)})
