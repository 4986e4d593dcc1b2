"""TreeRPO on TRL: reinforcement learning from trees of reasoning steps."""

from .tree import Node, Tree
from .treerpo_config import TreeRPOConfig
from .treerpo_trainer import TreeRPOTrainer


__version__ = "0.1.0.dev0"
__all__ = ["Node", "Tree", "TreeRPOConfig", "TreeRPOTrainer"]
