"""TreeRPO on TRL: reinforcement learning from trees of reasoning steps."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .reporting.quiet import hold_back_lines
from .tree import Node, Tree


if TYPE_CHECKING:
    from .treerpo_config import TreeRPOConfig
    from .treerpo_trainer import TreeRPOTrainer


__version__ = "0.1.0"
__all__ = ["Node", "Tree", "TreeRPOConfig", "TreeRPOTrainer"]

# Loaded when first asked for: they import torch and transformers, which looking at trees, or asking for help, is not
# worth the seconds of.
LAZY = {"TreeRPOConfig": "treerpo_config", "TreeRPOTrainer": "treerpo_trainer"}

hold_back_lines()


def __getattr__(name: str) -> Any:
    if name in LAZY:
        globals()[name] = value = getattr(import_module(f".{LAZY[name]}", __name__), name)
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
