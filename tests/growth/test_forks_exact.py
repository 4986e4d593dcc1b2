"""How far forks at uncertain tokens bend the gradient: exact expectations on policies small enough to enumerate."""

from itertools import product
from math import log, prod, sqrt

import numpy as np
import pytest
from random_trees import plan

from treerpo_trl.credit import ValuedTree
from treerpo_trl.growth import ForkShape
from treerpo_trl.tree import ROOT, Segment, Tree


STEPS, TOKENS = 4, 3


class Policy:
    """A table of logits: a row of probabilities for each path of less than `STEPS` tokens."""

    def __init__(self, seed: int):
        draw = np.random.default_rng(seed)
        states = [path for length in range(STEPS) for path in product(range(TOKENS), repeat=length)]
        logits = draw.normal(size=(len(states), TOKENS)) * 1.5
        self.state = {path: index for index, path in enumerate(states)}
        self.probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        self.rewards = {path: float(draw.random() < 0.3) for path in product(range(TOKENS), repeat=STEPS)}

    def prob(self, path, step: int) -> float:
        """Of the token at a step."""
        return self.probs[self.state[path[:step]], path[step]]

    def chance(self, path, start: int = 0) -> float:
        return prod(self.prob(path, step) for step in range(start, STEPS))

    def segment(self, path, start: int = 0) -> Segment:
        surprisals = tuple(-log(self.prob(path, step)) for step in range(start, STEPS))
        return Segment(tuple(path[start:]), True, uncertainties=surprisals)

    def add_score(self, gradient, path, start: int, end: int, weight: float) -> None:
        """Add the gradient of the log-probability of some of a path's tokens."""
        for step in range(start, end):
            row = self.state[path[:step]]
            gradient[row] -= weight * self.probs[row]
            gradient[row, path[step]] += weight


def expected_update(policy: Policy, shape: ForkShape, mean_reward: float) -> np.ndarray:
    """Of a trunk and one fork, with the baseline of infinitely many other trees: their mean reward."""
    update = np.zeros_like(policy.probs)
    for trunk in policy.rewards:
        (tree,), wave = plan(shape, [Tree.from_prompt([9]).grow({ROOT: [policy.segment(trunk)]})], 1)
        ((_, head),) = wave.branches
        fork = tree.lengths[head]
        for tokens in product(range(TOKENS), repeat=STEPS - fork):
            other = (*trunk[:fork], *tokens)
            grown = tree.grow({head: [policy.segment(other, fork)]})
            rewards = {leaf: policy.rewards[tuple(grown.completion_ids(leaf))] for leaf in grown.leaves}
            valued = ValuedTree.of(grown, rewards, shape.rows_below)
            for node in range(1, len(grown.nodes)):
                path = tuple(grown.completion_ids(node))
                advantage = sqrt(valued.rows[node]) * (valued.value(node) - mean_reward)
                chance = policy.chance(trunk) * policy.chance(other, fork)
                start = grown.lengths[grown.nodes[node].parent]
                policy.add_score(update, path, start, grown.lengths[node], chance * advantage)
    return update


@pytest.mark.parametrize("seed", range(4))
def test_the_expected_update_points_along_the_exact_gradient(seed):
    """Not quite: which token forks depends on what was drawn after it. The docstring of `ForkShape` has the cosine."""
    policy = Policy(seed)
    exact = np.zeros_like(policy.probs)
    for path, reward in policy.rewards.items():
        policy.add_score(exact, path, 0, STEPS, policy.chance(path) * reward)
    mean_reward = sum(policy.chance(path) * reward for path, reward in policy.rewards.items())
    update = expected_update(policy, ForkShape(1, 1, 1, 1, 1, STEPS), mean_reward)
    assert (update * exact).sum() / np.linalg.norm(update) / np.linalg.norm(exact) > 0.97
