"""Random trees of every shape, for hypothesis, and a backend that draws their segments without a model."""

import random
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from treerpo_trl.growth import Backend, Delimiters, ForkShape, Shape, TreeShape, Wave, grow
from treerpo_trl.tree import Segment, Tree


def plan(shape: Shape, trees: Sequence[Tree], wave: int) -> tuple[list[Tree], Wave]:
    """The plan of a wave for whole trees."""
    depth = min(wave, shape.max_depth)
    nodes = [
        (index, node)
        for index, tree in enumerate(trees)
        for node in range(len(tree.nodes))
        if tree.depths[node] == depth or (shape.plans_whole_trees and wave)
    ]
    return shape.plan(trees, wave, nodes)


class RandomBackend(Backend):
    """Segments from a random generator: some end, some are full, some are cut short (`short_probability`)."""

    def __init__(self, seed: int, end_probability: float, short_probability: float = 0.1):
        self.random = random.Random(seed)
        self.end_probability = end_probability
        self.short_probability = short_probability

    def extend(self, trees, wave) -> list[list[Segment]]:
        return [[self._draw(most) for _ in range(wave.num_children)] for most in wave.max_tokens]

    def _draw(self, max_tokens: int) -> Segment:
        ended = self.random.random() < self.end_probability
        is_short = ended or self.random.random() < self.short_probability
        length = self.random.randint(1, max_tokens) if is_short else max_tokens
        ids = tuple(self.random.randint(2, 9) for _ in range(length))
        return Segment(ids, ended, uncertainties=tuple(float(token % 5) for token in ids))


@st.composite
def shapes(draw, max_depth: int = 3, max_branching: int = 3, min_branching: int = 2) -> TreeShape:
    branching = draw(st.lists(st.integers(min_branching, max_branching), min_size=1, max_size=max_depth))
    segment_length = draw(st.integers(1, 4))
    shorter = draw(st.integers(0, segment_length - 1))
    return TreeShape(tuple(branching), segment_length, len(branching) * segment_length - shorter)


@st.composite
def forests(draw, min_branching: int = 2, most: int = 3) -> tuple[TreeShape, list[Tree]]:
    """A shape and one to three (`most`) random trees grown to it."""
    shape = draw(shapes(min_branching=min_branching))
    prompts = draw(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=3), min_size=1, max_size=most))
    backend = RandomBackend(draw(st.integers(0, 10_000)), draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])))
    return shape, grow(prompts, shape, backend)


@st.composite
def fork_shapes(draw) -> ForkShape:
    trunks, forks, width, rounds = (draw(st.integers(1, most)) for most in (2, 3, 2, 2))
    return ForkShape(trunks, forks, width, rounds, draw(st.integers(1, 2)), draw(st.integers(1, 9)))


@st.composite
def delimited_shapes(draw) -> TreeShape:
    """Segments end anywhere; a path may be full above depth D."""
    shape = draw(shapes())
    return replace(shape, max_completion_length=draw(st.integers(1, 12)), delimiters=Delimiters(("\n",), 1))


@st.composite
def any_forests(draw, most: int = 3) -> tuple[Shape, list[Tree]]:
    """A shape of any split rule and one to three (`most`) random trees grown to it."""
    shape = draw(st.one_of(shapes(), delimited_shapes(), fork_shapes()))
    prompts = draw(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=3), min_size=1, max_size=most))
    is_even = isinstance(shape, TreeShape) and shape.delimiters is None
    ends, short = draw(st.sampled_from([0.0, 0.2, 0.6])), 0.1 if is_even else 0.7
    backend = RandomBackend(draw(st.integers(0, 10_000)), ends, short)
    return shape, grow(prompts, shape, backend)


def leaf_rewards(tree: Tree, rewards: Sequence[float | None]) -> dict[int, float | None]:
    """Rewards of the leaves in depth-first order, repeated as needed."""
    return {leaf: rewards[index % len(rewards)] for index, leaf in enumerate(tree.leaves)}
