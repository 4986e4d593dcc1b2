# /// script
# dependencies = [
#     "treerpo-trl",
# ]
# ///
"""Benchmark: a training step of TreeRPO against one of GRPO with as many completions of the same length.

    python examples/benchmark_speed.py --shapes 2x2x2x2 4x4x4 8x8

Everything is timed interleaved in one process, on random models, on CUDA if there is one. No group is pruned, so that
every token is trained, and every completion has its full length, unless `--mean_length` lets them end early.

Training is held against three ways to compute the same rows: TRL's dense rows; the rows without padding, packed into
one sequence; and the same with the prompts alone shared. With them stands rho, tokens of the rows by distinct tokens:
what sharing could gain over rows without padding. The last line printed is JSON.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.prefix_sharing import forward, pack_rows


VOCABULARY_SIZE = 512
PAD_TOKEN_ID, EOS_TOKEN_ID = 0, 1
# How the rows of a batch are computed, and the figure that holds it against shared prefixes.
OTHER_WAYS = {"dense": "train_ratio", "rows": "train_ratio_rows", "prompts": "train_ratio_prompts"}
WAYS = [*OTHER_WAYS, "tree"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["2x2x2x2", "4x4x4", "8x8"], help="branching factors, by depth")
    parser.add_argument("--segment_length", type=int, default=64, help="tokens of a segment")
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--num_prompts", type=int, default=1, help="prompts per batch")
    parser.add_argument("--mean_length", type=int, help="mean length, if completions are to end early")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of each measurement")
    parser.add_argument("--hidden_size", type=int, default=256, help="width of the random Qwen2")
    parser.add_argument("--num_layers", type=int, default=6, help="layers of the random Qwen2")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16")
    parser.add_argument("--plot", help="file for a figure of what a leaf costs, by the number of leaves")
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a number: the benchmark needs lengths, not language."""
    vocabulary = {"<pad>": PAD_TOKEN_ID, "<eos>": EOS_TOKEN_ID}
    vocabulary |= {str(index): index for index in range(2, VOCABULARY_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(args: argparse.Namespace) -> Qwen2ForCausalLM:
    """A random Qwen2 of the asked size."""
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


def parity_reward(completion_ids, **kwargs):
    """1 if the sum of the token ids is odd, else 0: it costs nothing and half of all completions get it."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def make_trainers(args: argparse.Namespace, branching: list[int], output_dir: str):
    """A GRPOTrainer and a TreeRPOTrainer that draw equally many completions of equal length, ready for their steps."""
    leaves = math.prod(branching)
    ends = {"suppress_tokens": [EOS_TOKEN_ID]}
    if args.mean_length is not None:
        # A random model's tokens are about equally likely.
        bias = math.log((VOCABULARY_SIZE - 1) / (args.mean_length - 1))
        ends = {"sequence_bias": [[[EOS_TOKEN_ID], bias]]}
    common = {
        "output_dir": output_dir,
        "per_device_train_batch_size": leaves * args.num_prompts,
        "generation_kwargs": ends,
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),  # what transformers wants to be told, for bf16
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    # A single tree has no others to be compared with, which the default would.
    credit = {"advantage_estimator": "treerpo"} if args.num_prompts == 1 else {}
    tree_args = TreeRPOConfig(
        **common,
        **credit,
        branching_factor=branching,
        max_depth=len(branching),
        segment_length=args.segment_length,
        prune_threshold=None,
    )
    flat_args = GRPOConfig(
        **common, num_generations=leaves, max_completion_length=len(branching) * args.segment_length
    )
    prompts = [" ".join(str(2 + (7 * i + j) % 500) for j in range(args.prompt_length)) for i in range(64)]
    data = {"train_dataset": Dataset.from_dict({"prompt": prompts}), "processing_class": make_tokenizer()}
    trainers = (
        GRPOTrainer(make_model(args), parity_reward, flat_args, **data),
        TreeRPOTrainer(make_model(args), parity_reward, tree_args, **data),
    )
    for trainer in trainers:
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.model = trainer.accelerator.prepare_model(trainer.model)  # which has it compute in bf16 if asked to
        trainer.model.train()
    return trainers


def make_batch(trainer, args: argparse.Namespace) -> list[dict[str, str]]:
    """A generation batch as TRL's sampler hands it over: each prompt as often as it has rows."""
    return [trainer.train_dataset[i] for i in range(args.num_prompts) for _ in range(trainer.num_generations)]


def now() -> float:
    """Seconds, read when the kernels before have run."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def timed(owner: type, names: list[str], seconds: dict[str, float]):
    """Add up the seconds spent in methods of a class, under `owner.name`."""
    originals = {name: getattr(owner, name) for name in names}
    is_own = {name: name in vars(owner) for name in names}

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args, **kwargs):
            start = now()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[f"{owner.__name__}.{name}"] += now() - start

        return wrapper

    for name, original in originals.items():
        setattr(owner, name, wrap(name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            if is_own[name]:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


def time_step(trainer, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a whole training step and its phases. `own` is what trees, credit and rows take.

    That is the time of our overrides less what they call of upstream: `generate`, the reward functions and
    GRPOTrainer's own methods. Copies of forked caches count as ours.
    """
    seconds: dict[str, float] = defaultdict(float)
    wrapped = ["_calculate_rewards", "_generate_and_score_completions", "_prepare_inputs"]
    trainer_class = type(trainer)
    with (
        timed(GRPOTrainer, wrapped if trainer_class is not GRPOTrainer else [], seconds),
        timed(trainer_class, ["_generate_single_turn", *wrapped], seconds),
        timed(Qwen2ForCausalLM, ["generate"], seconds),
    ):
        start = now()
        trainer.training_step(trainer.model, make_batch(trainer, args), num_items_in_batch=None)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        total = now() - start
    name = trainer_class.__name__
    sampling, preparing = seconds[f"{name}._generate_single_turn"], seconds[f"{name}._prepare_inputs"]
    own = sampling - seconds["Qwen2ForCausalLM.generate"]
    own += sum(seconds[f"{name}.{method}"] - seconds[f"GRPOTrainer.{method}"] for method in wrapped)
    return {
        "step": total,
        "sampling": sampling,
        "scoring": preparing - sampling,
        "training": total - preparing,
        "own": own / total,
    }


def loss_and_gradient(trainer, batch: dict[str, Any], way: str) -> None:
    """Forward and backward pass of a micro-batch, computed in one of `WAYS`."""
    trainer._prefix_sharing.is_active = way != "dense"
    most_shared = {"rows": 0, "prompts": batch["prompt_ids"].size(1)}.get(way)
    with patch.object(forward, "pack_rows", partial(pack_rows, most_shared=most_shared)):
        trainer.compute_loss(trainer.model, batch).backward()
    trainer.model.zero_grad()
    trainer._prefix_sharing.is_active = True


def time_training(trainer, batch: dict[str, Any], way: str) -> float:
    """Seconds of the forward and the backward pass of a batch."""
    start = now()
    loss_and_gradient(trainer, batch, way)
    return now() - start


def peak_memory(trainer, batch: dict[str, Any], way: str) -> float:
    """Most bytes allocated at a time in the forward and the backward pass, beyond what was there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradient(trainer, batch, way)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_and_gradient(trainer, batch, way)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def count_tokens(batch: dict[str, Any], trees: Sequence[Any]) -> dict[str, int]:
    """Positions that are computed in each way for what the loss needs, and distinct tokens of the batch's trees."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    most_shared = {"rows": 0, "prompts": batch["prompt_ids"].size(1), "tree": None}
    needed = (batch["completion_mask"] * batch["tool_mask"]) > 0
    computed = {
        way: pack_rows(input_ids, mask, needed, most_shared=most).input_ids.numel()
        for way, most in most_shared.items()
    }
    distinct = sum(len(scored.tree.prompt_ids) + scored.tree.num_sampled_tokens for scored in trees)
    return {**computed, "dense": input_ids.numel(), "distinct": distinct}


def measure(args: argparse.Namespace, shape: str) -> dict[str, list[float]]:
    """Repeats of every figure for one shape; the first step of each trainer is a warm-up."""
    branching = [int(number) for number in shape.split("x")]
    figures: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as output_dir:
        flat, tree = make_trainers(args, branching, output_dir)
        time_step(flat, args), time_step(tree, args)
        batch = tree._generate_and_score_completions(make_batch(tree, args))
        tokens = count_tokens(batch, tree.last_trees)
        for way in WAYS:
            time_training(tree, batch, way)
        for _ in tqdm(range(args.repeats), desc=shape):
            steps = {"GRPO": time_step(flat, args), "TreeRPO": time_step(tree, args)}
            for name, seconds in steps.items():
                for phase, value in seconds.items():
                    figures[f"{name} {phase}"].append(value)
            figures["step_ratio"].append(steps["TreeRPO"]["step"] / steps["GRPO"]["step"])
            for name, seconds in steps.items():
                figures[f"{name} leaf"].append(1000 * seconds["step"] / (math.prod(branching) * args.num_prompts))
            figures["sampling_ratio"].append(steps["TreeRPO"]["sampling"] / steps["GRPO"]["sampling"])
            seconds = {way: time_training(tree, batch, way) for way in WAYS}
            for way, name in OTHER_WAYS.items():
                figures[name].append(seconds[way] / seconds["tree"])
        figures["memory_ratio"] = [peak_memory(tree, batch, "tree") / peak_memory(tree, batch, "dense")]
        figures["computed_over_unique"] = [tokens["tree"] / tokens["distinct"]]
        figures["rho"] = [tokens["rows"] / tokens["tree"]]
        figures["share_of_rho"] = [ratio / figures["rho"][0] for ratio in figures["train_ratio_rows"]]
    return figures


def plot_leaves(results: dict[str, dict[str, list[float]]], path: str) -> None:
    """What a leaf of a step costs, with its range, by the number of leaves."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    leaves = [math.prod(map(int, shape.split("x"))) for shape in results]
    for name, color in (("GRPO", "#8a8a8a"), ("TreeRPO", "#1f6f43")):
        values = [figures[f"{name} leaf"] for figures in results.values()]
        axes.plot(leaves, [statistics.median(each) for each in values], "o-", color=color, label=name)
        axes.fill_between(
            leaves, [min(each) for each in values], [max(each) for each in values], color=color, alpha=0.2
        )
    axes.set(xscale="log", ylim=(0, None), xlabel="leaves of a tree, or completions of a prompt", ylabel="ms a leaf")
    axes.set_xticks(leaves, [f"{number}\n{shape}" for number, shape in zip(leaves, results, strict=True)])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Time each shape and print a table."""
    args = parse_arguments()
    rows = {
        "GRPO sampling": "GRPO: sampling, s",
        "GRPO scoring": "scoring, s",
        "GRPO training": "training, s",
        "GRPO step": "whole step, s",
        "TreeRPO sampling": "TreeRPO: sampling, s",
        "TreeRPO scoring": "scoring, s",
        "TreeRPO training": "training, s",
        "TreeRPO step": "whole step, s",
        "GRPO leaf": "GRPO: a leaf of a step, ms",
        "TreeRPO leaf": "TreeRPO: a leaf of a step, ms",
        "TreeRPO own": "share of trees, credit and rows",
        "sampling_ratio": "sampling, TreeRPO / GRPO",
        "step_ratio": "whole step, TreeRPO / GRPO",
        "train_ratio": "training, dense / shared",
        "train_ratio_rows": "rows without padding / shared",
        "train_ratio_prompts": "shared prompts / shared",
        "rho": "rho: tokens of rows / distinct tokens",
        "share_of_rho": "share of rho that is reached",
        "memory_ratio": "peak memory, shared / dense rows",
        "computed_over_unique": "tokens computed / distinct tokens",
    }
    results = {shape: measure(args, shape) for shape in args.shapes}
    table = Table("median (range)", *args.shapes)
    for figure, title in rows.items():
        cells = [
            f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"
            if len(values := results[shape][figure]) > 1
            else f"{values[0]:.3f}"
            for shape in args.shapes
        ]
        table.add_row(title, *cells)
    Console(width=120).print(table)
    summary = [
        "train_ratio",
        "train_ratio_rows",
        "train_ratio_prompts",
        "rho",
        "share_of_rho",
        "computed_over_unique",
        "memory_ratio",
        "step_ratio",
        "sampling_ratio",
        "GRPO leaf",
        "TreeRPO leaf",
        "TreeRPO own",
    ]
    medians = {
        figure: {shape: round(statistics.median(results[shape][figure]), 4) for shape in args.shapes}
        for figure in summary
    }
    medians["own_share"] = medians.pop("TreeRPO own")
    if args.plot:
        plot_leaves(results, args.plot)
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
