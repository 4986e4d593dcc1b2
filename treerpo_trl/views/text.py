"""What a model wrote, as people may safely see it: decoded, with control characters visible, and its final answer."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, Protocol

from ..tree import Node, Tree


BOXED = re.compile(r"\\boxed\s*\{")


class Tokenizer(Protocol):
    """What a view needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """The text of token ids."""
        ...


def decode(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of token ids, in a form that every file can hold.

    Args:
        tokenizer: Decodes.
        token_ids: A node's tokens, or a whole path's.
        skip_special_tokens: Whether to leave out special tokens such as the end-of-sequence token.
    """
    text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
    # Half a surrogate pair, which some tokenizers make of half a character, cannot be written as UTF-8.
    return text.encode(errors="replace").decode()


def pieces(tokenizer: Tokenizer, node: Node) -> list[str]:
    """The text of a node in pieces: what the model wrote, what tools answered, what it wrote after that, and so on."""
    runs: list[list[int]] = []
    previous = False
    for token, is_sampled in zip(node.token_ids, node.sampled_mask, strict=True):
        if is_sampled != previous:
            runs.append([])
        runs[-1].append(token)
        previous = is_sampled
    return [decode(tokenizer, run) for run in runs]


def visible(text: str, keep: str = "") -> str:
    """The text on one line: characters that do not print (controls, terminal escapes, joiners) become escapes.

    Args:
        text: What a model wrote.
        keep: Characters to leave as they are all the same, such as line breaks.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def visible_texts(value: Any) -> Any:
    """What is in lists and dicts, such as chat messages, made [`visible`] with its lines; numbers stay numbers."""
    if isinstance(value, Mapping):
        return {visible_texts(key): visible_texts(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return list(map(visible_texts, value))
    return value if value is None or isinstance(value, Number) else visible(str(value), keep="\n")


def leaf_answer(tree: Tree, leaf: int, tokenizer: Tokenizer) -> str | None:
    """The [`final_answer`] of the completion that ends in `leaf`."""
    return final_answer(decode(tokenizer, tree.completion_ids(leaf), skip_special_tokens=True))


def final_answer(completion: str) -> str | None:
    r"""What a completion says last, for display: not what a reward function reads.

    Args:
        completion: Text without special tokens.

    Returns:
        What stands in the last `\boxed{...}` whose braces balance; else the last line that is not blank; `None` if
        there is none.
    """
    for match in reversed(list(BOXED.finditer(completion))):
        answer = _braced(completion, match.end())
        if answer is not None:
            return answer.strip()
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _braced(text: str, start: int) -> str | None:
    """The text from `start`, just after an opening brace, to the brace that closes it. `\\{` is a letter in LaTeX."""
    depth, index = 1, start
    while index < len(text):
        character = text[index]
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:index]
        index += 2 if character == "\\" else 1
    return None
