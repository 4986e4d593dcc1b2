"""Which rows of a call of `generate` stopped at a stop string, and where: `generate` itself does not tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopStringWatcher(StoppingCriteria):
    """Stops where `criteria` does and remembers after how many new tokens each row stopped (0: it has not)."""

    def __init__(self, criteria: StoppingCriteria, input_ids: Tensor):
        self.criteria = criteria
        self.prefix_length = input_ids.size(1)
        self.num_tokens = torch.zeros(input_ids.size(0), dtype=torch.long, device=input_ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        is_done = self.criteria(input_ids, scores, **kwargs)
        is_first = is_done & (self.num_tokens == 0)
        self.num_tokens[is_first] = input_ids.size(1) - self.prefix_length
        return is_done
