"""A second small task: count down to 0 with given numbers, by routes of any length, with a verifier.

A problem is `65:4,9,17` (from 65; 4, 9 and 17 may be subtracted or added, each as often as wanted, without leaving
0..99). A solution has one line a step and ends with the line that reaches 0:

    65-17=48
    48-17=31
    31-9=22
    22+4=26
    26-17=9
    9-9=0

Every problem has many correct routes of different lengths, so responses can become shorter without becoming wrong. One
character is one token, a line is a reasoning step of 6 to 9 tokens, and a solution has at most `MAX_SOLUTION_TOKENS`.
"""

import random
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from datasets import Dataset
from problems import draw_split


LARGEST_VALUE = 99
MIN_DISTANCE, MAX_DISTANCE = 2, 5  # steps of a shortest route
MAX_STEPS = 8
CHARACTERS = "0123456789+-=:,\n"
MAX_SOLUTION_TOKENS = MAX_STEPS * len("99-25=74\n")  # in the place of the last newline there is EOS
LINE = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


@dataclass(frozen=True)
class Problem:
    """From `start` to 0 by subtracting and adding `numbers`."""

    start: int
    numbers: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The problem as the model sees it."""
        return f"{self.start}:{','.join(map(str, self.numbers))}\n"

    @classmethod
    def parse(cls, prompt: str) -> "Problem":
        """The problem of a prompt."""
        start, *numbers = map(int, re.findall(r"\d+", prompt))
        return cls(start, tuple(numbers))


def moves(value: int, numbers: tuple[int, ...]) -> list[int]:
    """The signed numbers that may be added to `value` without leaving 0..99."""
    return [step for number in numbers for step in (-number, number) if 0 <= value + step <= LARGEST_VALUE]


@lru_cache(maxsize=4096)
def distances(numbers: tuple[int, ...]) -> dict[int, int]:
    """Steps of a shortest route to 0, from every value that has one."""
    found, frontier = {0: 0}, deque([0])
    while frontier:
        value = frontier.popleft()
        for step in moves(value, numbers):  # a step can be taken back, so routes from 0 are routes to it
            if value + step not in found:
                found[value + step] = found[value] + 1
                frontier.append(value + step)
    return found


def solve(problem: Problem, rng: random.Random, detour_rate: float, error_rate: float = 0.0) -> str:
    """A route with that share of random steps among the shortest ones, in at most `MAX_STEPS` lines.

    With an `error_rate`, that share of the lines gets a random result, and the route goes on from it.
    """
    distance = distances(problem.numbers)
    value, lines = problem.start, []
    while value != 0 and len(lines) < MAX_STEPS:
        remaining = MAX_STEPS - len(lines)
        steps = moves(value, problem.numbers)
        if rng.random() >= detour_rate:
            steps = [step for step in steps if distance.get(value + step, MAX_STEPS) < distance.get(value, MAX_STEPS)]
        in_time = [step for step in steps if distance.get(value + step, MAX_STEPS) < remaining]
        step = rng.choice(in_time or steps or moves(value, problem.numbers))
        result = value + step
        if rng.random() < error_rate:
            result = rng.randrange(LARGEST_VALUE + 1)
        lines.append(f"{value}{step:+d}={result}")
        value = result
    return "\n".join(lines)


def is_route(problem: Problem, text: str) -> bool:
    """Whether every line of the text is a right step from the one before, and the last reaches 0."""
    value = problem.start
    for line in text.split("\n"):
        match = LINE.fullmatch(line)
        if match is None:
            return False
        left, number, result = int(match[1]), int(match[3]), int(match[4])
        step = number if match[2] == "+" else -number
        if left != value or number not in problem.numbers or result != left + step or result > LARGEST_VALUE:
            return False
        value = result
    return value == 0


def sample_problems(rng: random.Random, held_out: bool) -> Iterator[Problem]:
    """Problems of one split (see `draw_split`): endless ones to train on; of those held out none comes twice."""

    def draw() -> Problem | None:
        small = rng.sample(range(1, 10), 2)
        problem = Problem(rng.randint(1, LARGEST_VALUE), tuple(sorted([*small, rng.randint(10, 25)])))
        distance = distances(problem.numbers).get(problem.start, 0)
        return problem if MIN_DISTANCE <= distance <= MAX_DISTANCE else None

    return draw_split(draw, lambda problem: problem.prompt, held_out, "countdown", may_repeat=not held_out)


def make_dataset(num_problems: int, seed: int, held_out: bool = False) -> Dataset:
    """Problems for RL or evaluation, with the column `prompt`: it holds all the verifier needs."""
    problems = sample_problems(random.Random(seed), held_out)
    return Dataset.from_dict({"prompt": [next(problems).prompt for _ in range(num_problems)]})


def make_demonstrations(error_rates: list[float], seed: int, detour_rate: float = 0.3) -> Dataset:
    """Problems with routes for supervised training, one row an error rate, in this order.

    The columns are TRL's `prompt` and `completion`; the problems are from the training split.
    """
    rng = random.Random(seed)
    problems = sample_problems(rng, held_out=False)
    rows: dict[str, list[str]] = {"prompt": [], "completion": []}
    for error_rate in error_rates:
        problem = next(problems)
        rows["prompt"].append(problem.prompt)
        rows["completion"].append(solve(problem, rng, detour_rate, error_rate))
    return Dataset.from_dict(rows)


def correctness_reward(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """TRL reward function: 1.0 if the text is a route from the start to 0, else 0.0."""
    return [float(is_route(Problem.parse(prompt), text)) for prompt, text in zip(prompts, completions, strict=True)]
