"""What draws segments: a backend takes prefixes and returns the segments sampled below them."""

from .transformers import TransformersBackend
from .vllm import VLLMBackend, find_context_length


__all__ = ["TransformersBackend", "VLLMBackend", "find_context_length"]
