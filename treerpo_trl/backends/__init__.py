"""What draws segments: a backend takes prefixes and returns the segments sampled below them."""

from .transformers import TransformersBackend


__all__ = ["TransformersBackend"]
