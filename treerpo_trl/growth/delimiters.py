"""Where a segment's text ends with a delimiter: told from its token ids alone, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .waves import Delimiters


UNDECODABLE = "\ufffd"  # what a part of a character decodes to
MOST_BYTES = 4  # of a character, each of which may be a token of its own


class DelimiterFinder:
    """Finds the delimiters that end a segment.

    Args:
        delimiters: What to look for.
        tokenizer: Decodes tokens.
    """

    def __init__(self, delimiters: Delimiters, tokenizer: Any):
        self.delimiters = delimiters
        self.tokenizer = tokenizer
        self._last_characters = {text[-1] for text in delimiters.texts}
        self._window = MOST_BYTES * max(map(len, delimiters.texts)) + 1
        self._may_end: dict[int, bool] = {}

    def is_end(self, token_ids: Sequence[int]) -> bool:
        """Whether a segment of these tokens ends here: a delimiter is completed by the last of them.

        The last token may hold more than the delimiter's end: tokens are never cut.
        """
        if len(token_ids) < self.delimiters.min_tokens or not self._may_complete(token_ids[-1]):
            return False
        window = list(token_ids[-self._window :])
        first = window[:1]  # once more in front, as some decoders strip the space that a text begins with
        text, without_last = self._decode(first + window), self._decode(first + window[:-1])
        # What the last token changes may begin earlier than where it is added: it may complete a character.
        start, old = len(self._decode(first)), _common_length(text, without_last)
        return any(text.find(each, max(old + 1 - len(each), start)) >= 0 for each in self.delimiters.texts)

    def find(self, token_ids: Sequence[int]) -> int | None:
        """How many of the tokens the segment takes; `None` if no delimiter ends it."""
        return next((end for end in range(1, len(token_ids) + 1) if self.is_end(token_ids[:end])), None)

    def _may_complete(self, token_id: int) -> bool:
        if token_id not in self._may_end:
            text = self._decode([token_id, token_id])  # some decoders strip the space that a text begins with
            self._may_end[token_id] = UNDECODABLE in text or not self._last_characters.isdisjoint(text)
        return self._may_end[token_id]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _common_length(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((index for index, (mine, its) in pairs if mine != its), min(len(text), len(other)))
