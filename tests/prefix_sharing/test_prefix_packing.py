"""Packing rows against a plain oracle: what is computed, what each position sees, and the way back to the rows."""

import itertools
from dataclasses import FrozenInstanceError, fields
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from families import NEEDED, RULES, Rows, full_tree_rows, pad_rows, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from treerpo_trl.prefix_sharing import flex, pack_rows
from treerpo_trl.prefix_sharing.attention import KERNELS, _Take, tree_attention
from treerpo_trl.prefix_sharing.layout import Group
from treerpo_trl.prefix_sharing.packing import _gather


rows_of = st.builds(
    random_rows,
    seed=st.integers(0, 10_000),
    needed=st.sampled_from(sorted(NEEDED)),
    shuffled=st.booleans(),
    rule=st.sampled_from(RULES),
)


def pack(rows, **options):
    return pack_rows(rows.input_ids, rows.attention_mask, rows.needed, **options)


def visible(packed, window=None, implementation="sdpa"):
    """(S, S) which positions each packed position attends to: equal keys weigh all that is visible equally."""
    size = packed.input_ids.size(1)
    states = torch.zeros(1, 2, size, 4)
    identity = torch.eye(size, dtype=torch.float32)[None, None]
    module = SimpleNamespace(config=SimpleNamespace())
    output = tree_attention(
        module, states, states[:, :1], identity, packed.layout, implementation, sliding_window=window
    )
    assert output.shape == (1, size, 2, size)
    assert torch.equal(output[0, :, 0] > 0, output[0, :, 1] > 0)
    return output[0, :, 0] > 0


def needed_tokens(rows):
    """(row, completion column, first column of the row, column) of each token that is asked for."""
    start = rows.input_ids.size(1) - rows.needed.size(1)
    for row, column in rows.needed.nonzero().tolist():
        first = rows.attention_mask[row].argmax().item()
        yield row, column, first, start + column


def path_of(rows, row, first, end):
    """A prefix: where the row begins, and its tokens up to a column. Equal prefixes have equal hidden states."""
    return first, tuple(rows.input_ids[row, first:end].tolist())


def paths_in(packed, sees):
    """The prefix that each packed position attends to."""
    positions, tokens = packed.position_ids[0], packed.input_ids[0]
    paths = []
    for row in sees:
        seen = row.nonzero().flatten()
        seen = seen[positions[seen].argsort()]
        first = positions[seen[0]].item()
        assert positions[seen].tolist() == list(range(first, first + len(seen)))
        paths.append((first, tuple(tokens[seen].tolist())))
    return paths


def wanted_paths(rows):
    """All prefixes that some token asked for has as its context."""
    return {
        path_of(rows, row, first, end)
        for row, _, first, column in needed_tokens(rows)
        for end in range(first + 1, column + 1)
    }


@given(rows_of, st.none() | st.integers(0, 12))
def test_each_token_asked_for_is_predicted_from_exactly_its_own_row(rows, most_shared):
    packed = pack(rows, most_shared=most_shared)
    paths = paths_in(packed, visible(packed))
    asked = list(needed_tokens(rows))
    assert packed.available_BT.sum() == len(asked)
    for row, column, first, end in asked:
        source = packed.source_BT[row, column].item()
        assert packed.available_BT[row, column]
        assert packed.labels[0, source] == rows.input_ids[row, end]
        assert packed.position_ids[0, source] == end - 1
        assert paths[source] == path_of(rows, row, first, end)


@given(rows_of)
def test_rows_may_be_computed_one_by_one(rows):
    """What is asked for of each row, and no more."""
    contexts = {row: end - first for row, _, first, end in needed_tokens(rows)}
    assert pack(rows, most_shared=0).input_ids.numel() == max(1, sum(contexts.values()))
    sizes = [pack(rows, most_shared=most).input_ids.numel() for most in (0, 4, 8, None)]
    assert sizes == sorted(sizes, reverse=True)


@given(rows_of, st.integers(1, 12))
def test_a_window_hides_what_is_further_back(rows, window):
    packed = pack(rows)
    positions = packed.position_ids[0]
    near = positions[:, None] - positions[None, :] < window
    assert torch.equal(visible(packed, window), visible(packed) & near)


