"""Calls of an engine that takes one length for all prefixes, and nothing that goes beyond its context."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_trl.growth.backends.context import choose_call


@pytest.mark.parametrize(
    ("limits", "rooms", "call"),
    [
        ([9, 4], [9, 20], ([0, 1], 9)),  # all have room for the largest limit
        ([9, 4, 3], [20, 4, 8], ([0, 2], 8)),  # 8 is a power of two below 9
        ([9, 7], [12, 8], ([0, 1], 8)),
        ([1], [1], ([0], 1)),
    ],
)
def test_golden_calls(limits, rooms, call):
    assert choose_call(limits, rooms) == call


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 1000)), min_size=1))
def test_calls_fit_into_the_context_and_are_few(rows):
    """As many as the largest limit has bits, of at most three times its tokens, however many rows there are."""
    limits, rooms = [limit for limit, _ in rows], [limit + spare for limit, spare in rows]
    largest, asked = max(limits), []
    while going := [row for row, limit in enumerate(limits) if limit > 0]:
        called, num_tokens = choose_call([limits[row] for row in going], [rooms[row] for row in going])
        assert called and 0 < num_tokens <= min(rooms[going[place]] for place in called)
        asked.append(num_tokens)
        for place in called:
            limits[going[place]] -= num_tokens
            rooms[going[place]] -= num_tokens
    assert len(asked) <= largest.bit_length()
    assert sum(asked) < 3 * largest or largest == 1


@given(st.lists(st.integers(1, 50), min_size=1))
def test_where_there_is_room_one_call_is_for_all(limits):
    assert choose_call(limits, [max(limits)] * len(limits)) == (list(range(len(limits))), max(limits))
