"""Where the rows of a call of `generate` end, which it does not tell: at a stop string, a delimiter or a limit.

Legend: R rows decoded together, P tokens of their prefixes, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from ...tree import Segment
from ..delimiters import DelimiterFinder
from ..waves import Delimiters


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


class LimitWatcher(StoppingCriteria):
    """Stops each row at a length of its own, or at a delimiter among the tokens that it has drawn.

    Args:
        limits: [R] most new tokens of each row.
        prefix_length: P.
        finder: Of delimiters; `None` for none.
    """

    def __init__(self, limits: Sequence[int], prefix_length: int, finder: DelimiterFinder | None):
        self.num_tokens = list(limits)  # after which each row ends, as far as is known
        self.prefix_length = prefix_length
        self.finder = finder

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        own_ids = input_ids[:, self.prefix_length :].tolist() if self.finder is not None else []
        length = input_ids.size(1) - self.prefix_length
        for row, ids in enumerate(own_ids):
            if length < self.num_tokens[row] and self.finder is not None and self.finder.is_end(ids):
                self.num_tokens[row] = length
        return torch.tensor([most <= length for most in self.num_tokens], device=input_ids.device)


class Endings:
    """The ends of the rows of one call.

    Args:
        input_ids: (R, P) prefixes.
        max_tokens: [R] most new tokens of each row.
        stop_strings: Texts that end a completion; they may begin in the prefix.
        delimiters: Texts that end a segment.
        tokenizer: Needed for texts only.
    """

    def __init__(
        self,
        input_ids: Tensor,
        max_tokens: Sequence[int],
        stop_strings: Sequence[str] | None,
        delimiters: Delimiters | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.prefix_length = input_ids.size(1)
        # Whether all rows have one length, but for those that end the completion.
        self.is_even = delimiters is None and len(set(max_tokens)) == 1
        self.criteria = StoppingCriteriaList()
        self._stops = self._limits = None
        if stop_strings is not None:
            self._stops = StopStringWatcher(StopStringCriteria(tokenizer, stop_strings), input_ids)
            self.criteria.append(self._stops)
        if not self.is_even:
            finder = None if delimiters is None else DelimiterFinder(delimiters, tokenizer)
            self._limits = LimitWatcher(max_tokens, self.prefix_length, finder)
            self.criteria.append(self._limits)

    def cut(self, output_ids: Tensor, eos_token_ids: Tensor) -> list[Segment]:
        """Cut each row after its first end-of-sequence token or stop string, or where its segment ends.

        What follows is padding.

        Args:
            output_ids: (R, L) what `generate` returned.
            eos_token_ids: Every token that ends a completion.
        """
        drawn_ids = output_ids[:, self.prefix_length :]
        device, num_drawn = drawn_ids.device, drawn_ids.size(1)
        is_end = torch.isin(drawn_ids, eos_token_ids.to(device))
        if self._stops is not None:
            stopped_R1 = self._stops.num_tokens.to(device).unsqueeze(1)
            is_end |= torch.arange(1, num_drawn + 1, device=device) == stopped_R1
        limit_R = torch.full((len(drawn_ids),), num_drawn, device=device)
        if self._limits is not None:
            limit_R = torch.minimum(limit_R, torch.tensor(self._limits.num_tokens, device=device))
        end_R = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, num_drawn + 1)
        return [
            Segment(tuple(ids[: min(end, limit)]), end <= limit)
            for ids, end, limit in zip(drawn_ids.tolist(), end_R.tolist(), limit_R.tolist(), strict=True)
        ]
