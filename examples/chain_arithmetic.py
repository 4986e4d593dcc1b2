"""A small but real multi-step task: chains of arithmetic modulo 100, worked out line by line, with a verifier.

A problem is `3*9-5+6?` (evaluated from left to right, every result modulo 100). Its solution has one line a step and
then the answer:

    3*9=27
    27-5=22
    22+6=28
    #28

One character is one token, so a line is a reasoning step of 6 to 8 tokens, and a solution has at most
`MAX_SOLUTION_TOKENS`.
"""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


MODULUS = 100
MIN_OPERATIONS, MAX_OPERATIONS = 2, 4
CHARACTERS = "0123456789+-*=#?\n"
PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
MAX_SOLUTION_TOKENS = MAX_OPERATIONS * len("93*9=37\n") + len("#37") + 1  # the last one is EOS
BASE_MODEL_DIR = Path(__file__).parent / "base_model"
HELD_OUT_ONE_IN = 8

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


def is_held_out(prompt: str) -> bool:
    """Whether a problem belongs to the held-out split.

    The problem's own text decides, so the two splits cannot meet, whatever their seeds and sizes.
    """
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def sample_problems(rng: random.Random, held_out: bool) -> Iterator[tuple[int, list[Operation]]]:
    """Endless distinct problems of one split."""
    seen: set[str] = set()
    while True:
        start = rng.randrange(MODULUS)
        operations: list[Operation] = []
        for _ in range(rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)):
            symbol = rng.choice("+-*")
            operations.append((symbol, rng.randint(2 if symbol == "*" else 1, 9)))
        prompt = format_prompt(start, operations)
        if prompt not in seen and is_held_out(prompt) == held_out:
            seen.add(prompt)
            yield start, operations


def make_dataset(num_problems: int, seed: int, held_out: bool = False) -> Dataset:
    """Problems for RL or evaluation, with the columns `prompt` and `answer`."""
    rng = random.Random(seed)
    problems = sample_problems(rng, held_out)
    rows: dict[str, list[str]] = {"prompt": [], "answer": []}
    for _ in range(num_problems):
        start, operations = next(problems)
        rows["prompt"].append(format_prompt(start, operations))
        rows["answer"].append(str(solve(start, operations, rng)[1]))
    return Dataset.from_dict(rows)


def make_demonstrations(error_rates: list[float], seed: int) -> Dataset:
    """Problems with written-out solutions for supervised training, one row an error rate, in this order.

    The columns are TRL's `prompt` and `completion`; the problems are from the training split.
    """
    rng = random.Random(seed)
    problems = sample_problems(rng, held_out=False)
    rows: dict[str, list[str]] = {"prompt": [], "completion": []}
    for error_rate in error_rates:
        start, operations = next(problems)
        rows["prompt"].append(format_prompt(start, operations))
        rows["completion"].append(solve(start, operations, rng, error_rate)[0])
    return Dataset.from_dict(rows)


def correctness_reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """TRL reward function: 1.0 if the text ends with the right `#answer`, else 0.0."""
    return [float(text.split("\n")[-1] == f"#{gold}") for text, gold in zip(completions, answer, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. A character outside the vocabulary is an error, never silently lost."""
    vocabulary = {token: index for index, token in enumerate([PAD_TOKEN, EOS_TOKEN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    # "." would not match the newline, and an unmatched character would be glued to the next one.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of about a third of a million parameters.

    Llama, because its config does not name a tokenizer class: `AutoTokenizer` on a folder that says `qwen2` would load
    Qwen2's tokenizer over this one and lose the newline.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
