"""Sums for a pretrained chat model: two-digit numbers, added and subtracted line by line, with a verifier.

A problem is a chat message, `47+35-18`. A solution has one line a step, and the last one ends with the answer:

    47+35=82
    82-18=64

SmolLM2's tokenizer takes a digit as a token, so a line is a reasoning step of 8 to 11 tokens.
"""

import random
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from problems import draw_split


SYSTEM_PROMPT = "You calculate step by step."
NUM_TERMS = 3
SMALLEST, LARGEST = 10, 99
MAX_SOLUTION_TOKENS = 12 * (NUM_TERMS - 1)  # "199+99=298\n", and what is rare

# A sign and a number, e.g. ("-", 18).
Term = tuple[str, int]


def sample_problems(rng: random.Random, held_out: bool) -> Iterator[tuple[int, list[Term]]]:
    """Distinct problems of one split (see `draw_split`): a first number, and what is added; no result is below 0."""

    def draw() -> tuple[int, list[Term]]:
        first = value = rng.randint(SMALLEST, LARGEST)
        terms: list[Term] = []
        for _ in range(NUM_TERMS - 1):
            number = rng.randint(SMALLEST, LARGEST)
            sign = "-" if number <= value and rng.random() < 0.5 else "+"
            value += number if sign == "+" else -number
            terms.append((sign, number))
        return first, terms

    return draw_split(draw, lambda problem: format_problem(*problem), held_out, "sums")


def format_problem(first: int, terms: list[Term]) -> str:
    """The problem as it stands in the message."""
    return str(first) + "".join(f"{sign}{number}" for sign, number in terms)


def solve(first: int, terms: list[Term]) -> tuple[str, int]:
    """The written-out solution and its answer."""
    lines, value = [], first
    for sign, number in terms:
        result = value + number if sign == "+" else value - number
        lines.append(f"{value}{sign}{number}={result}")
        value = result
    return "\n".join(lines), value


def make_dataset(num_problems: int, seed: int, held_out: bool = False) -> Dataset:
    """Problems for RL or evaluation, with the columns `prompt` (chat messages), `answer` and `solution`."""
    problems = sample_problems(random.Random(seed), held_out)
    rows: dict[str, list[Any]] = {"prompt": [], "answer": [], "solution": []}
    for _ in range(num_problems):
        first, terms = next(problems)
        solution, answer = solve(first, terms)
        messages = [("system", SYSTEM_PROMPT), ("user", format_problem(first, terms))]
        rows["prompt"].append([{"role": role, "content": content} for role, content in messages])
        rows["answer"].append(str(answer))
        rows["solution"].append(solution)
    return Dataset.from_dict(rows)


def make_demonstrations(num_problems: int, seed: int) -> Dataset:
    """Problems of the training split with worked-out solutions, in TRL's columns `prompt` and `completion`."""
    dataset = make_dataset(num_problems, seed)
    return dataset.map(
        lambda row: {"completion": [{"role": "assistant", "content": row["solution"]}]},
        remove_columns=["answer", "solution"],
    )


def correctness_reward(completions: list[list[dict[str, str]]], answer: list[str], **kwargs) -> list[float]:
    """TRL reward function: 1.0 if the text ends with `=` and the right answer, else 0.0."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(text.rpartition("=")[2] == gold) for text, gold in zip(texts, answer, strict=True)]
