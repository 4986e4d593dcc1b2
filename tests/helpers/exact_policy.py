"""A policy small enough to enumerate every forest it can draw: exact expectations in place of samples.

A step is one token, of which the last of the vocabulary ends the path. The logits of each state are free, so the score
of a token at its state is onehot - p, 0 at other states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from math import factorial, prod

import numpy as np
from numpy.typing import NDArray

from treerpo_trl.credit import ValuedTree
from treerpo_trl.tree import Segment, Tree


Path = tuple[int, ...]
Branch = tuple[int, tuple["Branch", ...]]  # a token and what grew below it
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Policy:
    """Probabilities of the next token after each path that goes on, and the reward of each path that does not.

    Args:
        probabilities: Path -> [V].
        num_steps: Longest path.
    """

    probabilities: dict[Path, Array]
    num_steps: int

    @classmethod
    def random(cls, num_tokens: int, num_steps: int, seed: int) -> Policy:
        """Normal logits, for `num_tokens` tokens, the end among them."""
        draw = np.random.default_rng(seed)
        probabilities = {}
        for length in range(num_steps):
            for path in product(range(num_tokens - 1), repeat=length):
                logits = draw.normal(size=num_tokens)
                probabilities[path] = np.exp(logits) / np.exp(logits).sum()
        return cls(probabilities, num_steps)

    @property
    def num_tokens(self) -> int:
        return len(self.probabilities[()])

    def goes_on(self, path: Path) -> bool:
        return path in self.probabilities

    def whole_paths(self) -> list[Path]:
        """Every path that ends, or is as long as paths get."""
        following = ((*path, token) for path in self.probabilities for token in range(self.num_tokens))
        return [path for path in following if not self.goes_on(path)]

    def score(self, path: Path) -> dict[Path, Array]:
        """State -> gradient of the log-probability of the last token of a path; 0 elsewhere."""
        return {path[:-1]: np.eye(self.num_tokens)[path[-1]] - self.probabilities[path[:-1]]}

    def gradient(self, rewards: dict[Path, float], depth: int) -> dict[Path, Array]:
        """The exact E[R S_d], the part of the gradient of the expected reward that the tokens of one depth have."""
        total = {state: np.zeros(self.num_tokens) for state in self.probabilities}
        for path in self.whole_paths():
            if len(path) >= depth:
                chance = prod(self.probabilities[path[:i]][path[i]] for i in range(len(path)))
                for state, score in self.score(path[:depth]).items():
                    total[state] += chance * rewards[path] * score
        return total

    def trees(self, branching: Sequence[int]) -> list[tuple[float, Tree]]:
        """Every tree, but for the order of siblings, with its probability."""
        return [(chance, _tree(children, self)) for chance, children in self._children((), branching)]

    def _children(self, path: Path, branching: Sequence[int]) -> Iterator[tuple[float, tuple[Branch, ...]]]:
        if not branching or not self.goes_on(path):
            yield 1.0, ()
            return
        branches = [
            (self.probabilities[path][token] * chance, (token, below))
            for token in range(self.num_tokens)
            for chance, below in self._children((*path, token), branching[1:])
        ]
        for group in combinations_with_replacement(range(len(branches)), branching[0]):
            ways = factorial(len(group)) // prod(factorial(group.count(one)) for one in set(group))
            yield ways * prod(branches[one][0] for one in group), tuple(branches[one][1] for one in group)


def _tree(children: tuple[Branch, ...], policy: Policy) -> Tree:
    tree, parents = Tree.from_prompt([0]), [(0, (), children)]
    while parents:
        following, segments, place = [], {}, len(tree.nodes)
        for parent, path, group in parents:
            for token, below in group:
                norm = float(np.square(policy.score((*path, token))[path]).sum())
                is_end = token == policy.num_tokens - 1
                segments.setdefault(parent, []).append(Segment((token,), is_end, score_norms=(norm,)))
                following.append((place, (*path, token), below))
                place += 1
        tree = tree.grow(segments) if segments else tree
        parents = [each for each in following if each[2]]
    return tree


def path_of(tree: Tree, node: int) -> Path:
    return tuple(tree.completion_ids(node))


def valued(tree: Tree, rewards: dict[Path, float | None]) -> ValuedTree:
    return ValuedTree.of(tree, {leaf: rewards[path_of(tree, leaf)] for leaf in tree.leaves})


def expected_updates(
    policy: Policy,
    branching: Sequence[int],
    prompts: Sequence[dict[Path, float | None]],
    estimate: Callable[[list[ValuedTree]], list[list[float]]],
) -> list[dict[int, dict[Path, Array]]]:
    """E of the sum over nodes c of A(c) S(c), exactly, over all forests with one tree a prompt.

    Args:
        policy: What trees are drawn from.
        branching: Their shape.
        prompts: Of each, the reward of every whole path.
        estimate: The trees of a forest -> the advantages of each.

    Returns:
        Of each prompt, depth -> state -> [V].
    """
    shapes = policy.trees(branching)
    drawn = [[(chance, tree, valued(tree, rewards)) for chance, tree in shapes] for rewards in prompts]
    totals = [
        {depth: {state: np.zeros(policy.num_tokens) for state in policy.probabilities} for depth in
         range(1, len(branching) + 1)}
        for _ in prompts
    ]  # fmt: skip
    for forest in product(*drawn):
        probability = prod(chance for chance, _, _ in forest)
        advantages = estimate([tree for _, _, tree in forest])
        for total, (_, tree, _), of_tree in zip(totals, forest, advantages, strict=True):
            for node in range(1, len(tree.nodes)):
                for state, score in policy.score(path_of(tree, node)).items():
                    total[tree.depths[node]][state] += probability * of_tree[node] * score
    return totals


def cosine(first: dict[Path, Array], second: dict[Path, Array]) -> float:
    """Between two gradients over the same states."""
    a, b = (np.concatenate([gradient[state] for state in sorted(gradient)]) for gradient in (first, second))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
