"""How packed positions attend to each other: segments in groups, their keys, and their masks.

Legend: B rows, L columns of a row, S packed positions; R segments of a group, Q queries and K keys of the longest of
them; N positions taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gather:
    """Positions to take from a sequence, most of them in runs of neighbours.

    Args:
        index: [N] the position each taken one comes from.
        runs: (first taken, first position, length) of each run. They leave out padding, of which no gradient comes.
    """

    index: Tensor
    runs: tuple[tuple[int, int, int], ...]


@dataclass
class Group:
    """Segments that are attended to in one call, padded on the left to Q queries and K keys.

    Args:
        query_lengths: [R] queries of each segment.
        key_lengths: [R] keys of each segment: those of its own path.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """R, Q and K."""
        return len(self.query_lengths), max(self.query_lengths), max(self.key_lengths)

    @property
    def is_even(self) -> bool:
        """Whether nothing is padded."""
        return len(set(self.query_lengths)) == len(set(self.key_lengths)) == 1

    @property
    def is_plainly_causal(self) -> bool:
        """Whether every segment is a whole row, and none is padded."""
        return self.is_even and self.query_lengths == self.key_lengths

    def mask(self, sliding_window: int | None, repeats: int, device: torch.device) -> Tensor:
        """(R or 1, 1, repeats * Q, K) which keys a query attends to: those of its path up to itself, in the window.

        The mask is repeated along the queries for heads that are laid out there.
        """
        kind = (sliding_window, repeats)
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(sliding_window, device).repeat(1, 1, repeats, 1)
        return self._masks[kind]

    def _make_mask(self, sliding_window: int | None, device: torch.device) -> Tensor:
        _, num_queries, num_keys = self.shape
        key_K = torch.arange(num_keys, device=device)
        query_Q = torch.arange(num_keys - num_queries, num_keys, device=device)
        distance_QK = query_Q[:, None] - key_K[None, :]
        allowed_QK = distance_QK >= 0
        if sliding_window is not None:
            allowed_QK &= distance_QK < sliding_window
        if self.is_even:
            return allowed_QK[None, None]
        key_lengths_R = torch.tensor(self.key_lengths, device=device)
        query_lengths_R = torch.tensor(self.query_lengths, device=device)
        is_key_RK = key_K >= num_keys - key_lengths_R[:, None]
        is_query_RQ = query_Q >= num_keys - query_lengths_R[:, None]
        # A padding query attends to every key, because one without any would be NaN.
        allowed_RQK = (allowed_QK | ~is_query_RQ[:, :, None]) & is_key_RK[:, None, :]
        return allowed_RQK[:, None]


@dataclass
class Paths:
    """The rows in terms of packed positions, for kernels that need no gathered keys.

    Args:
        row_S: [S] the row whose segment each position is in.
        column_S: [S] its column there.
        start_B: [B] column in which the segment of each row begins.
        paths_BL: [B, L] packed position of each column of each row; -1 where the row has none.
        masks: What kernels have made of this, by their own keys.
    """

    row_S: Tensor
    column_S: Tensor
    start_B: Tensor
    paths_BL: Tensor
    masks: dict[Any, Any] = field(default_factory=dict)


@dataclass
class TreeLayout:
    """How the packed positions attend to each other.

    Args:
        paths: The rows in terms of packed positions.
        groups: All segments, in groups.
        queries: Packed position of each query of the groups, one after the other; `None` if they are in order.
        keys: Packed position of each key of the groups.
        outputs: Position in the groups' outputs of each packed token; `None` if they are in order.
    """

    paths: Paths
    groups: list[Group]
    queries: Gather | None
    keys: Gather
    outputs: Gather | None
