"""Trees that fork where the policy was uncertain: whole responses first, then forks at their least certain tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..tree import ROOT, Tree
from .waves import Place, Wave


@dataclass(frozen=True, slots=True)
class ForkShape:
    """How many responses a tree begins with, and how often they fork (EPTree of TreeRL, arXiv:2506.11902).

    A fork cuts a node in two: the tokens before it, which lead to both the tokens that were drawn there and new
    continuations from there to the end. In each round every trunk, with all that has grown from it, forks at its least
    certain tokens.

    Which token forks depends on what was drawn after it, so the value of the tokens before it is not quite an
    expectation. It matters little: on random policies of four steps, the expected update of a trunk with one fork has
    the cosine 0.987 (0.96 at worst) to the exact gradient, and 0.990 if the fork is at a fixed step, where the weights
    of the depths are all that differs.

    Args:
        num_trunks: M, responses that are drawn first.
        forks_per_trunk: K, forks in each trunk's tree, in each round; fewer where there are not as many places.
        continuations_per_fork: T, new continuations of each fork.
        num_rounds: L.
        min_segment_length: Fewest tokens that a fork leaves on either side of it in the node it cuts. At least 1, so
            that no fork is at a branch's first token.
        max_completion_length: Most tokens of a root-to-leaf path.
    """

    num_trunks: int
    forks_per_trunk: int
    continuations_per_fork: int
    num_rounds: int
    min_segment_length: int
    max_completion_length: int

    @property
    def plans_whole_trees(self) -> bool:
        """A fork is chosen among all tokens of a trunk's tree, and cuts a node, which moves others."""
        return True

    @property
    def num_waves(self) -> int:
        """One for the trunks, and one a round."""
        return 1 + self.num_rounds

    @property
    def num_leaves(self) -> int:
        """M (1 + K T L): most leaves of a tree, the rows that a prompt takes."""
        return self.num_trunks * (1 + self.forks_per_trunk * self.continuations_per_fork * self.num_rounds)

    @property
    def max_depth(self) -> int:
        """1 + K L: each fork may lie below all others."""
        return 1 + self.forks_per_trunk * self.num_rounds

    @property
    def longest_segment(self) -> int:
        """A response without a fork is one segment."""
        return self.max_completion_length

    def plan(self, trees: Sequence[Tree], wave: int, nodes: Sequence[Place]) -> tuple[list[Tree], Wave]:
        """The trunks, or the forks of a round, of trees that are cut where they fork.

        Args:
            trees: As they are.
            wave: Index of the wave, from 0.
            nodes: Whose trees fork.
        """
        cut_trees = list(trees)
        if wave == 0:
            branches, num_children = list(nodes), self.num_trunks
        else:
            branches, num_children = [], self.continuations_per_fork
            for index in dict.fromkeys(index for index, _ in nodes):
                tree = trees[index]
                forks = choose_forks(tree, self.forks_per_trunk, self.min_segment_length)
                offsets: dict[int, list[int]] = defaultdict(list)
                for node, offset in sorted(forks):
                    offsets[node].append(offset)
                cut_trees[index], before = tree.cut(offsets)
                branches += sorted((index, before[fork]) for fork in forks)
        max_tokens = [self.max_completion_length - cut_trees[index].lengths[node] for index, node in branches]
        return cut_trees, Wave(tuple(branches), num_children, tuple(max_tokens), is_last=True)

    def rows_below(self, tree: Tree) -> list[int]:
        """[N] leaves below each node, itself if it is one. Rows that are repeats are not counted."""
        rows = [0] * len(tree.nodes)
        for leaf in tree.leaves:
            for node in (ROOT, *tree.path(leaf)):
                rows[node] += 1
        return rows

    def slots(self, tree: Tree) -> list[int]:
        """[M (1 + K T L)] the leaf that each row of the tree ends in, depth first; the last one fills what is left."""
        missing = self.num_leaves - len(tree.leaves)
        if missing < 0:
            raise ValueError(
                f"a tree has {len(tree.leaves)} leaves, but its shape allows {self.num_leaves}; pass the shape that "
                "the tree was grown with"
            )
        return [*tree.leaves, *tree.leaves[-1:] * missing]


def choose_forks(tree: Tree, forks_per_trunk: int, min_segment_length: int) -> list[tuple[int, int]]:
    """Where a tree forks next: at its least certain tokens.

    Args:
        tree: A grown tree, whose nodes have `uncertainties`.
        forks_per_trunk: Most forks below each child of the root, itself included.
        min_segment_length: Fewest tokens on either side of a fork in the node that it cuts.

    Returns:
        (node, offset) of each fork, trunk by trunk, the least certain first: `offset` tokens of the node stay before
        it. Of equally uncertain tokens, those of earlier nodes come first, and in a node the earlier ones. A token
        whose uncertainty is not a number is taken for certain.

    Raises:
        ValueError: A node has no `uncertainties`.
    """
    trunks: list[int] = [ROOT]
    places: dict[int, list[tuple[float, int, int]]] = defaultdict(list)
    for index, node in enumerate(tree.nodes[1:], start=1):
        trunks.append(index if node.parent == ROOT else trunks[node.parent])
        if node.uncertainties is None:
            raise ValueError(f"node {index} has no uncertainties; the backend that drew it reports none")
        for offset in range(min_segment_length, len(node.token_ids) - min_segment_length + 1):
            uncertainty = node.uncertainties[offset]
            if not math.isnan(uncertainty):
                places[trunks[index]].append((-uncertainty, index, offset))
    forks: list[tuple[int, int]] = []
    for of_trunk in places.values():
        chosen: list[tuple[int, int]] = []
        for _, index, offset in sorted(of_trunk):
            is_clear = all(other != index or abs(at - offset) >= min_segment_length for other, at in chosen)
            if is_clear and len(chosen) < forks_per_trunk:
                chosen.append((index, offset))
        forks += chosen
    return forks
