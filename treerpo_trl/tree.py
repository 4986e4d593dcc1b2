"""What was sampled: a prompt and the segments that branch from it, as flat and immutable data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any


NUMBERS = ("logprobs", "score_norms", "uncertainties")  # of each token, if the backend reports them
OF_TOKENS = ("token_ids", "sampled", *NUMBERS)
NO_PARENT = -1
ROOT = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """One sampled step, before it has a place in a tree.

    Args:
        token_ids: The sampled tokens, at least one, and what tools answered to them. The end-of-sequence token, if
            drawn, is the last that was sampled.
        ended: Whether generation is over after this segment (it drew EOS or a stop string). A segment that merely
            reached its length limit has not ended: it can branch. Nor has a turn that tools answered to.
        logprobs: Log-probability, in nats, that each token was drawn with; `None` if the backend does not report it.
        score_norms: Of each token t, the squared norm of the gradient of its log-probability for the logits,
            1 - 2 p_t + sum_v p_v^2; `None` if the backend does not report it.
        uncertainties: How uncertain the policy was of each token, in nats: what forks are chosen by; `None` if the
            backend does not report it.
        sampled: Whether each token was sampled; those that were not are what tools answered, and all the numbers above
            are 0 for them. `None` if all were.
    """

    token_ids: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...] | None = None
    score_norms: tuple[float, ...] | None = None
    uncertainties: tuple[float, ...] | None = None
    sampled: tuple[bool, ...] | None = None

    def answered(self, token_ids: Sequence[int]) -> Segment:
        """The segment with what tools answered to it: it has not ended."""
        zeros = (0.0,) * len(token_ids)
        numbers = {name: values + zeros for name in NUMBERS if (values := getattr(self, name)) is not None}
        sampled = (True,) * len(self.token_ids) if self.sampled is None else self.sampled
        return replace(
            self,
            token_ids=self.token_ids + tuple(token_ids),
            ended=False,
            sampled=sampled + (False,) * len(token_ids),
            **numbers,
        )


@dataclass(frozen=True, slots=True)
class Node:
    """A segment with its place in the tree. A node stores only the tokens it adds to its parent's path.

    Args:
        parent: Index of the parent, smaller than the node's own; `NO_PARENT` at the root.
        token_ids: The tokens this node adds. The root's are the prompt's.
        ended: See [`Segment`]. An ended node is a leaf.
        logprobs: See [`Segment`].
        score_norms: See [`Segment`].
        uncertainties: See [`Segment`].
        is_rest: Whether a fork cut the node from its parent: the two were drawn as one segment, and the node's
            siblings continue it in other ways.
        sampled: See [`Segment`].
    """

    parent: int
    token_ids: tuple[int, ...]
    ended: bool = False
    logprobs: tuple[float, ...] | None = None
    score_norms: tuple[float, ...] | None = None
    uncertainties: tuple[float, ...] | None = None
    is_rest: bool = False
    sampled: tuple[bool, ...] | None = None

    @classmethod
    def of(cls, parent: int, segment: Segment) -> Node:
        """The segment below a parent."""
        return cls(
            parent,
            segment.token_ids,
            segment.ended,
            segment.logprobs,
            segment.score_norms,
            segment.uncertainties,
            sampled=segment.sampled,
        )

    @property
    def sampled_mask(self) -> tuple[bool, ...]:
        """Of each token, whether it was sampled."""
        return (True,) * len(self.token_ids) if self.sampled is None else self.sampled

    @property
    def num_sampled(self) -> int:
        """Number of its tokens that were sampled."""
        return len(self.token_ids) if self.sampled is None else sum(self.sampled)

    @property
    def score_norm(self) -> float | None:
        """The sum over the node's tokens of `score_norms`."""
        return None if self.score_norms is None else sum(self.score_norms)

    def piece(self, start: int, end: int, parent: int) -> Node:
        """Tokens `start` to `end` of the node, below `parent`. Only the last piece ends as the node does."""
        kept = {name: values[start:end] for name in OF_TOKENS if (values := getattr(self, name)) is not None}
        is_last = end == len(self.token_ids)
        return replace(self, parent=parent, ended=self.ended and is_last, is_rest=start > 0 or self.is_rest, **kept)

    def extended(self, segment: Segment) -> Node:
        """The node with what was sampled after it as a part of it."""
        pairs = {name: (getattr(self, name), getattr(segment, name)) for name in NUMBERS}
        numbers: dict[str, Any] = {name: None if None in pair else sum(pair, ()) for name, pair in pairs.items()}
        more = Node.of(self.parent, segment)
        whole = None if self.sampled is None and more.sampled is None else self.sampled_mask + more.sampled_mask
        token_ids = self.token_ids + segment.token_ids
        return replace(self, token_ids=token_ids, ended=segment.ended, sampled=whole, **numbers)


