"""What the context of an engine has room for, and how to keep to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list


def find_context_length(generation: Any) -> int:
    """Most tokens of a prompt and its completion that the engine takes."""
    if generation.mode == "colocate":
        length: int = generation.llm.llm_engine.model_config.max_model_len
        return length
    answer = [None]
    if generation.accelerator.is_main_process:  # no other process has a client
        answer = [generation.vllm_client.get_server_info()["model_config"]["max_model_len"]]
    (length,) = broadcast_object_list(answer)
    return length


def choose_call(limits: Sequence[int], rooms: Sequence[int]) -> tuple[list[int], int]:
    """Whom to ask next, and for how much, where one call asks for equally many tokens after all prefixes.

    All are asked for the largest limit if the context has room for that. Otherwise those that have room for a power of
    two are, the largest below that limit, so that all segments have their ends after as many calls as it has bits.

    Args:
        limits: [R] tokens that each row may still get, at least 1 and at most its room.
        rooms: [R] tokens that the context has room for after each prefix.

    Returns:
        The rows to ask, and for how many tokens.

    Examples:
        >>> choose_call([9, 4], rooms=[9, 20])
        ([0, 1], 9)
        >>> choose_call([9, 4, 3], rooms=[20, 4, 8])
        ([0, 2], 8)
    """
    least = 1 << (max(limits).bit_length() - 1)
    called = [row for row, room in enumerate(rooms) if room >= least]
    return called, min(max(limits[row] for row in called), min(rooms[row] for row in called))
