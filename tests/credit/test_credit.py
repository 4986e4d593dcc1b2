"""The paper's numbers, and laws of back-up, pruning and the estimators that compare siblings."""

import math
from dataclasses import FrozenInstanceError, fields
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from random_trees import RandomBackend, forests, leaf_rewards

from treerpo_trl.credit import (
    ESTIMATORS,
    ROUNDING,
    UNIT_INTERVAL_ESTIMATORS,
    Estimator,
    ValuedTree,
    assign,
    assign_batch,
    back_up,
    bernoulli_std,
    centered,
    group_std,
    is_kept,
    leave_one_out,
    treerpo,
)
from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.tree import NO_PARENT, ROOT, Segment, Tree


unit_rewards = st.lists(st.floats(0, 1), min_size=2, max_size=8)
GROUP_ESTIMATORS = [name for name, estimator in ESTIMATORS.items() if estimator.of_group is not None]
some_rewards = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=9)


def tree_of(*group_sizes: int) -> Tree:
    """Depth 2: one child of the root per number, with that many leaves below it."""
    tree = Tree.from_prompt([0]).grow({ROOT: [Segment((1,), False) for _ in group_sizes]})
    return tree.grow({1 + i: [Segment((2,), True)] * size for i, size in enumerate(group_sizes)})


def test_golden_values_of_the_papers_figure_2():
    """Means 6/9, 1/9 and 5/9 of the leaves give 0.667, 0.111 and 0.556 one level up and 0.444 at the root."""
    tree = tree_of(9, 9, 9)
    rewards = [1.0] * 6 + [0.0] * 3 + [1.0] + [0.0] * 8 + [1.0] * 5 + [0.0] * 4
    scored = assign(tree, leaf_rewards(tree, rewards))
    assert [round(value, 3) for value in scored.values[:4]] == [0.444, 0.667, 0.111, 0.556]
    mean = 12 / 27
    assert scored.advantages[1] == pytest.approx((6 / 9 - mean) / (mean * (1 - mean)))


def test_golden_advantages_of_the_papers_example_rewards():
    """[0, 0, 1, 1] and [.49, .49, .51, .51] look the same to GRPO's group_std and 50 times apart to TreeRPO."""
    wide, narrow = [0.0, 0.0, 1.0, 1.0], [0.49, 0.49, 0.51, 0.51]
    assert treerpo(wide) == pytest.approx([-2, -2, 2, 2])
    assert treerpo(narrow) == pytest.approx([-0.04, -0.04, 0.04, 0.04])
    assert bernoulli_std(wide) == pytest.approx([-1, -1, 1, 1])
    assert centered(narrow) == pytest.approx([-0.01, -0.01, 0.01, 0.01])
    assert group_std(wide) == pytest.approx([-0.866, -0.866, 0.866, 0.866], abs=1e-3)
    assert group_std(narrow) == pytest.approx([-0.866, -0.866, 0.866, 0.866], abs=1e-2)
    assert is_kept(wide, 0.1) and not is_kept(narrow, 0.1)


def test_golden_advantages_of_leaving_one_out():
    """The others of [1, 0, 0, 1] have mean 1/3 and 2/3; of [1, .5] each has only the other."""
    assert leave_one_out([1.0, 0.0, 0.0, 1.0]) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert leave_one_out([1.0, 0.5]) == [0.5, -0.5]


@given(unit_rewards)
def test_leaving_one_out_is_centring_times_a_factor(values):
    factor = len(values) / (len(values) - 1)
    assert leave_one_out(values) == pytest.approx([factor * a for a in centered(values)], abs=1e-12)


def test_pruning_is_strict():
    assert not is_kept([0.0, 0.1], 0.1)
    assert is_kept([0.0, 0.1001], 0.1)
    assert not is_kept([0.5, 0.5], 0.0)
    assert is_kept([0.5, 0.5 + 1e-6], 0.0)
    assert is_kept([0.5, 0.5], None) and is_kept([0.5, 0.5], -1.0)
    assert not is_kept([0.5], None)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (0.5, 0.6), (0.3, 0.4), (0.9, 1.0)])
