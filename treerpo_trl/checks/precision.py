"""The precision that a machine can train in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bf16_explained(config: Any) -> Iterator[None]:
    """Let transformers' error about bfloat16 say where it comes from and what to set.

    Args:
        config: Whose `bf16` is not resolved yet: TRL takes `None` for `True` unless `fp16` is set.

    Raises:
        ValueError: As upstream.
    """
    given = config.bf16
    try:
        yield
    except ValueError as error:
        if "support bf16" not in str(error):
            raise
        is_default = given is None and not config.bf16_full_eval
        whence = "bf16 is on, which is TRL's default" if is_default else f"bf16 is {config.bf16}"
        if config.bf16_full_eval:
            whence += " and bf16_full_eval is True"
        raise ValueError(
            f"{whence}, but no accelerator that computes in bfloat16 was found. On a CPU, set use_cpu=True to keep "
            "bfloat16 there, or bf16=False for float32; on an older GPU, fp16=True or "
            f"bf16=False ({error})"
        ) from error
