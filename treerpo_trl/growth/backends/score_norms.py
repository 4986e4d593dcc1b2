"""The squared norm of a segment's score, from the distributions that it was drawn from.

Legend: R rows decoded together, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ...tree import Segment


class ScoreNorms(LogitsProcessor):
    """Watches a call of `generate` and adds up |d log p_t / d logits|^2 = 1 - 2 p_t + sum_v p_v^2 for each row.

    p is the policy that is trained: with temperature, without filters such as top_p.

    Args:
        temperature: That of the call, which `generate` applies after this.
    """

    def __init__(self, temperature: float | None):
        self.temperature = 1.0 if temperature is None else temperature
        self.norms: list[Tensor] = []
        self._probs_RV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the distribution; what was drawn from the one before is known now."""
        self._finish(input_ids)
        self._probs_RV = (scores.float() / self.temperature).softmax(dim=-1)
        return scores

    def attach(self, segments: Sequence[Segment], output_ids: Tensor) -> list[Segment]:
        """The segments, each with the sum over its own tokens.

        Args:
            segments: [R] what was drawn.
            output_ids: (R, L) what `generate` returned.
        """
        self._finish(output_ids)
        sums = torch.stack(self.norms, dim=1).cumsum(dim=1)
        last = torch.tensor([len(segment.token_ids) - 1 for segment in segments], device=sums.device)
        totals = sums.gather(1, last.unsqueeze(1)).squeeze(1).tolist()
        return [replace(segment, score_norm=total) for segment, total in zip(segments, totals, strict=True)]

    def _finish(self, input_ids: Tensor) -> None:
        if self._probs_RV is not None:
            # (1 - p_t)^2 + the other p_v^2, of which 1 - p_t is the sum: next to p_t = 1 this keeps its digits.
            others_RV = self._probs_RV.scatter_(1, input_ids[:, -1:], 0.0)
            self.norms.append(others_RV.sum(dim=1).square() + others_RV.square().sum(dim=1))
            self._probs_RV = None
