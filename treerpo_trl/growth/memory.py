"""How many tokens' keys and values are in memory while trees grow."""

from __future__ import annotations

from .shape import TreeShape


def most_cached_tokens(shape: TreeShape, num_trees: int, prompt_length: int, max_rows: int) -> int:
    """Most tokens whose keys and values [`~treerpo_trl.growth.backends.TransformersBackend`] keeps at a time.

    While a block of the last depth is drawn, one block of each depth above it waits, with its prefixes. A block has
    at most `max_rows` rows, so with depth D there are never more than D * max_rows rows, however many trees grow.

    Args:
        shape: Of the trees. Segments are taken to be full, and no path to end early.
        num_trees: Trees that grow in one process.
        prompt_length: Tokens of a prompt, the padding of shorter ones included.
        max_rows: `max_frontier_rows` of the config.
    """
    rows, tokens, length = min(num_trees, max(1, max_rows // shape.branching[0])), 0, prompt_length
    for factor in shape.branching:
        rows = min(max_rows, rows * factor)
        length = min(length + shape.segment_length, prompt_length + shape.max_completion_length)
        tokens += rows * length
    return tokens
