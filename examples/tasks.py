"""The built-in tasks by name: their problems, their verifiers, and the small base models that training starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import additions
import chain_arithmetic
import countdown
import sums
from datasets import Dataset


@dataclass(frozen=True)
class BaseModel:
    """How a base model is made: by supervised training, first on clean solutions and then on some with slips.

    So it is limited by noise, which a verifier's reward can sharpen away, and not by knowledge.

    Args:
        characters: Its vocabulary.
        make_demonstrations: (error rates, seed) -> one solution an error rate.
        clean_steps, noisy_steps: Training steps of either kind.
        error_rate: Share of the lines with a slip in the second.
        context_length: Most tokens of prompt and solution.
        shipped: The folder it is in, if it comes with the examples.
        start_from: Name of a shipped base model to go on from; without it, training starts from nothing.
    """

    characters: str
    make_demonstrations: Callable[[list[float], int], Dataset]
    clean_steps: int
    noisy_steps: int
    error_rate: float
    context_length: int = 128
    shipped: Path | None = None
    start_from: str | None = None


@dataclass(frozen=True)
class Task:
    """Problems with a verifier.

    Args:
        base: Name of its base model, in `BASE_MODELS`, or a pretrained one of `compare_workload`.
        make_dataset: (number of problems, seed, whether from the held-out split) -> problems.
        reward_func: TRL reward function, 1.0 or 0.0; of graded tasks anything between.
        max_solution_tokens: Tokens of the longest solution, EOS included.
    """

    base: str
    make_dataset: Callable[[int, int, bool], Dataset]
    reward_func: Callable[..., list[float]]
    max_solution_tokens: int


def _chains(
    min_operations: int,
    max_operations: int,
    reward_func: Callable[..., list[float]] = chain_arithmetic.correctness_reward,
    base: str = "long_chains",
) -> Task:
    return Task(
        base=base,
        make_dataset=partial(chain_arithmetic.make_dataset, num_operations=(min_operations, max_operations)),
        reward_func=reward_func,
        max_solution_tokens=chain_arithmetic.max_solution_tokens(max_operations),
    )


NUM_EXAMPLES = 4  # of the prompts of `few_shot_chains`, which have 157 tokens on average; a solution has 27

BASE_MODELS = {
    "chain_arithmetic": BaseModel(
        characters=chain_arithmetic.CHARACTERS,
        make_demonstrations=chain_arithmetic.make_demonstrations,
        clean_steps=1000,
        noisy_steps=600,
        error_rate=0.18,
        shipped=chain_arithmetic.BASE_MODEL_DIR,
    ),
    "countdown": BaseModel(
        characters=countdown.CHARACTERS,
        make_demonstrations=countdown.make_demonstrations,
        clean_steps=2000,
        noisy_steps=500,
        error_rate=0.1,
    ),
    "long_chains": BaseModel(
        characters=chain_arithmetic.CHARACTERS,
        make_demonstrations=partial(chain_arithmetic.make_demonstrations, num_operations=(2, 8)),
        clean_steps=1500,
        noisy_steps=500,
        error_rate=0.18,
    ),
    "noisy_chains": BaseModel(
        characters=chain_arithmetic.CHARACTERS,
        make_demonstrations=partial(chain_arithmetic.make_demonstrations, num_operations=(2, 8)),
        clean_steps=1500,
        noisy_steps=500,
        error_rate=0.5,
    ),
    "few_shot_chains": BaseModel(
        characters=chain_arithmetic.CHARACTERS,
        make_demonstrations=partial(chain_arithmetic.make_demonstrations, num_examples=NUM_EXAMPLES),
        clean_steps=0,
        noisy_steps=400,
        error_rate=0.18,
        context_length=256,
        start_from="chain_arithmetic",
    ),
}

TASKS = {
    "chain_arithmetic": Task(
        base="chain_arithmetic",
        make_dataset=chain_arithmetic.make_dataset,
        reward_func=chain_arithmetic.correctness_reward,
        max_solution_tokens=chain_arithmetic.MAX_SOLUTION_TOKENS,
    ),
    "countdown": Task(
        base="countdown",
        make_dataset=countdown.make_dataset,
        reward_func=countdown.correctness_reward,
        max_solution_tokens=countdown.MAX_SOLUTION_TOKENS,
    ),
    "chains_of_2": _chains(2, 2),
    "chains_of_4": _chains(4, 4),
    "chains_of_8": _chains(8, 8),
    "graded_chains_of_8": _chains(8, 8, chain_arithmetic.right_lines_reward),
    "noisy_graded_chains": _chains(8, 8, chain_arithmetic.right_lines_reward, base="noisy_chains"),
    "additions": Task(
        base="smollm2",
        make_dataset=additions.make_dataset,
        reward_func=additions.correctness_reward,
        max_solution_tokens=additions.MAX_SOLUTION_TOKENS,
    ),
    "sums": Task(
        base="smollm2_sums",
        make_dataset=sums.make_dataset,
        reward_func=sums.correctness_reward,
        max_solution_tokens=sums.MAX_SOLUTION_TOKENS,
    ),
    "few_shot_chains": Task(
        base="few_shot_chains",
        make_dataset=partial(chain_arithmetic.make_dataset, num_examples=NUM_EXAMPLES),
        reward_func=chain_arithmetic.correctness_reward,
        max_solution_tokens=chain_arithmetic.MAX_SOLUTION_TOKENS,
    ),
}
