"""The attention function of packed rows: each segment's queries against the keys and values of its own path.

It stands in for a model's attention implementation and hands everything on to it that carries no layout, so
generation and dense rows are untouched. The layout travels as a keyword argument, because gradient checkpointing runs
layers again in the backward pass, when any context manager has closed.

Legend: H heads, G key-value heads, S packed tokens, R segments of a group, Q queries, K keys, E size of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .flex import attend_in_blocks
from .layout import Gather, Group, TreeLayout


PREFIX = "prefix_sharing_"
# A mask of four dimensions is passed on as it is, so transformers builds none of S x S.
NO_MASK_SHAPE = (1, 1, 1, 1)


def install(model: PreTrainedModel) -> None:
    """Put the attention function in front of the model's own implementation. Installing twice does nothing."""
    original = model.config._attn_implementation
    if original.startswith(PREFIX):
        return
    name = PREFIX + original
    AttentionInterface.register(name, _make_attention(original))
    AttentionMaskInterface.register(name, _make_mask(original))
    model.set_attn_implementation(name)


_masks_wanted = ContextVar("masks_wanted", default=True)


@contextmanager
def without_masks() -> Iterator[None]:
    """Let models make no masks. Masks are made before the layers run, so nothing asks again in the backward pass."""
    token = _masks_wanted.set(False)
    try:
        yield
    finally:
        _masks_wanted.reset(token)


def _make_mask(original: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        return ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs) if _masks_wanted.get() else None

    return mask


def _make_attention(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        tree_layout: TreeLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if tree_layout is not None and attention_mask is not None and attention_mask.shape != NO_MASK_SHAPE:
            raise ValueError(f"{type(module).__name__} makes a mask of its own")
        if tree_layout is None:
            return _own_attention(module, original)(module, query, key, value, attention_mask, **kwargs)
        return uncompiled_attention(module, query, key, value, tree_layout, original, **kwargs), None

    return attention


def _own_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # Each modeling file has its own; a layer derived elsewhere has that of the file it derives from.
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    implementation: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of packed rows.

    Args:
        module: The layer, for its configuration.
        query: (1, H, S, E).
        key: (1, G, S, E), H a multiple of G.
        value: (1, G, S, E).
        layout: Which positions attend to which.
        implementation: The model's own implementation of attention, which chooses the kernel.
        scaling: Factor of the scores; 1 / sqrt(E) by default.
        dropout: Probability with which attention weights are dropped.
        softcap: Bound of the scores, scaled by tanh.
        kwargs: What other implementations take; of these, `sliding_window` counts: the positions, its own included,
            that a token looks back.

    Returns:
        (1, S, H, E).

    Raises:
        ValueError: The layer has attention sinks, or a window that it does not tell; or its weights are to be dropped,
            and the kernel cannot.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks")
    window = _window_of(module, kwargs)
    output_HSE = KERNELS[implementation](layout, query[0], key[0], value[0], window, scaling, dropout, softcap)
    return output_HSE.transpose(0, 1).contiguous().unsqueeze(0)  # some layers take a view of it


# Every layout has other lengths, for each of which torch.compile would compile each layer anew.
uncompiled_attention: Callable[..., Tensor] = torch.compiler.disable(tree_attention)


def _window_of(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The window handed over or, should the model leave it to the mask, the one its configuration gives this layer."""
    config: Any = module.config
    if kwargs.get("sliding_window") is not None:
        return kwargs["sliding_window"]
    if (layer_types := getattr(config, "layer_types", None)) is not None:
        return config.sliding_window if layer_types[module.layer_idx] == "sliding_attention" else None
    if "sliding_window" not in kwargs and getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"{type(module).__name__} leaves its sliding window to a mask")
    return None


def _attend_in_groups(
    layout: TreeLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
    dropout_p: float,
    softcap: float | None,
) -> Tensor:
    """(H, S, E), with the keys of each segment's path gathered for it."""
    queries = query if layout.queries is None else _take(query, layout.queries)
    shapes = [group.shape for group in layout.groups]
    by_group = zip(
        layout.groups,
        queries.split([segments * num_queries for segments, num_queries, _ in shapes], dim=1),
        _take(key, layout.keys).split([segments * num_keys for segments, _, num_keys in shapes], dim=1),
        _take(value, layout.keys).split([segments * num_keys for segments, _, num_keys in shapes], dim=1),
        strict=True,
    )
    outputs = [_attend(group, q, k, v, window, scaling, dropout_p, softcap) for group, q, k, v in by_group]
    output_HSE = torch.cat(outputs, dim=1)
    return output_HSE if layout.outputs is None else _take(output_HSE, layout.outputs)


def _attend(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
    dropout_p: float,
    softcap: float | None,
) -> Tensor:
    """(H, R * Q, E) from (H, R * Q, E) queries and (G, R * K, E) keys and values."""
    num_segments, num_queries, num_keys = group.shape
    num_heads, _, size = query.shape
    repeats = num_heads // key.size(0)
    key, value = (states.unflatten(1, (num_segments, num_keys)).transpose(0, 1) for states in (key, value))
    query = query.unflatten(1, (num_segments, num_queries)).transpose(0, 1)
    if group.is_plainly_causal and window is None and softcap is None:
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=dropout_p, scale=scaling, enable_gqa=repeats > 1
        )
        return output.transpose(0, 1).flatten(1, 2)
    # Heads that share keys are laid along the queries, so that keys are never repeated.
    query = query.reshape(num_segments, -1, repeats * num_queries, size)
    mask = group.mask(window, repeats, query.device)
    if softcap is None:
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scaling)
    else:
        scores = query @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, -torch.inf)
        output = dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout_p) @ value
    output = output.reshape(num_segments, num_heads, num_queries, -1)
    return output.transpose(0, 1).flatten(1, 2)


# By the name of the model's own implementation.
KERNELS: dict[str, Callable[..., Tensor]] = {
    "sdpa": _attend_in_groups,
    "eager": _attend_in_groups,
    "flex_attention": attend_in_blocks,
}


def _take(states: Tensor, gather: Gather) -> Tensor:
    """(X, S, E) -> (X, N, E)."""
    taken: Tensor = _Take.apply(states, gather)
    return taken


class _Take(torch.autograd.Function):
    """`index_select` whose backward pass on a CPU adds whole runs of positions instead of single ones."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gather: Gather) -> Tensor:
        ctx.gather, ctx.num_positions = gather, states.size(1)
        return states.index_select(1, gather.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros(grad.size(0), ctx.num_positions, grad.size(2))
        if grad.device.type == "cpu":
            for begin, position, length in ctx.gather.runs:
                total.narrow(1, position, length).add_(grad.narrow(1, begin, length))
        else:
            total.index_add_(1, ctx.gather.index, grad)
        return total, None
