"""The public place of what scripts use of [`~treerpo_trl.checks.adapters`]: a quantized model needs an adapter."""

from .checks.adapters import check_quantization


__all__ = ["check_quantization"]
