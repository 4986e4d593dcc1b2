"""Evaluation: responses of a model, scored (`responses`), and what their scores allow to say (`statistics`)."""

from .responses import (
    EvaluationResult,
    Response,
    RewardFunc,
    Sampler,
    TransformersSampler,
    check_sampling,
    eos_token_ids_of,
    evaluate,
    mean,
    respond,
    summarize,
)


__all__ = [
    "EvaluationResult",
    "Response",
    "RewardFunc",
    "Sampler",
    "TransformersSampler",
    "check_sampling",
    "eos_token_ids_of",
    "evaluate",
    "mean",
    "respond",
    "summarize",
]
