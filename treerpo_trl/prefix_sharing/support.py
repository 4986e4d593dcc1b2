"""Which models can share prefixes exactly, as far as their configuration tells."""

from __future__ import annotations

from transformers import PreTrainedModel

from .attention import PREFIX


KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Others look their name up in the configuration while they run, which must be theirs then.
KNOWN_IMPLEMENTATIONS = ("sdpa", "eager")


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
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder model"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return f"{name} learns virtual tokens, which stand in front of every row"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not take its attention from transformers' AttentionInterface"
    implementation = model.config._attn_implementation.removeprefix(PREFIX)
    if implementation not in KNOWN_IMPLEMENTATIONS:
        return (
            f"{name} uses attn_implementation='{implementation}', not {' or '.join(map(repr, KNOWN_IMPLEMENTATIONS))}"
        )
    return None
