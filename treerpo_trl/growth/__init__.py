"""Growing trees: when and where to branch, and what draws the segments (`backends`)."""

from .forks import ForkShape, choose_forks
from .from_config import shape_of, statistics_of
from .shape import TreeShape
from .waves import Backend, Delimiters, Shape, Wave, grow


__all__ = [
    "Backend",
    "Delimiters",
    "ForkShape",
    "Shape",
    "TreeShape",
    "Wave",
    "choose_forks",
    "grow",
    "shape_of",
    "statistics_of",
]
