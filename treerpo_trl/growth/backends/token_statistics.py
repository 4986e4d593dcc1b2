"""What sampling knows of each token beside its id, from the distribution that it was drawn from.

Legend: R rows decoded together, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ...tree import Segment


SCORE_NORM, SURPRISAL, ENTROPY = "score_norm", "surprisal", "entropy"
# Where each of them is kept in a segment.
FIELDS = {SCORE_NORM: "score_norms", SURPRISAL: "uncertainties", ENTROPY: "uncertainties"}


class TokenStatistics(LogitsProcessor):
    """Watches a call of `generate` and notes numbers of each token that a row draws.

    p is the policy that is trained: with temperature, without filters such as top_p.

    - "score_norm": |d log p_t / d logits|^2 = 1 - 2 p_t + sum_v p_v^2;
    - "surprisal": -log p_t, in nats;
    - "entropy": -sum_v p_v log p_v, in nats.

    Args:
        names: Which of these to note.
        temperature: That of the call, which `generate` applies after this.
    """

    def __init__(self, names: Sequence[str], temperature: float | None):
        self.names = tuple(names)
        self.temperature = 1.0 if temperature is None else temperature
        self._noted: dict[str, list[Tensor]] = defaultdict(list)
        self._log_probs_RV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the distribution; what was drawn from the one before is known now."""
        self._finish(input_ids)
        self._log_probs_RV = (scores.float() / self.temperature).log_softmax(dim=-1)
        return scores

    def attach(self, segments: Sequence[Segment], output_ids: Tensor) -> list[Segment]:
        """The segments, each with the numbers of its own tokens.

        Args:
            segments: [R] what was drawn.
            output_ids: (R, L) what `generate` returned.
        """
        self._finish(output_ids)
        rows = {name: torch.stack(steps, dim=1).tolist() for name, steps in self._noted.items()}
        described = []
        for row, segment in enumerate(segments):
            own: dict[str, Any] = {
                FIELDS[name]: tuple(of_rows[row][: len(segment.token_ids)]) for name, of_rows in rows.items()
            }
            described.append(replace(segment, **own))
        return described

    def _finish(self, input_ids: Tensor) -> None:
        log_probs_RV, self._log_probs_RV = self._log_probs_RV, None
        if log_probs_RV is None:
            return
        drawn_R1 = input_ids[:, -1:]
        if SURPRISAL in self.names:
            self._noted[SURPRISAL].append(-log_probs_RV.gather(1, drawn_R1).squeeze(1))
        probs_RV = log_probs_RV.exp()
        if ENTROPY in self.names:
            terms_RV = torch.where(probs_RV > 0, probs_RV * log_probs_RV, 0.0)
            self._noted[ENTROPY].append(-terms_RV.sum(dim=1))
        if SCORE_NORM in self.names:
            # (1 - p_t)^2 + the other p_v^2, of which 1 - p_t is the sum: next to p_t = 1 this keeps its digits.
            others_RV = probs_RV.scatter_(1, drawn_R1, 0.0)
            self._noted[SCORE_NORM].append(others_RV.sum(dim=1).square() + others_RV.square().sum(dim=1))
