"""Which models can share prefixes exactly, as far as their configuration tells."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .attention import KERNELS, PREFIX


KNOWN_LAYERS = {"full_attention", "sliding_attention"}
LENGTH_DEPENDENT_ROTATIONS = {"dynamic", "longrope"}


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why a model cannot share prefixes, or `None` if nothing speaks against it.

    What this cannot see, [`find_difference`] measures on the first batch.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    layer_types = getattr(config, "layer_types", None) or []
    unknown = sorted(set(layer_types) - KNOWN_LAYERS)
    if unknown:
        return f"{name} has layers of type {', '.join(unknown)}, whose state cannot branch"
    if getattr(model, "_is_stateful", False):
        return f"{name} carries a recurrent state, which cannot branch"
    if any(hasattr(module, "sinks") for module in model.modules()):
        return f"{name} has attention sinks"
    rotations = _rotations(getattr(config, "rope_parameters", None))
    if rotations & LENGTH_DEPENDENT_ROTATIONS:
        return f"{name} has rotary positions ({', '.join(sorted(rotations))}) that depend on the length of the batch"
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder model"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return f"{name} learns virtual tokens, which stand in front of every row"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not take its attention from transformers' AttentionInterface"
    implementation = model.config._attn_implementation.removeprefix(PREFIX)
    if implementation not in KERNELS:
        return f"{name} uses attn_implementation='{implementation}', not {' or '.join(map(repr, KERNELS))}"
    return None


def has_low_precision(model: PreTrainedModel) -> bool:
    """Whether some parameters have fewer bits than a number of single precision, as quantized ones have."""
    return any(parameter.dtype.itemsize < torch.float32.itemsize for parameter in model.parameters())


def _rotations(rope_parameters: Any) -> set[str]:
    """Types of rotary positions, of which a model may have one for each type of layer."""
    if not isinstance(rope_parameters, dict):
        return set()
    if "rope_type" in rope_parameters:
        return {rope_parameters["rope_type"]}
    return {rotation for parameters in rope_parameters.values() for rotation in _rotations(parameters)}
