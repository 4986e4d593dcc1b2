"""Trees as the rows of TRL's batch: what each row holds and owns (`slots`), and its rewards (`scoring`, `overlap`)."""

from .overlap import RewardOverlap
from .scoring import DistinctRows, RowRewards, check_rewards, score_once
from .slots import (
    LOSS_WEIGHTINGS,
    NO_NODE,
    RowLayout,
    credit_tokens,
    entropy_of_the_batch,
    lay_out,
    leaf_rewards,
    leave_out_small,
    node_weights,
    project,
    row_means,
    share_of_batch,
    shuffle_micro_batches,
    token_weights,
)


__all__ = [
    "LOSS_WEIGHTINGS",
    "NO_NODE",
    "DistinctRows",
    "RewardOverlap",
    "RowLayout",
    "RowRewards",
    "check_rewards",
    "credit_tokens",
    "entropy_of_the_batch",
    "lay_out",
    "leaf_rewards",
    "leave_out_small",
    "node_weights",
    "project",
    "row_means",
    "score_once",
    "share_of_batch",
    "shuffle_micro_batches",
    "token_weights",
]
