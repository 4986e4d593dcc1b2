"""Trees whose segments end where a turn does: the model writes, tools answer, and the path branches below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..tree import Tree
from .shape import TreeShape
from .waves import Place, Wave


@dataclass(frozen=True, slots=True)
class TurnShape(TreeShape):
    """How wide and how deep trees branch below turns.

    A node is a turn with what tools answered to it, or a part of a turn that reached `segment_length`. A node at depth
    D has no such limit, and goes on with more turns, unbranched, until one calls no tool: so rows end with an answer.

    Args:
        branching, segment_length: See [`TreeShape`].
        max_completion_length: Most tokens of a root-to-leaf path, what tools answered included.
    """

    @property
    def num_waves(self) -> int:
        """Without a limit: trees grow until no path goes on."""
        return sys.maxsize

    @property
    def longest_segment(self) -> int:
        """Most tokens of any segment."""
        return self.max_completion_length

    def plan(self, trees: Sequence[Tree], wave: int, nodes: Sequence[Place]) -> tuple[list[Tree], Wave]:
        """Unfinished nodes branch by depth as in any tree; then, at depth D, they go on.

        Args:
            trees: As they are.
            wave: Index of the wave, from 0.
            nodes: Nodes at that depth, or at depth D.

        Returns:
            The trees, unchanged, and the wave; without branches if every path has ended.
        """
        goes_on = wave >= self.max_depth
        is_last = wave + 1 >= self.max_depth
        branches, max_tokens = [], []
        for tree_index, node_index in nodes:
            tree = trees[tree_index]
            left = self.max_completion_length - tree.lengths[node_index]
            if not tree.nodes[node_index].ended and left > 0:
                branches.append((tree_index, node_index))
                max_tokens.append(left if is_last else min(left, self.segment_length))
        num_children = 1 if goes_on else self.branching[wave]
        return list(trees), Wave(tuple(branches), num_children, tuple(max_tokens), is_last, extends=goes_on)