def random_states(packed, num_heads):
    """(1, H, S, E) in double precision."""
    return torch.randn(1, num_heads, packed.input_ids.size(1), 4, dtype=torch.float64)


windows = st.none() | st.integers(1, 12)
softcaps = st.none() | st.floats(0.5, 9)


@given(rows_of, windows, softcaps, st.none() | st.floats(0.1, 2), st.sampled_from(sorted(KERNELS)))
def test_attention_is_plain_attention_over_what_is_visible(rows, window, softcap, scaling, implementation):
    packed = pack(rows)
    query, key, value = random_states(packed, 4), random_states(packed, 2), random_states(packed, 2)
    module = SimpleNamespace(config=SimpleNamespace())
    output = tree_attention(
        module,
        query,
        key,
        value,
        packed.layout,
        implementation,
        scaling=scaling,
        softcap=softcap,
        sliding_window=window,
    )
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * (4**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~visible(packed, window), -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}, {"softcap": 2.0}])
def test_attention_drops_its_weights(num_rows, options):
    """All of them, with probability 1; and none by default."""
    packed = pack(pad_rows([[5, 6]] * num_rows, [[7, 8], [7, 9, 2], [3, 4]][:num_rows], NEEDED["all"]))
    states, module = random_states(packed, 2), SimpleNamespace(config=SimpleNamespace())
    assert (tree_attention(module, states, states, states, packed.layout, "sdpa", dropout=1.0, **options) == 0).all()
    outputs = [tree_attention(module, states, states, states, packed.layout, "sdpa", **options) for _ in range(2)]
    assert torch.equal(*outputs)


def test_a_kernel_without_dropout_says_so():
    packed = pack(pad_rows([[5, 6]], [[7, 8]], NEEDED["all"]))
    states, module = random_states(packed, 2), SimpleNamespace(config=SimpleNamespace())
    with pytest.raises(ValueError, match=r"no dropout.*p=0\.1"):
        tree_attention(module, states, states, states, packed.layout, "flex_attention", dropout=0.1)


