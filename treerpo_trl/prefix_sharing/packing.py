"""Rows to one packed sequence that holds every shared prefix once, and back.

Rows in depth-first order share prefixes with their neighbours. A row contributes a segment: its tokens from the first
one on that the row before it does not have, preceded by the last one they share, which is computed again because its
hidden state has a second label there. So each packed position has one label, and a branch costs one position.

Nothing here knows of trees: the sharing is read off the rows, so repeats, prompts and chance overlaps count alike.

Legend: B rows, L columns of a row (prompt and completion, padded), T completion columns, R segments, S packed tokens,
Q queries and K keys of the longest segment of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


IGNORED_LABEL = -100
# Far from every position, so that no run goes on from padding into position 0.
PADDING = -2
# Segments are attended to together if padding them to one size costs at most this factor.
MOST_PADDING = 1.2


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
class TreeLayout:
    """How the packed positions attend to each other.

    Args:
        groups: All segments, in groups.
        queries: Packed position of each query of the groups, one after the other; `None` if they are in order.
        keys: Packed position of each key of the groups.
        outputs: Position in the groups' outputs of each packed token; `None` if they are in order.
    """

    groups: list[Group]
    queries: Gather | None
    keys: Gather
    outputs: Gather | None


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
    input_ids_BL: Tensor, attention_mask_BL: Tensor, needed_BT: Tensor, every_token: bool = False
) -> PackedRows:
    """Pack rows so that neighbours' common prefixes are computed once.

    Args:
        input_ids_BL: (B, L) prompts, left-padded, and completions, right-padded.
        attention_mask_BL: (B, L) 1 on tokens.
        needed_BT: (B, T) completion tokens (the last T columns) whose log-probability is asked for. What is neither
            needed nor context of something needed is left out.
        every_token: Whether to compute all tokens nevertheless (the load-balancing loss of a mixture of experts
            counts them).

    Returns:
        The packed rows, on the device of `input_ids_BL`.
    """
    device, width = input_ids_BL.device, needed_BT.size(1)
    ids_BL, real_BL = input_ids_BL.cpu(), attention_mask_BL.bool().cpu()
    num_rows, num_columns = ids_BL.shape
    column_L = torch.arange(num_columns)
    first_B = real_BL.int().argmax(dim=1)
    needed_BL = torch.zeros_like(real_BL)
    needed_BL[:, num_columns - width :] = needed_BT.bool().cpu()
    needed_BL &= real_BL & (column_L > first_B[:, None])  # nothing predicts the first token of a row
    # A token's log-probability takes the hidden state of the column before it.
    ends_B = torch.where(needed_BL, column_L, first_B[:, None]).amax(dim=1)
    if every_token:
        ends_B = first_B + real_BL.sum(dim=1)
    starts, ends = _segments(ids_BL, real_BL, first_B.tolist(), ends_B.tolist())
    lengths_B = torch.tensor(ends) - torch.tensor(starts)

    order = sorted((row for row in range(num_rows) if lengths_B[row] > 0), key=lambda row: -int(lengths_B[row]))
    key_lengths = [ends[row] - int(first_B[row]) for row in range(num_rows)]
    grouped = _group(order, lengths_B.tolist(), key_lengths)
    order = [row for rows in grouped for row in rows]
    offset_B = torch.zeros(num_rows, dtype=torch.long)
    order_R = torch.tensor(order)
    offset_B[order_R] = lengths_B[order_R].cumsum(0) - lengths_B[order_R]

    # The segment that computes a column of a row is the last one, among those of the rows up to it, that begins at or
    # before the column: every later row shares the column with the row before it.
    start_B = torch.tensor(starts)
    begins_BL = (start_B[:, None] <= column_L) & (lengths_B > 0)[:, None]
    owner_BL = torch.where(begins_BL, torch.arange(num_rows)[:, None], 0).cummax(dim=0).values
    packed_BL = offset_B[owner_BL] + column_L - start_B[owner_BL]

    size = int(lengths_B.clamp(min=0).sum())
    row_S = torch.repeat_interleave(order_R, lengths_B[order_R])
    column_S = torch.arange(size) - offset_B[row_S] + start_B[row_S]
    is_label_S = torch.zeros(size, dtype=torch.bool)
    is_label_S[packed_BL[:, :-1][needed_BL[:, 1:]]] = True
    next_S = ids_BL[row_S, (column_S + 1).clamp(max=num_columns - 1)]
    covered_BL = real_BL & (column_L < ends_B[:, None])
    source_BT = packed_BL[:, num_columns - width - 1 : -1]
    available_BT = needed_BL[:, num_columns - width :]
    layout = _lay_out(grouped, packed_BL, first_B.tolist(), starts, ends, device)
    return PackedRows(
        input_ids=ids_BL[row_S, column_S][None].to(device),
        position_ids=column_S[None].to(device),
        labels=next_S.masked_fill(~is_label_S, IGNORED_LABEL)[None].to(device),
        counts=torch.bincount(packed_BL[covered_BL], minlength=size)[None].to(device),
        source_BT=source_BT.masked_fill(~available_BT, 0).to(device),
        available_BT=available_BT.to(device),
        layout=layout,
    )


def _segments(
    ids_BL: Tensor, real_BL: Tensor, firsts: Sequence[int], wanted_ends: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Columns [start, end) that each row computes itself; none (start = end) if the rows before have all it needs."""
    same_BL = (real_BL[1:] == real_BL[:-1]) & ((ids_BL[1:] == ids_BL[:-1]) | ~real_BL[1:])
    shared = [0, *same_BL.long().cumprod(dim=1).sum(dim=1).tolist()]
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


def _group(order: Sequence[int], lengths: Sequence[int], key_lengths: Sequence[int]) -> list[list[int]]:
    """Neighbours in order of length go together while padding stays small. Equal shapes always do."""
    order = sorted(order, key=lambda row: (-lengths[row], -key_lengths[row]))
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
) -> TreeLayout:
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
    is_in_order = all(group.is_even for group in groups)
    query_positions = torch.cat(queries)
    return TreeLayout(
        groups,
        queries=None if is_in_order else _gather(query_positions, device),
        keys=_gather(torch.cat(keys), device),
        outputs=None if is_in_order else _gather((query_positions != PADDING).nonzero().flatten(), device),
    )


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
