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
        extends: Whether the branches are leaves that go on: what is drawn becomes a part of them, and no child.
    """

    branches: tuple[tuple[int, int], ...]
    num_children: int
    max_tokens: tuple[int, ...]
    is_last: bool
    delimiters: Delimiters | None = None
    extends: bool = False


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


class Responder(Protocol):
    """Says something to what the model wrote: tools, with their results."""

    def goes_on(self, wave: Wave) -> bool:
        """Whether a wave is drawn. All processes say the same."""
        ...

    def answer(self, trees: Sequence[Tree], wave: Wave, segments: Sequence[Sequence[Segment]]) -> list[list[Segment]]:
        """The wave's segments, with what was said to those that asked for something."""
        ...


def grow(
    prompts: Sequence[Sequence[int]], shape: Shape, backend: Backend, responder: Responder | None = None
) -> list[Tree]:
    """Grow one tree per prompt.

    The backend is asked once a wave whatever happens, with an empty wave once every path has ended: processes that
    share a sharded model must make the same calls. With a responder, who decides how many waves there are, growth ends
    when all processes have no branches left.

    Args:
        prompts: Token ids of each prompt.
        shape: When to branch.
        backend: What draws the segments.
        responder: Who answers to segments; those that have an answer go on.

    Returns:
        One tree per prompt, in order.
    """
    trees = [Tree.from_prompt(prompt) for prompt in prompts]
    for index in range(shape.num_waves):
        trees, wave = shape.plan(trees, index)
        if not (responder.goes_on(wave) if responder is not None else wave.branches or not wave.extends):
            break
        segments = backend.extend(trees, wave)
        if responder is not None:
            segments = responder.answer(trees, wave, segments)
        children: list[dict[int, list[Segment]]] = [{} for _ in trees]
        for (tree_index, node_index), group in zip(wave.branches, segments, strict=True):
            children[tree_index][node_index] = group
        trees = [
            tree.extend({leaf: segment for leaf, (segment,) in group.items()}) if wave.extends else tree.grow(group)
            for tree, group in zip(trees, children, strict=True)
        ]
    return trees


def drawn_nodes(trees: Sequence[Tree], wave: Wave) -> list[list[tuple[int, int]]]:
    """For each branch, (index of the tree, index of the node) that each of its segments will have in [`grow`]."""
    if wave.extends:
        return [[branch] for branch in wave.branches]
    next_index = [len(tree.nodes) for tree in trees]
    places = []
    for tree_index, _ in wave.branches:
        start = next_index[tree_index]
        next_index[tree_index] += wave.num_children
        places.append([(tree_index, node) for node in range(start, start + wave.num_children)])
    return places
