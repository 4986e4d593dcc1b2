"""Additions for a pretrained chat model: three numbers up to 20, in words, after one example, with a verifier.

A problem is a chat that has a solved one before it:

    user: Add 3, 14 and 5.
    assistant: 3+14=17, so 17+5=22.
    user: Add 8, 19 and 6.

The last number of the answer counts. SmolLM2-135M-Instruct, as it is, gets 11% of the test problems right at
temperature 1.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from problems import draw_split


SYSTEM_PROMPT = "You add numbers step by step."
LARGEST = 20
EXAMPLE = (3, 14, 5)
MAX_SOLUTION_TOKENS = 24  # the example's form takes 15 to 21, the end included

Numbers = tuple[int, int, int]


def sample_problems(rng: random.Random, held_out: bool) -> Iterator[Numbers]:
    """Problems of one split (see `draw_split`); those to train on may repeat, as there are only 7,000."""

    def draw() -> Numbers:
        return rng.randint(1, LARGEST), rng.randint(1, LARGEST), rng.randint(1, LARGEST)

    return draw_split(draw, format_problem, held_out, "additions", may_repeat=not held_out)


def format_problem(numbers: Numbers) -> str:
    """The problem as it stands in the message."""
    first, second, third = numbers
    return f"Add {first}, {second} and {third}."


def solve(numbers: Numbers) -> str:
    """The written-out solution."""
    first, second, third = numbers
    return f"{first}+{second}={first + second}, so {first + second}+{third}={sum(numbers)}."


def make_dataset(num_problems: int, seed: int, held_out: bool = False) -> Dataset:
    """Problems for RL or evaluation, with the columns `prompt` (chat messages) and `answer`."""
    problems = sample_problems(random.Random(seed), held_out)
    rows: dict[str, list[Any]] = {"prompt": [], "answer": []}
    for _ in range(num_problems):
        numbers = next(problems)
        messages = [
            ("system", SYSTEM_PROMPT),
            ("user", format_problem(EXAMPLE)),
            ("assistant", solve(EXAMPLE)),
            ("user", format_problem(numbers)),
        ]
        rows["prompt"].append([{"role": role, "content": content} for role, content in messages])
        rows["answer"].append(str(sum(numbers)))
    return Dataset.from_dict(rows)


def correctness_reward(completions: list[list[dict[str, str]]], answer: list[str], **kwargs) -> list[float]:
    """TRL reward function: 1.0 if the last number of the text is the answer, else 0.0."""
    numbers = [re.findall(r"\d+", completion[-1]["content"]) for completion in completions]
    return [float(found[-1:] == [gold]) for found, gold in zip(numbers, answer, strict=True)]
