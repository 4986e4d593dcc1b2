"""Options that count from the start, or to the end, of a completion, for a call that draws one segment of it."""

from __future__ import annotations

import copy

from transformers import GenerationConfig


def options_of_segment(
    options: GenerationConfig, prefix_length: int, num_sampled: int, max_tokens: int, is_last: bool
) -> GenerationConfig:
    """What a call that continues a completion is given, so that the completion is as if one call had drawn it.

    Args:
        options: Those of the whole completion.
        prefix_length: Tokens of the prompt, padding included, and of the completion above the segment.
        num_sampled: How many of these were sampled.
        max_tokens: Most tokens of the segment.
        is_last: Whether the completion ends with the segment in any case.
    """
    options = copy.deepcopy(options)
    options.max_new_tokens = max_tokens
    if options.min_length is not None:  # `generate` warns of more than there can be
        options.min_length = min(options.min_length, prefix_length + max_tokens)
    if options.min_new_tokens is not None:
        options.min_new_tokens = min(max(options.min_new_tokens - num_sampled, 0), max_tokens)
    if options.exponential_decay_length_penalty is not None:
        start, factor = options.exponential_decay_length_penalty
        options.exponential_decay_length_penalty = (start - num_sampled, factor)
    if num_sampled > 0:
        options.begin_suppress_tokens = None
    if not is_last:
        options.forced_eos_token_id = None
    return options