def test_pruning_is_strict_for_rewards_in_float32(low, high):
    """0.1 apart as decimals is 0.1 apart, though their float32 difference exceeds 0.1."""
    low, high = torch.tensor([low, high]).tolist()
    assert not is_kept([low, high], 0.1)
    assert not is_kept([low * 100, high * 100], 10.0)


def test_a_tie_of_means_is_a_tie_in_float32():
    """The mean of 0.1, 0.2 and 0.3 is 0.2; in float32 they are 2e-9 apart."""
    low, middle, high = torch.tensor([0.1, 0.2, 0.3]).tolist()
    mean = (low + middle + high) / 3
    assert mean != middle and not is_kept([mean, middle], 0.0)
    assert not is_kept([1000 * mean, 1000 * middle], 0.0) and is_kept([1000 * mean, 1000 * middle], -1.0)


def test_a_tie_of_means_is_a_tie_though_rewards_cancel_out():
    """The mean of -29.1 and 28.9 is -0.1, but what float32 makes of it is off by the rounding of 29, not of 0.1."""
    tree = tree_of(2, 2)
    rewards = torch.tensor([-29.1, 28.9, -0.1, -0.1]).tolist()
    scored = assign(tree, leaf_rewards(tree, rewards), "centered", prune_threshold=0.0)
    assert scored.values[1] != scored.values[2]
    assert scored.kept == (False, False, False, True, True, False, False)


def test_pruning_forgives_four_roundings_of_the_largest_value():
    assert not is_kept([1.0, 0.5 - 4 * 2.0**-24], 0.5)
    assert is_kept([1.0, 0.5 - 4.5 * 2.0**-24], 0.5)


