"""Rows to one packed sequence that holds every shared prefix once, and back.

Rows in depth-first order share prefixes with their neighbours. A row contributes a segment: its tokens from the first
one on that the row before it does not have, preceded by the last one they share, which is computed again because its
hidden state has a second label there. So each packed position has one label, and a branch costs one position.

Nothing here knows of trees: the sharing is read off the rows, so repeats, prompts and chance overlaps count alike.

Legend: B rows, L columns of a row (prompt and completion, padded), T completion columns, R segments, S packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .layout import Gather, Group, Paths, TreeLayout


IGNORED_LABEL = -100
# Far from every position, so that no run goes on from padding into position 0.
PADDING = -2
# Segments are attended to together if padding them to one size costs at most this factor.
MOST_PADDING = 1.2


@dataclass
class PackedRows:
    """Rows packed into one sequence, and the way back.

    Args:
        input_ids: (1, S) tokens.
        position_ids: (1, S) columns the tokens have in their rows.
        labels: (1, S) the next token in the row; `IGNORED_LABEL` where nobody asked for it.
        counts: (1, S) how many tokens of the rows each position stands for.
        source_BT: (B, T) packed position that predicts each completion token.
        available_BT: (B, T) whether it does; the others were not asked for.
        layout: How the positions attend to each other.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    counts: Tensor
    source_BT: Tensor
    available_BT: Tensor
    layout: TreeLayout

    def unpack(self, values: Tensor, missing: Tensor | float = 0.0) -> Tensor:
        """(1, S) values of the labels -> (B, T) values of the completion tokens, `missing` where not available."""
        gathered = values[0].index_select(0, self.source_BT.flatten()).view(self.source_BT.shape)
        if not isinstance(missing, Tensor):
            missing = gathered.new_tensor(missing)
        return torch.where(self.available_BT, gathered, missing.to(gathered.dtype))


def pack_rows(
    input_ids_BL: Tensor,
    attention_mask_BL: Tensor,
    needed_BT: Tensor,
    every_token: bool = False,
    most_shared: int | None = None,
) -> PackedRows:
    """Pack rows so that neighbours' common prefixes are computed once.

    Args:
        input_ids_BL: (B, L) prompts, left-padded, and completions, right-padded.
        attention_mask_BL: (B, L) 1 on tokens.
        needed_BT: (B, T) completion tokens (the last T columns) whose log-probability is asked for. What is neither
            needed nor context of something needed is left out.
        every_token: Whether to compute all tokens nevertheless (the load-balancing loss of a mixture of experts
            counts them).
        most_shared: Most leading columns that rows share; by default, all that they have in common. With 0 each row is
            computed by itself, without padding; with the columns of the prompts, these alone are shared.

    Returns:
        The packed rows, on the device of `input_ids_BL`.
    """
    device, width = input_ids_BL.device, needed_BT.size(1)
    ids_BL, real_BL = input_ids_BL.cpu(), attention_mask_BL.bool().cpu()
    num_columns = ids_BL.size(1)
    column_L = torch.arange(num_columns)
    first_B = real_BL.int().argmax(dim=1)
    needed_BL = torch.zeros_like(real_BL)
    needed_BL[:, num_columns - width :] = needed_BT.bool().cpu()
    needed_BL &= real_BL & (column_L > first_B[:, None])  # nothing predicts the first token of a row
    # A token's log-probability takes the hidden state of the column before it.
    ends_B = torch.where(needed_BL, column_L, first_B[:, None]).amax(dim=1)
    if every_token:
        ends_B = first_B + real_BL.sum(dim=1)
    starts, ends = _segments(ids_BL, real_BL, first_B.tolist(), ends_B.tolist(), most_shared)
    grouped, packed_BL, row_S, column_S = _place(first_B.tolist(), starts, ends, num_columns)

    is_label_S = torch.zeros(len(row_S), dtype=torch.bool)
    is_label_S[packed_BL[:, :-1][needed_BL[:, 1:]]] = True
    next_S = ids_BL[row_S, (column_S + 1).clamp(max=num_columns - 1)]
    covered_BL = real_BL & (column_L < ends_B[:, None])
    source_BT = packed_BL[:, num_columns - width - 1 : -1]
    available_BT = needed_BL[:, num_columns - width :]
    has_position_BL = (column_L >= first_B[:, None]) & (column_L < torch.tensor(ends)[:, None])
    paths = Paths(row_S, column_S, torch.tensor(starts), packed_BL.masked_fill(~has_position_BL, -1))
    return PackedRows(
        input_ids=ids_BL[row_S, column_S][None].to(device),
        position_ids=column_S[None].to(device),
        labels=next_S.masked_fill(~is_label_S, IGNORED_LABEL)[None].to(device),
        counts=torch.bincount(packed_BL[covered_BL], minlength=len(row_S))[None].to(device),
        source_BT=source_BT.masked_fill(~available_BT, 0).to(device),
        available_BT=available_BT.to(device),
        layout=TreeLayout(paths, *_lay_out(grouped, packed_BL, first_B.tolist(), starts, ends, device)),
    )


