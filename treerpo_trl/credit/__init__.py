"""Credit: from the rewards of the leaves to the advantage of every node.

One pure function per equation. Rewards are backed up to values (`values`); a named estimator makes advantages of them,
from a group of siblings (`siblings`), from a tree (`paths`) or from the batch of all trees (`baseline`).
"""

from .assign import ROUNDING, ScoredTree, assign, assign_batch, check_reward, find_reward_fault
from .baseline import optimal_baseline
from .estimators import ESTIMATORS, Estimator
from .paths import parent, tree_grpo, tree_mean, treepo, treerl
from .siblings import bernoulli_std, centered, group_std, leave_one_out, treerpo
from .values import VALUE_ROUNDING, ValuedTree, back_up, is_kept


UNIT_INTERVAL_ESTIMATORS = frozenset(name for name, chosen in ESTIMATORS.items() if chosen.needs_unit_interval)
__all__ = [
    "ESTIMATORS",
    "ROUNDING",
    "UNIT_INTERVAL_ESTIMATORS",
    "VALUE_ROUNDING",
    "Estimator",
    "ScoredTree",
    "ValuedTree",
    "assign",
    "assign_batch",
    "back_up",
    "bernoulli_std",
    "centered",
    "check_reward",
    "find_reward_fault",
    "group_std",
    "is_kept",
    "leave_one_out",
    "optimal_baseline",
    "parent",
    "tree_grpo",
    "tree_mean",
    "treepo",
    "treerl",
    "treerpo",
]
