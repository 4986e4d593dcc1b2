"""What draws segments: a backend takes prefixes and returns the segments sampled below them."""

from .context import find_context_length
from .transformers import TransformersBackend
from .vllm import VLLMBackend


__all__ = ["TransformersBackend", "VLLMBackend", "find_context_length"]