@given(rows_of, st.none() | st.integers(1, 12), st.sampled_from([1, 2, 8]))
def test_blocks_hold_what_is_visible(rows, window, size):
    """What is attended to lies in the blocks of a mask, and is all of those that it calls whole."""
    packed = pack(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK_SIZE", size)
        mask = flex.block_mask(packed.layout.paths, window, torch.device("cpu"))
    seen = visible(packed, window)
    num_blocks = -(-len(seen) // size)
    padding = num_blocks * size - len(seen)
    blocks = torch.nn.functional.pad(seen, (0, padding, 0, padding)).view(num_blocks, size, num_blocks, size)
    partly, wholly = (
        torch.zeros(num_blocks, num_blocks, dtype=torch.bool).scatter_(1, indices[0, 0].long(), first)
        for indices, counts in [(mask.kv_indices, mask.kv_num_blocks), (mask.full_kv_indices, mask.full_kv_num_blocks)]
        for first in [torch.arange(num_blocks) < counts[0, 0][:, None]]
    )
    assert not (partly & wholly).any()
    assert not (blocks.any(3).any(1) & ~partly & ~wholly).any()
    real = num_blocks - (padding > 0)  # queries of padding ask for nothing
    assert blocks.all(3).all(1)[:real][wholly[:real]].all()
    every = torch.arange(len(seen))
    assert torch.equal(mask.mask_mod(None, None, every[:, None], every[None, :]), seen)


def test_whole_blocks_are_found():
    """A prompt longer than a block, below which many rows branch."""
    prompt, rows = list(range(2, 20)) * 4, [[5, 6, 7] * 3, [6, 7, 8] * 3, [7, 8, 9] * 3]
    packed = pack(pad_rows([prompt] * 3, rows, NEEDED["all"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK_SIZE", 16)
        mask = flex.block_mask(packed.layout.paths, None, torch.device("cpu"))
        assert flex.block_mask(packed.layout.paths, None, torch.device("cpu")) is mask  # made once for all layers
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 2, 3, 4, 4, 4]


def test_attention_with_sinks_is_refused():
    packed = pack(pad_rows([[5, 6]], [[7, 8]], NEEDED["all"]))
    states, module = random_states(packed, 2), SimpleNamespace(config=SimpleNamespace())
    with pytest.raises(ValueError, match="SimpleNamespace has attention sinks"):
        tree_attention(module, states, states, states, packed.layout, "sdpa", s_aux=torch.zeros(2))


class Elsewhere(torch.Tensor):
    """Says that it is on another device than a CPU."""

    device = torch.device("meta")


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_the_gradient_of_taken_states_is_that_of_index_select(kind, positions):
    gather = _gather(torch.tensor(positions), torch.device("cpu"))
    states = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, len(positions), 3, dtype=torch.float64)
    taken = states.index_select(1, torch.tensor(positions))
    assert torch.equal(_Take.apply(states, gather), taken)
    taken.backward(gradient)
    context = SimpleNamespace(gather=gather, num_positions=7)
    actual, _ = _Take.backward(context, gradient.as_subclass(kind))
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), states.grad)


@pytest.mark.parametrize(
    ("queries", "keys", "is_even", "is_plainly_causal"),
    [
        ((3, 3), (3, 3), True, True),
        ((3,), (3,), True, True),
        ((2, 2), (3, 3), True, False),
        ((3, 2), (3, 2), False, False),
        ((2, 2), (3, 2), False, False),
        ((2, 1), (3, 3), False, False),
    ],
)
def test_what_is_said_of_a_group(queries, keys, is_even, is_plainly_causal):
    group = Group(queries, keys)
    assert group.shape == (len(queries), max(queries), max(keys))
    assert (group.is_even, group.is_plainly_causal) == (is_even, is_plainly_causal)
    num_masks = 1 if is_even else len(queries)
    for window, repeats in itertools.product((None, 1, 2), (1, 2)):
        mask = group.mask(window, repeats, torch.device("cpu"))
        assert mask.shape == (num_masks, 1, repeats * max(queries), max(keys))
        assert group.mask(window, repeats, torch.device("cpu")) is mask  # made once


@given(rows_of)
def test_positions_are_put_in_order_only_where_some_are_padded(rows):
    layout = pack(rows).layout
    is_in_order = all(group.is_even for group in layout.groups)
    assert (layout.queries is None) == (layout.outputs is None) == is_in_order


@given(rows_of)
def test_runs_are_the_longest_of_neighbours_and_leave_padding_out(rows):
    packed = pack(rows)
    key_lengths = [length for group in packed.layout.groups for length in group.key_lengths]
    taken = [begin + step for begin, _, length in packed.layout.keys.runs for step in range(length)]
    assert len(taken) == len(set(taken)) == sum(key_lengths)
    index = packed.layout.keys.index.tolist()
    for begin, position, length in packed.layout.keys.runs:
        assert index[begin : begin + length] == list(range(position, position + length))
    for (begin, position, length), (following, other, _) in pairwise(packed.layout.keys.runs):
        assert (begin + length, position + length) != (following, other)


def test_what_is_taken_is_immutable():
    gather = _gather(torch.tensor([1, 2]), torch.device("cpu"))
    for each in fields(gather):
        with pytest.raises(FrozenInstanceError):
            setattr(gather, each.name, None)


@pytest.mark.parametrize("lengths", [(2, 2), (2, 1)])
def test_masks_are_made_where_the_queries_are(lengths):
    mask = Group(lengths, (3, 3)).mask(None, 1, torch.device("meta"))
    assert mask.is_meta


@given(rows_of)
def test_each_position_sees_itself_and_nothing_later(rows):
    packed = pack(rows)
    sees, positions = visible(packed), packed.position_ids[0]
    assert sees.diagonal().all()
    assert not (sees & (positions[:, None] < positions[None, :])).any()


@given(rows_of)
def test_nothing_is_computed_that_is_not_context_of_a_token_asked_for(rows):
    packed = pack(rows)
    wanted = wanted_paths(rows)
    paths = paths_in(packed, visible(packed))
    if wanted:
        assert set(paths) == wanted
    else:
        assert len(paths) == 1  # processes that share a model must all call it


@given(st.integers(0, 10_000), st.sampled_from(sorted(NEEDED)), st.sampled_from(RULES))
def test_sorted_rows_compute_each_prefix_once_and_a_branch_costs_one_position(seed, needed, rule):
    rows = random_rows(seed, needed, rule=rule)
    firsts = rows.attention_mask.argmax(dim=1).tolist()
    order = sorted(range(len(firsts)), key=lambda row: (firsts[row], rows.input_ids[row].tolist()))
    rows = Rows(rows.input_ids[order], rows.attention_mask[order], rows.needed[order])
    packed = pack(rows)
    assert packed.input_ids.numel() <= max(1, len(wanted_paths(rows)) + len(rows.input_ids) - 1)


def area(sizes):
    """Queries times keys of segments of one group, padded to the longest; and without padding."""
    queries, keys = map(max, zip(*sizes, strict=True))
    return len(sizes) * queries * keys, sum(queries * keys for queries, keys in sizes)


@given(rows_of)
def test_segments_go_together_while_padding_costs_at_most_a_fifth(rows):
    groups = [list(zip(group.query_lengths, group.key_lengths, strict=True)) for group in pack(rows).layout.groups]
    sizes = [size for group in groups for size in group]
    assert sizes == sorted(sizes, reverse=True)
    for group in groups:
        padded, real = area(group)
        assert padded <= 1.2 * real
    for group, following in pairwise(groups):
        padded, real = area([*group, following[0]])
        assert padded > 1.2 * real


@given(rows_of)
def test_labels_are_asked_for_and_no_others(rows):
    packed = pack(rows)
    sources = {packed.source_BT[row, column].item() for row, column, *_ in needed_tokens(rows)}
    assert {index for index, label in enumerate(packed.labels[0].tolist()) if label != -100} == sources


@given(rows_of)
def test_counts_are_the_tokens_that_the_positions_stand_for(rows):
    packed = pack(rows)
    ends = {}
    for row, _, first, column in needed_tokens(rows):
        ends[row] = max(ends.get(row, 0), column - first)
    assert packed.counts.shape == packed.input_ids.shape
    assert packed.counts.sum() == sum(ends.values())


@given(rows_of)
def test_every_token_counts_each_token_of_each_row(rows):
    packed = pack(rows, every_token=True)
    paths = paths_in(packed, visible(packed))
    tally = dict.fromkeys(paths, 0)
    for path, count in zip(paths, packed.counts[0].tolist(), strict=True):
        tally[path] += count
    expected = dict.fromkeys(tally, 0)
    for row, mask in enumerate(rows.attention_mask):
        first = mask.argmax().item()
        for end in range(first + 1, first + int(mask.sum()) + 1):
            expected[path_of(rows, row, first, end)] += 1
    assert tally == expected
    assert torch.equal(packed.available_BT, rows.needed)


@given(rows_of, st.floats(-9, 9))
def test_unpacking_puts_values_where_they_were_asked_for_and_the_missing_elsewhere(rows, missing):
    packed = pack(rows)
    values = torch.randn(1, packed.input_ids.numel(), dtype=torch.float64)
    unpacked = packed.unpack(values, missing)
    assert unpacked.shape == rows.needed.shape
    assert (unpacked[~rows.needed] == missing).all()
    for row, column, *_ in needed_tokens(rows):
        assert unpacked[row, column] == values[0, packed.source_BT[row, column]]
    assert (packed.unpack(values)[~rows.needed] == 0).all()
    per_token = torch.randn(rows.needed.shape)
    assert torch.equal(packed.unpack(values, per_token)[~rows.needed], per_token[~rows.needed].double())


@pytest.mark.parametrize("num_trees", [1, 3])
def test_full_binary_trees_cost_no_more_than_a_twentieth_over_their_unique_tokens(num_trees):
    rows = full_tree_rows(num_trees, depth=4, length=64)
    unique = num_trees * 64 * (1 + 2 + 4 + 8 + 16)
    assert pack(rows).input_ids.numel() <= 1.05 * unique
    assert rows.input_ids.numel() > 2.5 * unique


def test_pruned_subtrees_are_not_computed():
    rows = full_tree_rows(1, depth=4, length=16)
    rows.needed[8:] = False  # the second half of the tree
    half = 16 * (1 + 1 + 2 + 4 + 8)
    assert pack(rows).input_ids.numel() <= half + 8


def test_what_follows_the_last_token_asked_for_is_not_computed():
    rows = full_tree_rows(1, depth=4, length=16)
    rows.needed[:, 16:] = False  # only the first segments
    assert pack(rows).input_ids.numel() <= 16 * 3 + 1


def test_padding_cannot_be_asked_for():
    rows = pad_rows([[5, 6], [7]], [[8], [9, 2, 3]], NEEDED["all"])
    everything = pack(Rows(rows.input_ids, rows.attention_mask, torch.ones_like(rows.needed)))
    assert torch.equal(everything.available_BT, rows.needed)
    assert torch.equal(everything.input_ids, pack(rows).input_ids)
    assert torch.equal(everything.labels, pack(rows).labels)


def test_nothing_predicts_the_first_token_of_a_row():
    packed = pack(pad_rows([[], [4]], [[5, 6], [7, 8, 9]], NEEDED["all"]))
    assert packed.available_BT.tolist() == [[False, True, False], [True, True, True]]


def test_equal_rows_are_computed_once():
    rows = pad_rows([[5, 6]] * 4, [[7, 8, 9]] * 4, NEEDED["all"])
    packed = pack(rows)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8]]
    assert packed.labels.tolist() == [[-100, 7, 8, 9]]


