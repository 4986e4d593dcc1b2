"""Which estimators follow the exact gradient of the expected reward: expectations over every forest, not samples."""

from dataclasses import replace
from itertools import product
from math import prod, sqrt

import numpy as np
import pytest
from exact_policy import Policy, cosine, expected_updates

from treerpo_trl.credit import ESTIMATORS, ValuedTree, optimal_baseline


# Tokens, the end among them, and the shape. Branches may end at depth 1; with 1 some nodes have no sibling.
SHAPES = [(3, (3,)), (3, (2, 2)), (2, (2, 2)), (2, (3, 2)), (3, (2, 1)), (3, (1, 2))]
SIBLINGS = [shape for shape in SHAPES if 1 not in shape[1]]


def coins(policy: Policy, seed: int) -> dict:
    """A reward of 0 or 1 for each whole path, some of each."""
    paths, draw = policy.whole_paths(), np.random.default_rng(seed)
    rewards = [0.0, 1.0, *draw.integers(0, 2, len(paths) - 2)]
    return dict(zip(paths, draw.permutation(rewards).tolist(), strict=True))


def graded(policy: Policy, seed: int) -> dict:
    draw = np.random.default_rng(seed)
    return {path: float(draw.uniform()) for path in policy.whole_paths()}


def tree_by_tree(name: str):
    """Advantages of an estimator that looks at one tree, without pruning and scaling."""
    estimator = ESTIMATORS[name]

    def of_tree(tree: ValuedTree) -> list[float]:
        if estimator.of_tree is not None:
            return estimator.of_tree(tree)
        advantages = [0.0] * len(tree.parents)
        for group in tree.groups:
            if len(group) > 1:
                for node, advantage in zip(group, estimator.of_group([*map(tree.value, group)]), strict=True):
                    advantages[node] = advantage
        return advantages

    return lambda forest: [of_tree(tree) for tree in forest]


def rows_below(branching) -> list[int]:
    return [prod(branching[depth:]) for depth in range(len(branching) + 1)]


def with_rows(forest, below):
    return [replace(tree, rows=tuple(below[depth] for depth in tree.depths)) for tree in forest]


def assert_parts(updates, policy, prompts, factors) -> None:
    """Of each prompt and depth, the expected update is the factor times the depth's part of the exact gradient."""
    for update, rewards in zip(updates, prompts, strict=True):
        for depth, factor in factors.items():
            exact = policy.gradient(rewards, depth)
            for state, expected in exact.items():
                assert update[depth][state] == pytest.approx(factor * expected, abs=1e-12)


def test_the_enumeration_holds_every_tree():
    policy = Policy.random(3, 2, 0)
    trees = policy.trees((2, 2))
    assert sum(chance for chance, _ in trees) == pytest.approx(1) and len(trees) == 13 * 14 // 2
    # Two of 13 branches: the end, and each of two tokens with six pairs below it.
    assert len({len(tree.nodes) for _, tree in trees}) == 3


@pytest.mark.parametrize("make", [coins, graded])
@pytest.mark.parametrize(("num_tokens", "branching"), SIBLINGS)
@pytest.mark.parametrize("name", ["leave_one_out", "tree_mean", "centered", "parent"])
def test_estimators_of_one_tree_follow_the_exact_gradient(name, num_tokens, branching, make):
    policy = Policy.random(num_tokens, len(branching), 1)
    prompts = [make(policy, 2)]
    updates = expected_updates(policy, branching, prompts, tree_by_tree(name))
    is_short = name in ("centered", "parent")  # each node is in its own baseline
    factors = {
        depth: prod(branching[:depth]) * ((branching[depth - 1] - 1) / branching[depth - 1] if is_short else 1)
        for depth in range(1, len(branching) + 1)
    }
    assert_parts(updates, policy, prompts, factors)


COSINES = {
    "treerpo": (0.999, 0.925), "bernoulli_std": (1.0, 0.979), "group_std": (0.995, 0.253), "treerl": (0.995, 0.994),
    "treepo": (0.995, 0.993), "tree_grpo": (0.988, 0.652),
}  # fmt: skip


