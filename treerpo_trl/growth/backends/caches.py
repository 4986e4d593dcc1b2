"""Key-value caches that branch: which ones can, and forks with room for the tokens to come."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, StoppingCriteria, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


# What some models keep on themselves of the rows they saw last, an item a row, and read when they continue.
ROW_STATE = ("rope_deltas",)  # multimodal models: by how much positions are ahead of the text's


# What `generate` calls a cache, in its arguments and in what it returns: "cache" from transformers 5.24 on.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
# A layer that holds nothing, because it reads the keys and values of another one or has no attention.
NO_LAYER = getattr(cache_utils, "DummyLayer", None)


class CannotForkError(Exception):
    """A cache has parts that a fork would leave out."""


def check_forkable(cache: Any) -> None:
    """Check that the cache is nothing but one tensor of keys and one of values a layer, row by row.

    Subclasses are refused: those of hybrid models hold a recurrent state besides, in the layers or beside them. So are
    caches with further attributes, as offloaded ones are.

    Raises:
        CannotForkError: It is something else.
    """
    known = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer, NO_LAYER)
    is_forkable = (
        type(cache) is DynamicCache
        and vars(cache).keys() <= {*vars(DynamicCache()), "_is_user_defined"}
        and all(type(layer) in known for layer in cache.layers)
    )
    if not is_forkable:
        kinds = [type(cache), *(type(layer) for layer in getattr(cache, "layers", ()))]
        names = ", ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        raise CannotForkError(f"it is not made of per-token keys and values alone: {names}")


def take_row_state(model: nn.Module, rows: Tensor) -> list[tuple[nn.Module, str, Tensor]]:
    """What the model keeps on itself of some rows of the batch it saw last: (module, name, value) each."""
    return [
        (module, name, vars(module)[name][rows])
        for module in model.modules()
        for name in ROW_STATE
        if isinstance(vars(module).get(name), Tensor)
    ]


def put_row_state(state: list[tuple[nn.Module, str, Tensor]], rows: Tensor) -> None:
    """Have the model go on from some rows of what [`take_row_state`] returned."""
    for module, name, value in state:
        setattr(module, name, value[rows])


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
        if isinstance(layer, DynamicLayer) and layer.is_initialized and not layer.is_sliding:
            forked.layers.append(RoomyLayer(layer.keys[rows], layer.values[rows], room))
        else:  # a window drops tokens as it moves, so there is no room to write in place
            forked.layers.append(copy.copy(layer))
            forked.layers[-1].batch_select_indices(rows)
    return forked


class CacheKeeper(StoppingCriteria):
    """Keeps a cache as it is at the end of a call of `generate`.

    Processes that run a sharded model together go on until the last one has ended, and the forward passes of those
    that have ended add to their caches. Criteria are not asked then.
    """

    def __init__(self, cache: Cache):
        self.cache = self.kept = cache

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.kept = copy.copy(self.cache)
        self.kept.layers = [copy.copy(layer) for layer in self.cache.layers]  # later tokens are written elsewhere
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
