"""Growing trees: when and where to branch, and what draws the segments (`backends`)."""

from .environments import Rollout, check_copies, close
from .forks import ForkShape, choose_forks
from .from_config import shape_of, statistics_of
from .shape import TreeShape
from .tools import Answer, Dialogue, Dialogues, Message
from .turns import TurnShape
from .waves import Backend, Delimiters, Responder, Shape, Wave, grow


__all__ = [
    "Answer",
    "Backend",
    "Delimiters",
    "Dialogue",
    "Dialogues",
    "ForkShape",
    "Message",
    "Responder",
    "Rollout",
    "Shape",
    "TreeShape",
    "TurnShape",
    "Wave",
    "check_copies",
    "choose_forks",
    "close",
    "grow",
    "shape_of",
    "statistics_of",
]