def test_prompts_of_different_trees_are_shared():
    rows = pad_rows([[5, 6, 7], [5, 6, 8]], [[9, 2], [3, 4]], NEEDED["all"])
    packed = pack(rows)
    assert packed.input_ids.numel() <= 4 + 3  # 5 6 7 9, and 6 8 3


def test_equal_tokens_in_different_columns_are_not_shared():
    rows = pad_rows([[5, 6], [4, 5, 6]], [[7, 8], [7, 8]], NEEDED["all"])
    assert pack(rows).input_ids.numel() == 3 + 4


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("extra", [4, 0])
def test_padding_is_no_token_of_a_path(order, extra):
    """A longer prompt ends as the shorter one does, or begins with a token that looks like its padding."""
    rows = pad_rows([[5, 6], [extra, 5, 6]], [[7, 8], [7, 8]], NEEDED["all"])
    rows = Rows(rows.input_ids[order], rows.attention_mask[order], rows.needed[order])
    packed = pack(rows)
    assert packed.input_ids.numel() == 3 + 4
    assert set(paths_in(packed, visible(packed))) == wanted_paths(rows)


def test_a_row_between_that_asks_for_nothing_hides_no_sharing():
    """Rows 0 and 2 share all but their last token; row 1, asked for nothing, shares it too."""
    rows = pad_rows([[5, 6]] * 3, [[7, 8, 2], [7, 8, 3], [7, 8, 4]], NEEDED["all"])
    rows.needed[1] = False
    packed = pack(rows)
    assert packed.input_ids.numel() == 4 + 1
    assert not packed.available_BT[1].any()


def test_a_deep_row_after_a_shallow_one_continues_where_that_one_stopped():
    rows = pad_rows([[5, 6]] * 2, [[7, 8, 2, 3]] * 2, NEEDED["all"])
    rows.needed[0, 1:] = False
    packed = pack(rows)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 2]] or packed.input_ids.numel() == 5


@settings(max_examples=20)
@given(rows_of)
def test_packing_changes_none_of_its_inputs(rows):
    copies = [tensor.clone() for tensor in (rows.input_ids, rows.attention_mask, rows.needed)]
    pack(rows)
    assert all(map(torch.equal, copies, (rows.input_ids, rows.attention_mask, rows.needed)))
