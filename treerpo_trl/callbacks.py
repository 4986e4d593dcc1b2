"""The public place of [`~treerpo_trl.reporting.callbacks`]: trees written down while training."""

from .reporting.callbacks import TreeLoggingCallback


__all__ = ["TreeLoggingCallback"]
