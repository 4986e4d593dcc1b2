"""A small but real multi-step task: chains of arithmetic modulo 100, worked out line by line, with a verifier.

A problem is `3*9-5+6?` (evaluated from left to right, every result modulo 100). Its solution has one line a step and
then the answer:

    3*9=27
    27-5=22
    22+6=28
    #28

One character is one token, so a line is a reasoning step of 6 to 8 tokens. The quickstart's problems have 2 to 4
operations and solutions of at most `MAX_SOLUTION_TOKENS`; other lengths are for comparisons, and so are prompts that
begin with worked examples, which make them several times as long as a solution.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset
from problems import draw_split


MODULUS = 100
MIN_OPERATIONS, MAX_OPERATIONS = 2, 4
CHARACTERS = "0123456789+-*=#?\n"
BASE_MODEL_DIR = Path(__file__).parent / "base_model"


def max_solution_tokens(max_operations: int) -> int:
    """Tokens of the longest solution, EOS included."""
    return max_operations * len("93*9=37\n") + len("#37") + 1


MAX_SOLUTION_TOKENS = max_solution_tokens(MAX_OPERATIONS)

# An operation and its right-hand number, e.g. ("*", 9).
Operation = tuple[str, int]


def apply_operation(value: int, operation: Operation) -> int:
    """`value` after one operation, modulo 100 (so 3-5 is 98)."""
    symbol, number = operation
    if symbol == "+":
        return (value + number) % MODULUS
    if symbol == "-":
        return (value - number) % MODULUS
    if symbol == "*":
        return (value * number) % MODULUS
    raise ValueError(f"unknown operation {symbol!r}; use one of '+', '-', '*'")


def format_prompt(start: int, operations: list[Operation]) -> str:
    """The problem as the model sees it."""
    return str(start) + "".join(f"{symbol}{number}" for symbol, number in operations) + "?\n"


def solve(start: int, operations: list[Operation], rng: random.Random, error_rate: float = 0.0) -> tuple[str, int]:
    """The written-out solution and its answer.

    With an `error_rate`, that share of the lines gets a random result, and the lines below go on from it: the kind of
    slip a verifier can punish.
    """
    lines, value = [], start
    for operation in operations:
        result = apply_operation(value, operation)
        if rng.random() < error_rate:
            result = rng.randrange(MODULUS)
        lines.append(f"{value}{operation[0]}{operation[1]}={result}\n")
        value = result
    return "".join(lines) + f"#{value}", value


def sample_problems(
    rng: random.Random, held_out: bool, num_operations: tuple[int, int] = (MIN_OPERATIONS, MAX_OPERATIONS)
) -> Iterator[tuple[int, list[Operation]]]:
    """Distinct problems of one split (see `draw_split`), with a number of operations in that range."""

    def draw() -> tuple[int, list[Operation]]:
        start = rng.randrange(MODULUS)
        operations: list[Operation] = []
        for _ in range(rng.randint(*num_operations)):
            symbol = rng.choice("+-*")
            operations.append((symbol, rng.randint(2 if symbol == "*" else 1, 9)))
        return start, operations

    name = f"chains of {num_operations[0]} to {num_operations[1]} operations"
    return draw_split(draw, lambda problem: format_prompt(*problem), held_out, name)


def make_dataset(
    num_problems: int,
    seed: int,
    held_out: bool = False,
    num_operations: tuple[int, int] = (MIN_OPERATIONS, MAX_OPERATIONS),
    num_examples: int = 0,
) -> Dataset:
    """Problems for RL or evaluation, with the columns `prompt` and `answer`; `num_examples` solved ones come first."""
    rng = random.Random(seed)
    problems = sample_problems(rng, held_out, num_operations)
    rows: dict[str, list[str]] = {"prompt": [], "answer": []}
    for _ in range(num_problems):
        start, operations = next(problems)
        examples = worked_examples(rng, num_examples, num_operations)
        rows["prompt"].append(examples + format_prompt(start, operations))
        rows["answer"].append(str(solve(start, operations, rng)[1]))
    return Dataset.from_dict(rows)


def worked_examples(rng: random.Random, count: int, num_operations: tuple[int, int]) -> str:
    """Problems of the training split with their solutions."""
    problems = sample_problems(rng, False, num_operations)
    examples = [next(problems) for _ in range(count)]
    return "".join(f"{format_prompt(*example)}{solve(*example, rng)[0]}\n" for example in examples)


def make_demonstrations(
    error_rates: list[float],
    seed: int,
    num_operations: tuple[int, int] = (MIN_OPERATIONS, MAX_OPERATIONS),
    num_examples: int = 0,
) -> Dataset:
    """Problems with written-out solutions for supervised training, one row an error rate, in this order.

    The columns are TRL's `prompt` and `completion`; the problems are from the training split.
    """
    rng = random.Random(seed)
    problems = sample_problems(rng, False, num_operations)
    rows: dict[str, list[str]] = {"prompt": [], "completion": []}
    for error_rate in error_rates:
        start, operations = next(problems)
        examples = worked_examples(rng, num_examples, num_operations)
        rows["prompt"].append(examples + format_prompt(start, operations))
        rows["completion"].append(solve(start, operations, rng, error_rate)[0])
    return Dataset.from_dict(rows)


def correctness_reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """TRL reward function: 1.0 if the text ends with the right `#answer`, else 0.0."""
    return [float(text.split("\n")[-1] == f"#{gold}") for text, gold in zip(completions, answer, strict=True)]


def right_lines_reward(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """TRL reward function, graded: the share of the problem's operations whose line is right.

    A line is right if it goes on from the result above it, applies the problem's operation and has the right result
    for that. So a slip costs one line, not all below it.
    """
    return [_share_of_right_lines(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def _share_of_right_lines(prompt: str, text: str) -> float:
    value, operations = parse_prompt(prompt)
    lines, right = text.split("\n"), 0
    for operation, line in zip(operations, lines, strict=False):
        right += line == f"{value}{operation[0]}{operation[1]}={apply_operation(value, operation)}"
        result = line.rpartition("=")[2]
        if not result.isdecimal() or int(result) >= MODULUS:
            break  # nothing to go on from
        value = int(result)
    return right / len(operations)


def parse_prompt(prompt: str) -> tuple[int, list[Operation]]:
    """Start and operations of a problem, as [`format_prompt`] wrote it."""
    start, *rest = re.findall(r"(^|[-+*])(\d+)", prompt)
    return int(start[1]), [(symbol, int(number)) for symbol, number in rest]