@pytest.mark.parametrize("name", COSINES)
def test_how_far_the_others_are_from_the_exact_gradient(name):
    """The lowest cosines at one depth, of 10 policies with 2 x 2 trees, are those in the docstrings."""
    for make, expected in zip((coins, graded), COSINES[name], strict=True):
        lowest = 1.0
        for seed in range(10):
            policy = Policy.random(3, 2, seed)
            rewards = make(policy, seed)
            (update,) = expected_updates(policy, (2, 2), [rewards], tree_by_tree(name))
            lowest = min(lowest, *(cosine(update[depth], policy.gradient(rewards, depth)) for depth in (1, 2)))
        assert lowest == pytest.approx(expected, abs=6e-4)
    function = ESTIMATORS[name].of_group or ESTIMATORS[name].of_tree
    assert "cosines {:.3f} and {:.3f}".format(*COSINES[name]) in " ".join(function.__doc__.split())


@pytest.mark.parametrize("name", ["treerl", "treepo"])
def test_estimators_that_count_leaves_are_exact_where_no_branch_ends_early(name):
    policy = Policy.random(3, 1, 1)
    prompts = [graded(policy, 2)]
    (update,) = expected_updates(policy, (3,), prompts, tree_by_tree(name))
    assert cosine(update[1], policy.gradient(prompts[0], 1)) == pytest.approx(1)


@pytest.mark.parametrize("name", ["leave_one_out", "centered", "optimal_baseline"])
def test_leaves_that_no_one_could_score_cost_nothing_but_size_if_chance_decides(name):
    """Each leaf without a value with chance 1/4, whatever it holds: a positive factor is left, of flat trees."""
    policy, branching, share = Policy.random(2, 1, 5), (2,), 0.25
    rewards = {(0,): 0.3, (1,): 1.0}
    total, weight = {(): np.zeros(2)}, 0.0
    for missing in product([False, True], repeat=4):
        chance = prod(share if one else 1 - share for one in missing)
        update = expected_updates(policy, branching, [rewards] * 2, hiding(name, missing))[0][1]
        total[()] += chance * update[()]
        weight += chance
    exact = policy.gradient(rewards, 1)[()]
    factor = total[()][0] / exact[0]
    assert weight == pytest.approx(1) and factor > 0.5
    assert total[()] == pytest.approx(factor * exact)


def hiding(name: str, missing):
    """An estimator of forests of two flat trees with two leaves, some of which have no value."""

    def estimate(forest):
        masks = (missing[:2], missing[2:])
        hidden = [
            replace(
                tree,
                rewards={leaf: None if hide else tree.rewards[leaf] for leaf, hide in zip((1, 2), mask, strict=True)},
                values=(None, *(None if hide else tree.values[leaf] for leaf, hide in zip((1, 2), mask, strict=True))),
            )
            for tree, mask in zip(forest, masks, strict=True)
        ]
        if name == "optimal_baseline":
            return optimal_baseline(with_rows(hidden, [2, 1]))
        return tree_by_tree(name)(hidden)

    return estimate


# A forest of one tree has no other to be compared with; of two, a single other, whose mean is left; of three, slopes.
@pytest.mark.parametrize(
    ("num_tokens", "branching", "num_trees", "make"),
    [(2, (2, 2), 1, coins), (3, (2, 2), 1, graded), (3, (2, 1), 2, coins), (3, (1, 2), 2, graded),
     (2, (2, 2), 2, graded), (2, (2, 2), 3, coins), (2, (1, 2), 3, graded), (2, (2, 1), 3, coins),
     (2, (1, 1), 4, graded), (3, (1,), 4, coins), (3, (2,), 3, graded), (2, (2,), 4, coins), (2, (3,), 3, graded)],
)  # fmt: skip
def test_the_optimal_baseline_follows_the_exact_gradient(num_tokens, branching, num_trees, make):
    """Of every prompt of the batch, though each is compared with the others, and though branches end early."""
    policy = Policy.random(num_tokens, len(branching), 3)
    prompts = [make(policy, 10 + index) for index in range(num_trees)]
    below = rows_below(branching)
    updates = expected_updates(policy, branching, prompts, lambda forest: optimal_baseline(with_rows(forest, below)))
    factors = {depth: prod(branching[:depth]) * sqrt(below[depth]) for depth in range(1, len(branching) + 1)}
    assert_parts(updates, policy, prompts, factors)
