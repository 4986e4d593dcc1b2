"""FlexAttention over packed rows: one kernel for all segments, which skips the blocks that nobody attends to.

A query at column c of row b attends to a key at column d if d <= c and the path of row b has that very key there. So
a look at the table of `Paths` decides, and keys need not be gathered for each segment.

Legend: B rows, L columns of a row, S packed positions, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .layout import Paths, TreeLayout


BLOCK_SIZE = 128


@cache
def _kernel(device_type: str) -> Any:
    """The function, compiled for lengths that change with each batch. On a CPU it runs as it is, for tests."""
    return flex_attention if device_type == "cpu" else torch.compile(flex_attention, dynamic=True)


def attend_in_blocks(
    layout: TreeLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
    dropout_p: float,
    softcap: float | None,
) -> Tensor:
    """(H, S, E) from (H, S, E) queries and (G, S, E) keys and values.

    Raises:
        ValueError: Attention weights are to be dropped, which the kernel cannot.
    """
    if dropout_p > 0:
        raise ValueError(f"FlexAttention has no dropout, but attention weights are to be dropped with p={dropout_p:g}")

    output: Tensor = _kernel(query.device.type)(
        query[None],
        key[None],
        value[None],
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=block_mask(layout.paths, window, query.device),
        scale=scaling,
        enable_gqa=query.size(0) > key.size(0),
    )
    return output[0]


def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return cap


def block_mask(paths: Paths, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries attends to, wholly or in part, and what decides within the latter.

    It is made from the rows' segments, never from S x S pairs, and kept with `paths` for the other layers.

    Args:
        paths: Of the packed rows.
        window: Columns, its own included, that a token looks back; all of them by default.
        device: Where the mask is needed.
    """
    kind = (window, device)
    if kind not in paths.masks:
        paths.masks[kind] = _make_mask(paths, window, device)
    return paths.masks[kind]


def _make_mask(paths: Paths, window: int | None, device: torch.device) -> BlockMask:
    some_IJ, whole_IJ = _blocks(paths)
    if window is not None:  # which may end inside any of them
        whole_IJ = torch.zeros_like(whole_IJ)
    row_S, column_S, paths_BL = (states.int().to(device) for states in (paths.row_S, paths.column_S, paths.paths_BL))

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = column_S[query] - column_S[key]
        is_seen = (paths_BL[row_S[query], column_S[key]] == key) & (distance >= 0)
        return is_seen if window is None else is_seen & (distance < window)

    size = len(row_S)
    return BlockMask.from_kv_blocks(
        *_ordered(some_IJ & ~whole_IJ, device),
        *_ordered(whole_IJ, device),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=attends,
        seq_lengths=(size, size),
    )


def _blocks(paths: Paths) -> tuple[Tensor, Tensor]:
    """(I, J) whether some query of a block may attend to some key of another, and whether each does to every one."""
    num_rows, num_blocks = len(paths.paths_BL), -(-len(paths.row_S) // BLOCK_SIZE)
    has_query_BI = torch.zeros(num_rows, num_blocks)
    has_query_BI[paths.row_S, torch.arange(len(paths.row_S)) // BLOCK_SIZE] = 1
    is_path_BL = paths.paths_BL >= 0
    is_before_BL = is_path_BL & (torch.arange(is_path_BL.size(1)) < paths.start_B[:, None])

    def count(chosen_BL: Tensor) -> Tensor:
        blocks_BL = (paths.paths_BL // BLOCK_SIZE).masked_fill(~chosen_BL, 0)
        return torch.zeros(num_rows, num_blocks).scatter_add_(1, blocks_BL, chosen_BL.float())

    def is_whole(keys_BJ: Tensor) -> Tensor:
        return has_query_BI.T @ (keys_BJ < BLOCK_SIZE).float() == 0

    keys_BJ = count(is_path_BL)
    some_IJ = has_query_BI.T @ (keys_BJ > 0).float() > 0
    # A row's queries all see what lies before its segment, and of the segment, which is laid out in order, what stands
    # in an earlier block than theirs.
    earlier_IJ = torch.ones(num_blocks, num_blocks, dtype=torch.bool).tril(-1)
    return some_IJ, is_whole(count(is_before_BL)) | (is_whole(keys_BJ) & earlier_IJ)


def _ordered(is_seen_IJ: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 1, I) how many blocks are seen, and (1, 1, I, J) all blocks, these first."""
    order_IJ = is_seen_IJ.int().argsort(dim=1, descending=True, stable=True)
    return is_seen_IJ.sum(1, dtype=torch.int32)[None, None].to(device), order_IJ.int()[None, None].to(device)
