"""Lines that packages log because they are installed, kept from those who do not use them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable


class HeldBackLine(logging.Filter):
    """Holds back one line of one logger until its package is used. Every other line passes.

    Args:
        logger: Name of the logger.
        start: What the line begins with.
        is_used: Whether the package is used already when it logs the line.
    """

    def __init__(self, logger: str, start: str, is_used: Callable[[], bool] = lambda: False):
        super().__init__()
        self.logger, self.start, self.is_used = logging.getLogger(logger), start, is_used
        self.held: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown now."""
        if self.is_used() or not str(record.msg).startswith(self.start):
            return True
        self.held.append(record)
        return False

    def show(self) -> None:
        """Show the line, if it was logged, and hold it back no longer: the package is used."""
        self.logger.removeFilter(self)
        while self.held:
            self.logger.handle(self.held.pop(0))


# peft imports bitsandbytes and transformers imports peft, so at every command. On CPUs with AVX512-BF16 it then says
# that a kernel for inference in 4 bits is missing.
BITSANDBYTES = HeldBackLine("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
# accelerate imports DeepSpeed to unwrap any model. Without a GPU it then says so.
DEEPSPEED = HeldBackLine(
    "DeepSpeed",
    "Setting accelerator to CPU",
    lambda: os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes", "on"),
)


def hold_back_lines() -> None:
    """Hold back the lines above; a second call changes nothing."""
    for line in (BITSANDBYTES, DEEPSPEED):
        line.logger.addFilter(line)