def test_the_mean_is_not_weighted_by_leaves():
    tree = tree_of(2, 4)
    scored = assign(tree, leaf_rewards(tree, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    assert scored.values[ROOT] == 0.5  # 2/6 if leaves were counted


def test_unscorable_leaves_are_left_out():
    tree = tree_of(2, 2, 3)
    scored = assign(tree, leaf_rewards(tree, [None, None, None, 1.0, 0.0, 1.0, None]))
    assert scored.values[:4] == (0.75, None, 1.0, 0.5)
    assert scored.kept[:4] == (False, False, True, True)  # node 1 is left out of its group
    assert scored.kept[4:] == (False, False, False, False, True, True, False)  # a group of one is pruned


def test_all_unscorable_trains_nothing():
    tree = tree_of(2, 2)
    scored = assign(tree, leaf_rewards(tree, [None]))
    assert set(scored.values) == {None} and not any(scored.kept)


@given(forests(), some_rewards)
def test_values_are_means_of_children(forest, rewards):
    for tree in forest[1]:
        scored = assign(tree, leaf_rewards(tree, rewards))
        for index, children in enumerate(tree.children):
            valued = [scored.values[child] for child in children if scored.values[child] is not None]
            if valued:
                assert scored.values[index] == pytest.approx(sum(valued) / len(valued))
            elif children:
                assert scored.values[index] is None


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@given(forest=forests(), rewards=some_rewards)
def test_siblings_advantages_sum_to_zero_and_order_as_values(estimator, forest, rewards):
    for tree in forest[1]:
        scored = assign(tree, leaf_rewards(tree, rewards), estimator, prune_threshold=1e-3)
        for group in tree.children:
            members = [child for child in group if scored.kept[child]]
            advantages = [scored.advantages[child] for child in members]
            assert sum(advantages) == pytest.approx(0, abs=1e-9 * len(group) * max(map(abs, advantages), default=0))
            by_value = sorted(members, key=lambda child: scored.values[child])
            assert all(scored.advantages[a] <= scored.advantages[b] for a, b in pairwise(by_value))


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@given(values=unit_rewards, seed=st.randoms())
def test_relabelling_siblings_changes_nothing(estimator, values, seed):
    order = list(range(len(values)))
    seed.shuffle(order)
    expected = ESTIMATORS[estimator].of_group(values)
    shuffled = ESTIMATORS[estimator].of_group([values[i] for i in order])
    assert shuffled == pytest.approx([expected[i] for i in order], rel=1e-6, abs=1e-9)


@given(unit_rewards)
def test_treerpo_is_bounded_by_the_group_size(values):
    assert all(abs(advantage) <= len(values) * (1 + 1e-9) for advantage in treerpo(values))


@given(unit_rewards)
def test_treerpo_is_centered_over_the_bernoulli_variance(values):
    mean = sum(values) / len(values)
    assume(1e-3 < mean < 1 - 1e-3)
    variance = mean * (1 - mean)
    assert treerpo(values) == pytest.approx([a / variance for a in centered(values)])
    assert bernoulli_std(values) == pytest.approx([a / math.sqrt(variance) for a in centered(values)])


def test_group_std_is_trls():
    values = [0.1, 0.9, 0.4, 0.4]
    tensor = torch.tensor(values, dtype=torch.float64)
    expected = (tensor - tensor.mean()) / (tensor.std() + 1e-4)
    assert group_std(values) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("estimator", sorted(UNIT_INTERVAL_ESTIMATORS))
@pytest.mark.parametrize("value", [0.0, 1.0, 1 + 1e-7, -1e-7])
def test_equal_values_at_the_ends_of_the_interval_give_zero(estimator, value):
    assert ESTIMATORS[estimator].of_group([value] * 3) == [0.0] * 3


@pytest.mark.parametrize("estimator", sorted(UNIT_INTERVAL_ESTIMATORS))
def test_values_beyond_the_ends_of_the_interval_count_as_the_ends(estimator):
    assert ESTIMATORS[estimator].of_group([1 + ROUNDING, 0.25, -ROUNDING]) == ESTIMATORS[estimator].of_group(
        [1.0, 0.25, 0.0]
    )


def test_the_defaults_are_the_papers():
    """Eq. 4, and tau = 0.1: a range of 0.15 is kept, one of 0.05 is not."""
    tree = tree_of(2, 2)
    rewards = leaf_rewards(tree, [0.5, 0.65, 0.5, 0.55])
    scored = assign(tree, rewards)
    assert scored == assign(tree, rewards, "treerpo", 0.1) == assign_batch([tree], [rewards])[0]
    assert scored.kept[3:] == (True, True, False, False)


@given(forests(), some_rewards, st.one_of(st.none(), st.floats(-0.1, 1)))
def test_kept_is_decided_by_group(forest, rewards, threshold):
    for tree in forest[1]:
        scored = assign(tree, leaf_rewards(tree, rewards), "centered", threshold)
        scale = max(abs(reward or 0.0) for reward in scored.rewards.values())
        assert not scored.kept[ROOT]
        for group in tree.children:
            valued = [child for child in group if scored.values[child] is not None]
            keep = is_kept([scored.values[child] for child in valued], threshold, scale)
            assert all(scored.kept[child] == (keep and child in valued) for child in group)
        assert all(kept or advantage == 0 for kept, advantage in zip(scored.kept, scored.advantages, strict=True))


@pytest.mark.parametrize("estimator", sorted(UNIT_INTERVAL_ESTIMATORS))
@pytest.mark.parametrize("reward", [-0.5, 1.5, -1.5e-6, 1 + 1.5e-6])
def test_rewards_outside_the_interval_name_the_value_and_the_fix(estimator, reward):
    tree = tree_of(2, 2)
    with pytest.raises(ValueError, match=rf"is {reward}, but advantage_estimator='{estimator}'.*'group_std'"):
        assign(tree, leaf_rewards(tree, [0.5, reward]), estimator)
    assign(tree, leaf_rewards(tree, [0.5, reward]), "centered")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards_that_rounding_puts_outside_the_interval_are_taken(estimator):
    tree = tree_of(2, 2)
    assert all(assign(tree, leaf_rewards(tree, [-ROUNDING, 1 + ROUNDING]), estimator).kept[3:])


def test_an_estimator_must_give_one_advantage_to_each_value(monkeypatch):
    tree = tree_of(2, 2)
    monkeypatch.setitem(ESTIMATORS, "short", Estimator(of_group=lambda values: values[1:]))
    with pytest.raises(ValueError, match="shorter"):
        assign(tree, leaf_rewards(tree, [0.0, 1.0]), "short")


@pytest.mark.parametrize(
    "short",
    [
        Estimator(of_tree=lambda tree: [0.0]),
        Estimator(of_forest=lambda forest: [[0.0] for _ in forest]),
        Estimator(of_forest=lambda forest: []),
        Estimator(of_forest=lambda forest: [[0.0] * 7] * 2, has_unit_rms=True),
    ],
)
def test_an_estimator_must_give_one_advantage_to_each_node(short, monkeypatch):
    tree = tree_of(2, 2)
    monkeypatch.setitem(ESTIMATORS, "short", short)
    with pytest.raises(ValueError, match=r"longer|shorter"):
        assign(tree, leaf_rewards(tree, [0.0, 1.0]), "short")


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_are_refused(reward):
    tree = tree_of(2, 2)
    with pytest.raises(ValueError, match=f"is {reward}; return a finite number"):
        assign(tree, leaf_rewards(tree, [reward]), "centered")


def test_back_up_wants_one_reward_a_leaf():
    with pytest.raises(ValueError, match="node 2 is a leaf without a reward"):
        back_up([NO_PARENT, 0, 0], {1: 1.0})
    with pytest.raises(ValueError, match="node 0 is an inner node"):
        back_up([NO_PARENT, 0, 0], {0: 1.0, 1: 1.0, 2: 1.0})


@given(st.integers(2, 8), st.integers(0, 1000), unit_rewards)
def test_depth_one_is_a_flat_group(num_children, seed, rewards):
    shape = TreeShape((num_children,), 3, 3)
    (tree,) = grow([[1]], shape, RandomBackend(seed, 0.5))
    scored = assign(tree, leaf_rewards(tree, rewards), "group_std", prune_threshold=None)
    flat = [rewards[i % len(rewards)] for i in range(num_children)]
    assert scored.advantages[1:] == pytest.approx(group_std(flat))


def test_scored_trees_and_estimators_are_immutable():
    tree = tree_of(2, 2)
    rewards = leaf_rewards(tree, [0.0, 1.0])
    for record in (assign(tree, rewards), ValuedTree.of(tree, rewards), ESTIMATORS["treerpo"]):
        for each in fields(record):
            with pytest.raises(FrozenInstanceError):
                setattr(record, each.name, None)
    for record in (ValuedTree.of(tree, rewards), ESTIMATORS["treerpo"]):
        assert not hasattr(record, "__dict__")  # there is no room for other fields either


def test_a_node_of_a_valued_tree_is_one_row_unless_the_rows_are_told():
    tree = tree_of(1, 2)
    rewards = leaf_rewards(tree, [0.5])
    assert ValuedTree.of(tree, rewards).rows == (1,) * 6
    assert ValuedTree.of(tree, rewards, lambda tree: [3, 1, 2, 1, 1, 1]).rows == (3, 1, 2, 1, 1, 1)


def test_a_node_without_a_value_is_told():
    tree = tree_of(1, 1)
    valued = ValuedTree.of(tree, {3: None, 4: 1.0})
    assert valued.value(2) == 1
    with pytest.raises(ValueError, match="node 1 has no value"):
        valued.value(1)


def test_every_tree_of_a_batch_needs_its_rewards():
    tree = tree_of(2, 2)
    with pytest.raises(ValueError, match="shorter"):
        assign_batch([tree, tree], [leaf_rewards(tree, [0.0, 1.0])])
