"""Key-value caches that branch: which ones can, and forks with room for the tokens to come."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def is_forkable(cache: Any) -> bool:
    """Whether every layer of the cache is one tensor of keys and one of values, row by row.

    Subclasses are refused: layers of hybrid models derive from these and hold a recurrent state besides, which
    `batch_select_indices` would leave unforked.
    """
    return isinstance(cache, Cache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer) for layer in cache.layers
    )


class RoomyLayer(DynamicLayer):
    """Keys and values with room for the tokens to come, written in place.

    Its parent class concatenates instead, which copies the whole prefix at every token.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        *shape, length, _ = keys.shape
        self._buffers = [states.new_empty(*shape, length + room, states.size(-1)) for states in (keys, values)]
        self._write(0, keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As upstream, written into the room that is left."""
        length = self.keys.size(-2)
        if length + key_states.size(-2) > self._buffers[0].size(-2):
            return super().update(key_states, value_states, *args, **kwargs)
        self._write(length, key_states, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """As upstream, with the room given up."""
        super().batch_select_indices(indices)
        self._buffers = [self.keys, self.values]  # lets go of the rows that were not selected

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        length = keys.size(-2)
        key_buffer, value_buffer = self._buffers
        key_buffer.narrow(-2, start, length).copy_(keys)
        value_buffer.narrow(-2, start, length).copy_(values)
        self.keys = key_buffer.narrow(-2, 0, start + length)
        self.values = value_buffer.narrow(-2, 0, start + length)


def fork(cache: Cache, rows: Tensor, room: int) -> Cache:
    """A new cache whose row i is row rows[i] of `cache`, with room for more tokens. `cache` stays as it is."""
    forked = copy.copy(cache)
    forked.layers = []
    for layer in cache.layers:
        if layer.is_initialized and not layer.is_sliding:
            forked.layers.append(RoomyLayer(layer.keys[rows], layer.values[rows], room))
        else:  # a window drops tokens as it moves, so there is no room to write in place
            forked.layers.append(copy.copy(layer))
            forked.layers[-1].batch_select_indices(rows)
    return forked
