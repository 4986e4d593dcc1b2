r"""A reward for MATH-style answers: TRL's `accuracy_reward`, for gold answers and responses in everyday LaTeX.

TRL's reward asks for gold answers inside a formula and for responses with every brace written out. MATH's golds are
bare, and its own solutions write `\frac43` and `\sqrt2`, which TeX reads as `\frac{4}{3}` and `\sqrt{2}`.
"""

import re
from collections.abc import Callable
from typing import Any

from train_data import to_solution
from trl.rewards import accuracy_reward


NUM_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "cfrac": 2, "sqrt": 1}
COMMAND = re.compile(r"\\(" + "|".join(NUM_ARGUMENTS) + r")(?![a-zA-Z])")
# What TeX takes as an argument: a command, or a single character that is no delimiter of something else.
ARGUMENT = re.compile(r"\s*(\\[a-zA-Z]+|[^\s\\{}$&^_\]])")
OPTION = re.compile(r"\s*\[[^\[\]]*\]")


def math_accuracy_reward(
    completions: list[list[dict[str, str]]],
    solution: list[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""1 if the completion's answer equals the gold answer, 0 if not, `None` if the gold cannot be read.

    Args:
        completions: Chat completions, each a list of one message.
        solution: Gold answers: bare LaTeX (`\frac34`), a formula (`$\frac34$`), or text with a `\boxed` answer.
        log_extra: Adds columns to the completions table; see `accuracy_reward`.
        **kwargs: The dataset's other columns; not used.
    """
    braced = [[{**message, "content": add_braces(message["content"])} for message in turn] for turn in completions]
    return accuracy_reward(braced, [add_braces(to_solution(gold)) for gold in solution], log_extra=log_extra)


def add_braces(text: str) -> str:
    r"""Write out the braces of fractions and roots, as TeX reads them: `\frac43` becomes `\frac{4}{3}`."""
    pieces, position = [], 0
    while command := COMMAND.search(text, position):
        pieces.append(text[position : command.end()])
        position = command.end()
        if command[1] == "sqrt" and (option := OPTION.match(text, position)):
            pieces.append(option[0])
            position = option.end()
        for _ in range(NUM_ARGUMENTS[command[1]]):
            argument, position = take_argument(text, position)
            pieces.append(argument)
    return "".join([*pieces, text[position:]])


def take_argument(text: str, start: int) -> tuple[str, int]:
    """The argument of a command that begins at `start`, in braces, and where it ends; nothing if there is none."""
    if argument := ARGUMENT.match(text, start):
        if COMMAND.match(argument[1]):  # an argument with arguments of its own, which TeX itself refuses
            return "", start
        return "{" + argument[1] + "}", argument.end()
    opening = re.compile(r"\s*\{").match(text, start)
    if opening is None:
        return "", start
    depth, position = 1, opening.end()
    while depth and position < len(text):
        depth += {"{": 1, "}": -1}.get(text[position], 0) if text[position - 1] != "\\" else 0
        position += 1
    return "{" + add_braces(text[opening.end() : position - 1]) + "}" if not depth else text[start:position], position
