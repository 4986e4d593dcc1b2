"""Growing trees wave by wave: what a shape plans, what a backend draws, and the loop between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

from ..tree import ROOT, Segment, Tree


# (index of the tree, index of the node)
Place = tuple[int, int]


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

    branches: tuple[Place, ...]
    num_children: int
    max_tokens: tuple[int, ...]
    is_last: bool
    delimiters: Delimiters | None = None
    extends: bool = False


class Shape(Protocol):
    """When and where trees branch, and the rows that they take in a batch."""

    @property
    def plans_whole_trees(self) -> bool:
        """Whether a plan needs all of a tree's nodes that may branch, because it compares or moves them."""
        ...

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

    def plan(self, trees: Sequence[Tree], wave: int, nodes: Sequence[Place]) -> tuple[list[Tree], Wave]:
        """The trees as the wave finds them, and the wave.

        Args:
            trees: As they are.
            wave: Index of the wave, from 0.
            nodes: Those that may branch: what a wave before has drawn.
        """
        ...

    def rows_below(self, tree: Tree) -> list[int]:
        """[N] rows that pass through each node."""
        ...

    def slots(self, tree: Tree) -> list[int]:
        """[num_leaves] the leaf that each row ends in."""
        ...


class Backend(Protocol):
    """Draws segments: prefixes in, segments out. A subclass has to say how, and may leave the rest as it is."""

    @property
    def block_rows(self) -> int | None:
        """Most segments that are drawn together; `None` for no limit.

        What does not fit waits until all that grows from those before it is drawn. So the state of at most as many
        nodes a depth has to be kept.
        """
        return None

    def extend(self, trees: Sequence[Tree], wave: Wave) -> list[list[Segment]]:
        """Draw the wave's segments: for each branch its children, i.i.d. given the prompt and the path."""
        ...

    def goes_on(self, has_branches: bool) -> bool:
        """Whether there is another wave. Processes that must call their engine together say the same, as long as one
        of them has branches; one that has none gets an empty wave.
        """
        return has_branches

    def release(self, nodes: Sequence[Place]) -> None:
        """Let go of nodes that will not branch."""
        return None


class Responder(Protocol):
    """Says something to what the model wrote: tools, with their results."""

    def answer(self, trees: Sequence[Tree], wave: Wave, segments: Sequence[Sequence[Segment]]) -> list[list[Segment]]:
        """The wave's segments, with what was said to those that asked for something."""
        ...


def grow(
    prompts: Sequence[Sequence[int]],
    shape: Shape,
    backend: Backend,
    responder: Responder | None = None,
    on_end: Callable[[Sequence[Tree], Sequence[int]], None] | None = None,
) -> list[Tree]:
    """Grow one tree per prompt.

    Waves go to the backend in blocks, and what grows from a block is drawn before the next one: depth first where a
    wave has several blocks.

    Args:
        prompts: Token ids of each prompt.
        shape: When to branch.
        backend: What draws the segments.
        responder: Who answers to segments; those that have an answer go on.
        on_end: Called with all trees and the indices of some, as soon as these will not grow any more: once for each
            tree, before the next block is drawn.

    Returns:
        One tree per prompt, in order. Nodes are in the order in which they were drawn, siblings together.
    """
    trees = [Tree.from_prompt(prompt) for prompt in prompts]
    drawn: list[Place] = [(index, ROOT) for index in range(len(trees))]
    waiting: list[tuple[int, Wave]] = []  # blocks and the indices of their waves, the next one last
    next_wave = 0  # of what was drawn
    growing = set(range(len(trees)))
    while True:
        if drawn and next_wave < shape.num_waves:
            trees, wave = shape.plan(trees, next_wave, drawn)
            going_on = set(wave.branches)
            backend.release([node for node in drawn if node not in going_on])
            blocks = in_blocks(wave, backend.block_rows, shape.plans_whole_trees)
            waiting += [(next_wave, block) for block in reversed(blocks)]
        if on_end is not None and (ended := growing - {tree for _, block in waiting for tree, _ in block.branches}):
            growing -= ended
            on_end(trees, sorted(ended))
        if not backend.goes_on(bool(waiting)):
            return trees
        if waiting:
            index, wave = waiting.pop()
        else:
            index, (trees, wave) = next_wave, shape.plan(trees, next_wave, [])
        segments = backend.extend(trees, wave)
        if responder is not None:
            segments = responder.answer(trees, wave, segments)
        drawn, next_wave = [node for nodes in drawn_nodes(trees, wave) for node in nodes], index + 1
        trees = with_segments(trees, wave, segments)


def in_blocks(wave: Wave, most_rows: int | None, whole_trees: bool) -> list[Wave]:
    """A wave in parts that draw at most so many segments each, or those of one branch, or of one tree."""
    if most_rows is None:
        return [wave] if wave.branches else []
    blocks: list[list[int]] = []
    units = groupby(range(len(wave.branches)), key=lambda index: wave.branches[index][0] if whole_trees else index)
    for _, unit in units:
        own = list(unit)
        if not blocks or (len(blocks[-1]) + len(own)) * wave.num_children > most_rows:
            blocks.append([])
        blocks[-1] += own
    return [
        replace(
            wave,
            branches=tuple(wave.branches[index] for index in block),
            max_tokens=tuple(wave.max_tokens[index] for index in block),
        )
        for block in blocks
    ]


def with_segments(trees: Sequence[Tree], wave: Wave, segments: Sequence[Sequence[Segment]]) -> list[Tree]:
    """The trees with what a wave has drawn."""
    grown = list(trees)
    groups: dict[int, dict[int, Sequence[Segment]]] = {}
    for (tree_index, node_index), group in zip(wave.branches, segments, strict=True):
        groups.setdefault(tree_index, {})[node_index] = group
    for index, of_tree in groups.items():
        if wave.extends:
            grown[index] = trees[index].extend({leaf: segment for leaf, (segment,) in of_tree.items()})
        else:
            grown[index] = trees[index].grow(of_tree)
    return grown


def drawn_nodes(trees: Sequence[Tree], wave: Wave) -> list[list[Place]]:
    """For each branch, where each of its segments will be in [`grow`]."""
    if wave.extends:
        return [[branch] for branch in wave.branches]
    next_index = [len(tree.nodes) for tree in trees]
    places = []
    for tree_index, _ in wave.branches:
        start = next_index[tree_index]
        next_index[tree_index] += wave.num_children
        places.append([(tree_index, node) for node in range(start, start + wave.num_children)])
    return places