@dataclass(frozen=True)
class Tree:
    """A prompt (node 0, the root) and every segment sampled below it.

    Args:
        nodes: [N] nodes, each after its parent.

    Raises:
        ValueError: A node stands before its parent, adds no token, or hangs below a node that ended.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        if not self.nodes or self.nodes[ROOT].parent != NO_PARENT:
            raise ValueError(f"a tree starts with a root whose parent is {NO_PARENT}, got {self.nodes[:1]}")
        for index, node in enumerate(self.nodes[1:], start=1):
            if not ROOT <= node.parent < index:
                raise ValueError(f"node {index} has parent {node.parent}; it must be between 0 and {index - 1}")
            if self.nodes[node.parent].ended:
                raise ValueError(f"node {index} hangs below node {node.parent}, which ended; an ended node is a leaf")
            if not node.token_ids:
                raise ValueError(f"node {index} adds no token; a segment has at least one")

    @classmethod
    def from_prompt(cls, token_ids: Sequence[int]) -> Tree:
        """A tree of the prompt alone."""
        return cls((Node(parent=NO_PARENT, token_ids=tuple(token_ids)),))

    def grow(self, segments: Mapping[int, Sequence[Segment]]) -> Tree:
        """The tree with new children: parent index -> its children's segments, in order."""
        children = [Node.of(parent, segment) for parent, group in segments.items() for segment in group]
        return Tree(self.nodes + tuple(children))

    def extend(self, segments: Mapping[int, Segment]) -> Tree:
        """The tree with leaves that go on: leaf index -> what was sampled after it as a part of it.

        Raises:
            ValueError: A node is no leaf, or has ended.
        """
        nodes = list(self.nodes)
        for index, segment in segments.items():
            if index == ROOT or self.children[index] or self.nodes[index].ended:
                raise ValueError(f"node {index} cannot go on: it is the root, has children or has ended")
            nodes[index] = self.nodes[index].extended(segment)
        return Tree(tuple(nodes))

    def cut(self, offsets: Mapping[int, Sequence[int]]) -> tuple[Tree, dict[tuple[int, int], int]]:
        """The tree with some nodes cut in pieces, each below the one before it; children hang below the last piece.

        Args:
            offsets: Node index -> after how many of its tokens to cut, in rising order, each at least 1 and less than
                its number of tokens.

        Returns:
            The tree, and (node index here, offset) -> index there of the piece that ends at the cut.
        """
        nodes: list[Node] = []
        last_piece: dict[int, int] = {NO_PARENT: NO_PARENT}
        before: dict[tuple[int, int], int] = {}
        for index, node in enumerate(self.nodes):
            parent, start = last_piece[node.parent], 0
            for end in offsets.get(index, ()):
                nodes.append(node.piece(start, end, parent))
                parent, start = len(nodes) - 1, end
                before[index, end] = parent
            nodes.append(node.piece(start, len(node.token_ids), parent) if start else replace(node, parent=parent))
            last_piece[index] = len(nodes) - 1
        return Tree(tuple(nodes)), before

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """[N] index of each node's parent."""
        return tuple(node.parent for node in self.nodes)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """[N] indices of each node's children, in the order they were sampled."""
        lists: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes[1:], start=1):
            lists[node.parent].append(index)
        return tuple(tuple(group) for group in lists)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """[N] depth of each node; the root has 0."""
        depths = [0]
        for node in self.nodes[1:]:
            depths.append(depths[node.parent] + 1)
        return tuple(depths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """[N] tokens on the way to each node, its own and what tools answered included; the root has 0."""
        lengths = [0]
        for node in self.nodes[1:]:
            lengths.append(lengths[node.parent] + len(node.token_ids))
        return tuple(lengths)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the leaves in depth-first order. A tree of the prompt alone has none."""
        found, stack = [], list(reversed(self.children[ROOT]))
        while stack:
            index = stack.pop()
            if self.children[index]:
                stack.extend(reversed(self.children[index]))
            else:
                found.append(index)
        return tuple(found)

    def path(self, index: int) -> tuple[int, ...]:
        """Node indices from depth 1 down to `index`; empty for the root."""
        path: list[int] = []
        while index != ROOT:
            path.append(index)
            index = self.nodes[index].parent
        return tuple(reversed(path))

    def completion_ids(self, index: int) -> list[int]:
        """Every token on the way to `index`, sampled or answered by tools, the prompt left out."""
        return [token for node in self.path(index) for token in self.nodes[node].token_ids]

    def sampled_mask(self, index: int) -> list[bool]:
        """Of each token of [`completion_ids`], whether it was sampled."""
        return [is_sampled for node in self.path(index) for is_sampled in self.nodes[node].sampled_mask]

    def turn_ids(self, index: int) -> list[int]:
        """The tokens at the end of [`completion_ids`] that were sampled since tools answered, if they did."""
        ids, mask = self.completion_ids(index), self.sampled_mask(index)
        start = next((place for place in range(len(mask), 0, -1) if not mask[place - 1]), 0)
        return ids[start:]

    def completion_logprobs(self, index: int) -> list[float]:
        """The log-probability, in nats, that each token of [`completion_ids`] was drawn with; 0 where tools answered.

        Raises:
            ValueError: The backend did not report them.
        """
        logprobs: list[float] = []
        for node in self.path(index):
            own = self.nodes[node].logprobs
            if own is None:
                raise ValueError(f"node {node} has no log-probabilities; the backend that drew it reports none")
            logprobs += own
        return logprobs

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.nodes[ROOT].token_ids

    @property
    def num_sampled_tokens(self) -> int:
        """Number of sampled tokens, each counted once however many leaves share it."""
        return sum(node.num_sampled for node in self.nodes[1:])
