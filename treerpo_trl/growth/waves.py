"""Growing trees wave by wave: what a shape plans, what a backend draws, and the loop between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..tree import Segment, Tree


@dataclass(frozen=True, slots=True)
class Delimiters:
    """Texts after which a segment ends.

    Args:
        texts: Any of them ends a segment, if it stands in the segment's own tokens as a whole.
        min_tokens: Fewest tokens of a segment that one ends.
    """

    texts: tuple[str, ...]
    min_tokens: int


@dataclass(frozen=True, slots=True)
class Wave:
    """Which nodes branch next.

    Args:
        branches: (index of the tree, index of the node) of each parent-to-be, tree by tree.
        num_children: Children each of them gets.
        max_tokens: Most tokens of each child of a branch, for each branch.
        is_last: Whether the children run to the end of the completion.
        delimiters: What ends a child before its length limit; `None` for nothing.
    """

    branches: tuple[tuple[int, int], ...]
    num_children: int
    max_tokens: tuple[int, ...]
    is_last: bool
    delimiters: Delimiters | None = None


class Shape(Protocol):
    """When and where trees branch, and the rows that they take in a batch."""

    @property
    def num_waves(self) -> int:
        """Waves that a tree is grown in."""
        ...

    @property
    def num_leaves(self) -> int:
        """Most leaves of a tree: the rows that a prompt takes."""
        ...

    @property
    def max_depth(self) -> int:
        """Most segments of a path."""
        ...

    @property
    def longest_segment(self) -> int:
        """Most tokens of a segment."""
        ...

    def plan(self, trees: Sequence[Tree], wave: int) -> tuple[list[Tree], Wave]:
        """The trees as the wave finds them, and the wave."""
        ...

    def rows_below(self, tree: Tree) -> list[int]:
        """[N] rows that pass through each node."""
        ...

    def slots(self, tree: Tree) -> list[int]:
        """[num_leaves] the leaf that each row ends in."""
        ...


class Backend(Protocol):
    """Draws segments: prefixes in, segments out."""

    def extend(self, trees: Sequence[Tree], wave: Wave) -> list[list[Segment]]:
        """Draw the wave's segments: for each branch its children, i.i.d. given the prompt and the path."""
        ...


def grow(prompts: Sequence[Sequence[int]], shape: Shape, backend: Backend) -> list[Tree]:
    """Grow one tree per prompt.

    The backend is asked once a wave whatever happens, with an empty wave once every path has ended: processes that
    share a sharded model must make the same calls.

    Args:
        prompts: Token ids of each prompt.
        shape: When to branch.
        backend: What draws the segments.

    Returns:
        One tree per prompt, in order.
    """
    trees = [Tree.from_prompt(prompt) for prompt in prompts]
    for index in range(shape.num_waves):
        trees, wave = shape.plan(trees, index)
        segments = backend.extend(trees, wave)
        children: list[dict[int, list[Segment]]] = [{} for _ in trees]
        for (tree_index, node_index), group in zip(wave.branches, segments, strict=True):
            children[tree_index][node_index] = group
        trees = [tree.grow(group) for tree, group in zip(trees, children, strict=True)]
    return trees