def _segments(
    ids_BL: Tensor, real_BL: Tensor, firsts: Sequence[int], wanted_ends: Sequence[int], most_shared: int | None
) -> tuple[list[int], list[int]]:
    """Columns [start, end) that each row computes itself; none (start = end) if the rows before have all it needs."""
    same_BL = (real_BL[1:] == real_BL[:-1]) & ((ids_BL[1:] == ids_BL[:-1]) | ~real_BL[1:])
    most = ids_BL.size(1) if most_shared is None else most_shared
    shared = [0, *same_BL.long().cumprod(dim=1).sum(dim=1).clamp(max=most).tolist()]
    starts, ends = [], []
    computed = 0  # columns of the row before that somebody computes
    for first, end, common in zip(firsts, wanted_ends, shared, strict=True):
        # The last common column has another label here, so it is computed again.
        start = max(first, min(common - 1, computed))
        computed = max(start, end)
        starts.append(start)
        ends.append(computed)
    if all(start == end for start, end in zip(starts, ends, strict=True)):
        # Nothing is needed, but processes that share a model must all call it.
        starts[0], ends[0] = firsts[0], firsts[0] + 1
    return starts, ends


def _place(
    firsts: Sequence[int], starts: Sequence[int], ends: Sequence[int], num_columns: int
) -> tuple[list[list[int]], Tensor, Tensor, Tensor]:
    """Put the segments one after the other, group by group.

    Returns:
        The rows of each group; (B, L) the packed position of each column of each row; [S] the row and [S] the column
        of each packed position. A column that nobody computes has a position without meaning.
    """
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    grouped = _group(lengths, [end - first for first, end in zip(firsts, ends, strict=True)])
    order_R = torch.tensor([row for rows in grouped for row in rows])
    length_B, start_B, column_L = torch.tensor(lengths), torch.tensor(starts), torch.arange(num_columns)
    offset_B = torch.zeros_like(length_B)
    offset_B[order_R] = length_B[order_R].cumsum(0) - length_B[order_R]
    # The segment that computes a column of a row is the last one, among those of the rows up to it, that begins at or
    # before the column: every later row shares the column with the row before it.
    begins_BL = (start_B[:, None] <= column_L) & (length_B > 0)[:, None]
    owner_BL = torch.where(begins_BL, torch.arange(len(starts))[:, None], 0).cummax(dim=0).values
    packed_BL = offset_B[owner_BL] + column_L - start_B[owner_BL]
    row_S = torch.repeat_interleave(order_R, length_B[order_R])
    column_S = torch.arange(len(row_S)) - offset_B[row_S] + start_B[row_S]
    return grouped, packed_BL, row_S, column_S


def _group(lengths: Sequence[int], key_lengths: Sequence[int]) -> list[list[int]]:
    """Rows with a segment; neighbours in order of length go together while padding stays small. Equals always do."""
    order = sorted(
        (row for row, length in enumerate(lengths) if length > 0), key=lambda row: (-lengths[row], -key_lengths[row])
    )
    groups: list[list[int]] = []
    area = 0
    for row in order:
        own = lengths[row] * key_lengths[row]
        if groups:
            rows = groups[-1]
            keys = max(key_lengths[row], *(key_lengths[other] for other in rows))
            if (len(rows) + 1) * lengths[rows[0]] * keys <= MOST_PADDING * (area + own):
                rows.append(row)
                area += own
                continue
        groups.append([row])
        area = own
    return groups


def _lay_out(
    grouped: Sequence[Sequence[int]],
    packed_BL: Tensor,
    firsts: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    device: torch.device,
) -> tuple[list[Group], Gather | None, Gather, Gather | None]:
    """The groups, and what their queries, keys and outputs are taken from."""
    groups = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for rows in grouped:
        own = [packed_BL[row, starts[row] : ends[row]] for row in rows]
        paths = [packed_BL[row, firsts[row] : ends[row]] for row in rows]
        groups.append(Group(tuple(map(len, own)), tuple(map(len, paths))))
        _, num_queries, num_keys = groups[-1].shape
        queries += [_pad(positions, num_queries) for positions in own]
        keys += [_pad(path, num_keys) for path in paths]
    query_positions = torch.cat(queries)
    taken_keys = _gather(torch.cat(keys), device)
    if all(group.is_even for group in groups):
        return groups, None, taken_keys, None
    outputs = (query_positions != PADDING).nonzero().flatten()
    return groups, _gather(query_positions, device), taken_keys, _gather(outputs, device)


def _pad(positions: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(positions, (length - len(positions), 0), value=PADDING)


def _gather(positions: Tensor, device: torch.device) -> Gather:
    """A run ends where the next position is not the neighbour; padding takes any position and is in no run."""
    breaks = ((positions[1:] - positions[:-1]) != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(positions)]
    first = positions[torch.tensor(bounds[:-1])].tolist()
    runs = [
        (begin, position, end - begin)
        for (begin, end), position in zip(pairwise(bounds), first, strict=True)
        if position != PADDING
    ]
    return Gather(positions.clamp(min=0).to(device), tuple(runs))
