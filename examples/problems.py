"""Problems of a task, drawn at random and divided into two splits that cannot meet."""

import hashlib
from collections.abc import Callable, Iterator
from typing import TypeVar


HELD_OUT_ONE_IN = 8
MOST_MISSES = 100_000  # draws in a row without a new problem, after which there is none left

P = TypeVar("P")


def is_held_out(text: str) -> bool:
    """Whether a problem belongs to the held-out split.

    The problem's own text decides, so the two splits cannot meet, whatever their seeds and sizes.
    """
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def draw_split(
    draw: Callable[[], P | None], text: Callable[[P], str], held_out: bool, name: str, may_repeat: bool = False
) -> Iterator[P]:
    """Problems of one split, as they are drawn.

    Args:
        draw: A random problem, or `None` for one that is not wanted.
        text: Its text, by which problems are told apart.
        held_out: Which split.
        name: Of the task, for the error.
        may_repeat: Whether a problem may come more than once.

    Raises:
        ValueError: All of them have come.
    """
    seen: set[str] = set()
    misses = 0
    while misses < MOST_MISSES:
        misses += 1
        problem = draw()
        if problem is None or is_held_out(text(problem)) != held_out or text(problem) in seen:
            continue
        if not may_repeat:
            seen.add(text(problem))
        misses = 0
        yield problem
    raise ValueError(f"{name}: there are no more than {len(seen)} problems in this split; ask for fewer")
