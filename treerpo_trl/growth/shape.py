"""The shape of trees that branch by depth, and the rows that each of their nodes takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..tree import Tree
from .waves import Delimiters, Place, Wave


@dataclass(frozen=True, slots=True)
class TreeShape:
    """How wide, how deep and how long a tree may grow.

    Args:
        branching: [D] number of children of an unfinished node, by depth (N_1 .. N_D).
        segment_length: Most tokens of a segment (the paper's L_step).
        max_completion_length: Most tokens of a root-to-leaf path. Without delimiters at most D * segment_length; when
            less, the last segment is the shorter one.
        delimiters: What ends a segment before it has `segment_length` tokens. A segment at depth D has no such end
            and no limit but that of the path. `None`: segments end at their length only.
    """

    branching: tuple[int, ...]
    segment_length: int
    max_completion_length: int
    delimiters: Delimiters | None = None

    @property
    def plans_whole_trees(self) -> bool:
        """Each node branches by itself."""
        return False

    @property
    def max_depth(self) -> int:
        """D."""
        return len(self.branching)

    @property
    def num_waves(self) -> int:
        """Waves that a tree is grown in: one a depth."""
        return self.max_depth

    @property
    def num_leaves(self) -> int:
        """Leaves of the complete tree, N_1 x .. x N_D: the rows a prompt takes in the batch."""
        return math.prod(self.branching)

    @property
    def longest_segment(self) -> int:
        """Most tokens of any segment."""
        return self.segment_length if self.delimiters is None else self.max_completion_length

    def plan(self, trees: Sequence[Tree], wave: int, nodes: Sequence[Place]) -> tuple[list[Tree], Wave]:
        """Every unfinished node at depth `wave` gets N_(wave + 1) children (TreeRPO, section 3.1).

        Args:
            trees: As they are.
            wave: Index of the wave, from 0.
            nodes: Nodes at that depth.

        Returns:
            The trees, unchanged, and the wave; without branches if every path has ended above.
        """
        is_last = wave + 1 == self.max_depth
        runs_on = is_last and self.delimiters is not None
        branches, max_tokens = [], []
        for tree_index, node_index in nodes:
            tree = trees[tree_index]
            left = self.max_completion_length - tree.lengths[node_index]
            if not tree.nodes[node_index].ended and left > 0:
                branches.append((tree_index, node_index))
                max_tokens.append(left if runs_on else min(left, self.segment_length))
        delimiters = None if is_last else self.delimiters
        return list(trees), Wave(tuple(branches), self.branching[wave], tuple(max_tokens), is_last, delimiters)

    def rows_below(self, tree: Tree) -> list[int]:
        """[N] rows of the batch that pass through each node: the leaves of the complete tree below its place.

        A leaf that ended early fills them all, so that a plain mean over a node's rows is the node's value.

        Raises:
            ValueError: The tree was grown with another shape.
        """
        for index, children in enumerate(tree.children):
            depth = tree.depths[index]
            if children and (depth >= self.max_depth or len(children) != self.branching[depth]):
                raise ValueError(
                    f"node {index} at depth {depth} has {len(children)} children, which branching {self.branching} "
                    "does not give it; pass the shape that the tree was grown with"
                )
        below = [math.prod(self.branching[depth:]) for depth in range(self.max_depth + 1)]
        return [below[depth] for depth in tree.depths]

    def slots(self, tree: Tree) -> list[int]:
        """[N_1 x .. x N_D] the leaf that each row of the tree ends in, depth first."""
        rows = self.rows_below(tree)
        return [leaf for leaf in tree.leaves for _ in range(rows[leaf])]
