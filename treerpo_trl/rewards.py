r"""Rewards for MATH-style answers: TRL's `accuracy_reward`, for gold answers and responses in everyday LaTeX.

TRL's reward asks for gold answers inside a formula and for responses with every brace written out. MATH's golds are
bare, and its own solutions write `\frac43` and `\sqrt2`, which TeX reads as `\frac{4}{3}` and `\sqrt{2}`.

`math_accuracy_reward` takes an answer from any formula, `boxed_math_accuracy_reward` from the last `\boxed` only. Both
need math-verify: `pip install "treerpo-trl[math]"`.
"""

import re
from collections.abc import Callable
from typing import Any

from trl.rewards import accuracy_reward


NUM_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "cfrac": 2, "sqrt": 1}
COMMAND = re.compile(r"\\(" + "|".join(NUM_ARGUMENTS) + r")(?![a-zA-Z])")
# What TeX takes as an argument: a command, or a single character that is no delimiter of something else.
ARGUMENT = re.compile(r"\s*(\\[a-zA-Z]+|[^\s\\{}$&^_\]])")
OPTION = re.compile(r"\s*\[[^\[\]]*\]")
BOX = re.compile(r"\\boxed(?![a-zA-Z])")
OPENING_BRACE = re.compile(r"\s*\{")
MARKED_ANSWER = re.compile(r"(?<!\\)(\$|\\\(|\\\[|\\boxed)")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # the first alternative steps over an escaped brace


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


def boxed_math_accuracy_reward(
    completions: list[list[dict[str, str]]],
    solution: list[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""`math_accuracy_reward` of what stands in the completion's last `\boxed`; 0 without one.

    As with TreeRPO's authors, whose prompt asks for a box, only what is in it counts. math-verify alone takes other
    formulas too, and joins neighbouring boxes; but the gold answer of a MATH problem is the last box of its solution.

    Args:
        completions: Chat completions, each a list of one message.
        solution: Gold answers, as for `math_accuracy_reward`. Of a text with boxes the last one is the answer.
        log_extra: Adds columns to the completions table; see `accuracy_reward`.
        **kwargs: The dataset's other columns; not used.
    """
    boxed = [[{**message, "content": last_box(message["content"])} for message in turn] for turn in completions]
    golds = [to_solution(gold) for gold in solution]
    return math_accuracy_reward(boxed, [last_box(gold) or gold for gold in golds], log_extra=log_extra)


def to_solution(answer: Any) -> str:
    """The right answer as math-verify reads it best: LaTeX in `$...$`, unless it has a formula or a box already."""
    if isinstance(answer, list):
        if len(answer) != 1:
            raise ValueError(
                f"dataset_solution_column holds {len(answer)} answers in a row ({answer}), but a completion is "
                "compared with one; keep one answer a row"
            )
        answer = answer[0]
    text = "" if answer is None else str(answer).strip()
    return text if not text or MARKED_ANSWER.search(text) else f"${text}$"


def last_box(text: str) -> str:
    r"""The last `\boxed{...}` of a text, or "" if there is none or the last one does not end.

    As in TeX, `\boxed 5` is a box, with one character. `\fbox` is not one: no prompt asks for it.
    """
    boxes = list(BOX.finditer(text))
    argument = take_argument(text, boxes[-1].end())[0] if boxes else ""
    return "\\boxed" + argument if argument else ""


def add_braces(text: str) -> str:
    r"""Write out the braces of fractions and roots, as TeX reads them: `\frac43` becomes `\frac{4}{3}`."""
    for command in reversed(list(COMMAND.finditer(text))):  # from the right, so that arguments are done already
        pieces, position = [text[: command.end()]], command.end()
        if command[1] == "sqrt" and (option := OPTION.match(text, position)):
            pieces.append(option[0])
            position = option.end()
        for _ in range(NUM_ARGUMENTS[command[1]]):
            argument, position = take_argument(text, position)
            pieces.append(argument)
        text = "".join([*pieces, text[position:]])
    return text


def take_argument(text: str, start: int) -> tuple[str, int]:
    """The argument of a command that begins at `start`, in braces, and where it ends; nothing if there is none."""
    if argument := ARGUMENT.match(text, start):
        if COMMAND.match(argument[1]):  # an argument with arguments of its own, which TeX itself refuses
            return "", start
        return "{" + argument[1] + "}", argument.end()
    if opening := OPENING_BRACE.match(text, start):
        depth = 1
        for brace in BRACE.finditer(text, opening.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                return text[opening.end() - 1 : brace.end()], brace.end()
    return "", start
