"""When to branch: the shape of a tree, the plan of a wave, and the loop that grows trees wave by wave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..tree import Segment, Tree


@dataclass(frozen=True, slots=True)
class TreeShape:
    """How wide, how deep and how long a tree may grow.

    Args:
        branching: [D] number of children of an unfinished node, by depth (N_1 .. N_D).
        segment_length: Most tokens of a segment (the paper's L_step).
        max_completion_length: Most tokens of a root-to-leaf path. At most D * segment_length; when less, the last
            segment is the shorter one.
    """

    branching: tuple[int, ...]
    segment_length: int
    max_completion_length: int

    @property
    def max_depth(self) -> int:
        """D."""
        return len(self.branching)

    @property
    def num_leaves(self) -> int:
        """Leaves of the complete tree, N_1 x .. x N_D: the rows a prompt takes in the batch."""
        return math.prod(self.branching)

    @property
    def rows_below(self) -> tuple[int, ...]:
        """[D + 1] leaves of the complete tree below a node, by depth: the rows that pass through it."""
        return tuple(math.prod(self.branching[depth:]) for depth in range(self.max_depth + 1))

    def max_tokens(self, depth: int) -> int:
        """Most tokens of a segment at `depth` (1..D)."""
        return min(self.segment_length, self.max_completion_length - (depth - 1) * self.segment_length)


@dataclass(frozen=True, slots=True)
class Wave:
    """Which nodes branch next, all of one depth.

    Args:
        branches: (index of the tree, index of the node) of each parent-to-be, tree by tree.
        num_children: Children each of them gets.
        max_tokens: Most tokens of each child.
        is_last: Whether the children are leaves in any case, so that nothing needs to be kept to continue from them.
    """

    branches: tuple[tuple[int, int], ...]
    num_children: int
    max_tokens: int
    is_last: bool


class Backend(Protocol):
    """Draws segments: prefixes in, segments out."""

    def extend(
        self,
        trees: Sequence[Tree],
        branches: Sequence[tuple[int, int]],
        num_children: int,
        max_tokens: int,
        is_last: bool,
    ) -> list[list[Segment]]:
        """Draw `num_children` segments below each branch, i.i.d. given the prompt and the path (see [`Wave`])."""
        ...


def plan_wave(trees: Sequence[Tree], shape: TreeShape, depth: int) -> Wave:
    """Every unfinished node at `depth` - 1 gets N_depth children (TreeRPO, section 3.1).

    Returns:
        The wave; without branches if every path has ended above.
    """
    branches = tuple(
        (tree_index, node_index)
        for tree_index, tree in enumerate(trees)
        for node_index, node in enumerate(tree.nodes)
        if tree.depths[node_index] == depth - 1 and not node.ended
    )
    return Wave(branches, shape.branching[depth - 1], shape.max_tokens(depth), is_last=depth == shape.max_depth)


def grow(prompts: Sequence[Sequence[int]], shape: TreeShape, backend: Backend) -> list[Tree]:
    """Grow one tree per prompt, one wave a depth.

    The backend is asked D times whatever happens, with an empty wave once every path has ended: processes that share
    a sharded model must make the same calls.

    Args:
        prompts: Token ids of each prompt.
        shape: When to branch.
        backend: What draws the segments.

    Returns:
        One tree per prompt, in order.
    """
    trees = [Tree.from_prompt(prompt) for prompt in prompts]
    for depth in range(1, shape.max_depth + 1):
        wave = plan_wave(trees, shape, depth)
        segments = backend.extend(trees, wave.branches, wave.num_children, wave.max_tokens, wave.is_last)
        children: list[dict[int, list[Segment]]] = [{} for _ in trees]
        for (tree_index, node_index), group in zip(wave.branches, segments, strict=True):
            children[tree_index][node_index] = group
        trees = [tree.grow(group) for tree, group in zip(trees, children, strict=True)]
    return trees
