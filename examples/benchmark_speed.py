# /// script
# dependencies = [
#     "treerpo-trl",
# ]
# ///
"""Benchmark: sampling a tree against sampling as many flat completions, and what our own Python costs of a step.

    python examples/benchmark_speed.py --shapes 2x2x2x2 4x4x4

Everything is timed interleaved in one process, on one random model, with end-of-sequence suppressed so that every
completion has its full length. The last line printed is JSON.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


VOCABULARY_SIZE = 512
PAD_TOKEN_ID, EOS_TOKEN_ID = 0, 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["2x2x2x2", "4x4x4"], help="branching factors, by depth")
    parser.add_argument("--segment_length", type=int, default=64, help="tokens of a segment")
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--num_prompts", type=int, default=1, help="prompts sampled at a time")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of each measurement")
    parser.add_argument("--hidden_size", type=int, default=256, help="width of the random Qwen2")
    parser.add_argument("--num_layers", type=int, default=6, help="layers of the random Qwen2")
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a number: the benchmark needs lengths, not language."""
    vocabulary = {"<pad>": PAD_TOKEN_ID, "<eos>": EOS_TOKEN_ID}
    vocabulary |= {str(index): index for index in range(2, VOCABULARY_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(args: argparse.Namespace) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=args.hidden_size,
        intermediate_size=11 * args.hidden_size // 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=max(1, args.hidden_size // 64),
        num_key_value_heads=max(1, args.hidden_size // 128),
        max_position_embeddings=8192,
        pad_token_id=PAD_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def make_trainers(args: argparse.Namespace, branching: list[int], output_dir: str):
    """A GRPOTrainer and a TreeRPOTrainer that draw equally many completions of equal length."""
    leaves = math.prod(branching)
    common = {
        "output_dir": output_dir,
        "per_device_train_batch_size": leaves * args.num_prompts,
        "generation_kwargs": {"suppress_tokens": [EOS_TOKEN_ID]},
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "max_steps": args.repeats,
    }
    tree_args = TreeRPOConfig(**common, branching_factor=branching, segment_length=args.segment_length)
    flat_args = GRPOConfig(
        **common, num_generations=leaves, max_completion_length=len(branching) * args.segment_length
    )
    rows = [" ".join(str(2 + (7 * i + j) % 500) for j in range(args.prompt_length)) for i in range(64)]
    data = {"train_dataset": Dataset.from_dict({"prompt": rows}), "processing_class": make_tokenizer()}
    flat = GRPOTrainer(make_model(args), parity_reward, flat_args, **data)
    tree = TreeRPOTrainer(make_model(args), parity_reward, tree_args, **data)
    return flat, tree


def parity_reward(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def time_sampling(trainer, args: argparse.Namespace) -> float:
    """Seconds of one round of sampling, from token ids to token ids."""
    prompts = [[2 + (5 * i + j) % 500 for j in range(args.prompt_length)] for i in range(args.num_prompts)]
    prompt_ids = [prompt for prompt in prompts for _ in range(trainer.num_generations)]
    trainer.model.train()
    start = time.perf_counter()
    trainer._generate_single_turn(prompt_ids, None, {}, trainer.num_generations)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def own_share(trainer) -> float:
    """Share of the time of training steps that is spent on trees, credit and rows.

    What our overrides take, less what they call of upstream: `generate`, the reward functions and GRPOTrainer's own
    methods. The copies of forked caches count as ours.
    """
    seconds: dict[str, float] = defaultdict(float)
    ours = ["_generate_single_turn", "_calculate_rewards", "_generate_and_score_completions", "_prepare_inputs"]
    theirs = ["_calculate_rewards", "_generate_and_score_completions", "_prepare_inputs"]
    with (
        timed(TreeRPOTrainer, ours, seconds, "ours"),
        timed(GRPOTrainer, theirs, seconds, "theirs"),
        timed(Qwen2ForCausalLM, ["generate"], seconds, "generate"),
    ):
        start = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - start
    own = sum(seconds[f"ours.{name}"] for name in ours) - sum(seconds[f"theirs.{name}"] for name in theirs)
    return (own - seconds["generate.generate"]) / total


@contextmanager
def timed(owner: type, names: list[str], seconds: dict[str, float], label: str):
    """Add up the seconds spent in methods of a class."""
    originals = {name: getattr(owner, name) for name in names}

    def wrap(name):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return originals[name](*args, **kwargs)
            finally:
                seconds[f"{label}.{name}"] += time.perf_counter() - start

        return wrapper

    had = {name: name in vars(owner) for name in names}
    for name in names:
        setattr(owner, name, wrap(name))
    try:
        yield
    finally:
        for name in names:
            if had[name]:
                setattr(owner, name, originals[name])
            else:
                delattr(owner, name)


def describe(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def main() -> None:
    args = parse_arguments()
    table = Table("shape", "flat, s", "tree, s", "tree / flat", "own share of a step", title="Median (range)")
    results: dict[str, dict[str, float]] = {"sampling_ratio": {}, "own_share": {}}
    for shape in args.shapes:
        branching = [int(number) for number in shape.split("x")]
        with tempfile.TemporaryDirectory() as output_dir:
            flat, tree = make_trainers(args, branching, output_dir)
            time_sampling(tree, args), time_sampling(flat, args)  # warm up
            pairs = [
                (time_sampling(flat, args), time_sampling(tree, args))
                for _ in tqdm(range(args.repeats), desc=f"sampling {shape}")
            ]
            share = own_share(tree)
        ratios = [tree_seconds / flat_seconds for flat_seconds, tree_seconds in pairs]
        results["sampling_ratio"][shape] = round(statistics.median(ratios), 3)
        results["own_share"][shape] = round(share, 4)
        flats, trees = zip(*pairs, strict=True)
        table.add_row(shape, describe(list(flats)), describe(list(trees)), describe(ratios), f"{share:.2%}")
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
