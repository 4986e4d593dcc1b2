"""What trees cost before anything is trained: `python -m treerpo_trl.plan --branching_factor 4 4 --num_prompts 16`.

It prints the leaves, tokens and memory of a step, and its arithmetic relative to a step of GRPO with as many
completions of the same length. All numbers are derived, for responses of full length: nothing is run, and of a model
only the configuration is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from .checks.tree_shape import derive_tree
from .growth import ForkShape, TreeShape, shape_of
from .growth.memory import most_cached_tokens
from .treerpo_config import TreeRPOConfig


TRAINING = 3  # times the arithmetic of a forward pass: that, and twice as much backward
CACHE_BYTES = 2  # of a number in bf16
# Bytes of a parameter with AdamW in mixed precision: what each GPU holds whole, and what GPUs divide among them.
ENGINES = {
    "multi_gpu (DDP)": (20, 0),
    "deepspeed_zero1": (4, 12),
    "deepspeed_zero2": (2, 14),
    "deepspeed_zero3, fsdp2": (0, 16),
}
ONE_GPU = {"single_gpu": (16, 0)}


@dataclass(frozen=True)
class StepCost:
    """Tokens of a training step, if every response has its full length.

    Args:
        sampled: Tokens that are drawn.
        prefilled: Tokens of prompts that are read before the first is drawn.
        trained: Tokens of the forward and backward pass.
    """

    sampled: int
    prefilled: int
    trained: int

    @property
    def arithmetic(self) -> int:
        """In forward passes of one token."""
        return self.sampled + self.prefilled + TRAINING * self.trained


def tree_cost(shape: ForkShape | TreeShape, num_prompts: int, prompt_length: int) -> StepCost:
    """A step of TreeRPO: each segment is drawn once and trained once, and so is each prompt.

    Forks are taken to be in the middle of their trunk, where they are on average if every position is as surprising.
    """
    if isinstance(shape, ForkShape):
        forks = shape.num_leaves - shape.num_trunks
        sampled = shape.num_trunks * shape.max_completion_length + forks * shape.max_completion_length // 2
    else:
        sampled, nodes, length = 0, 1, 0
        for factor in shape.branching:
            nodes *= factor
            segment = min(shape.segment_length, shape.max_completion_length - length)
            sampled, length = sampled + nodes * segment, length + segment
    return StepCost(num_prompts * sampled, num_prompts * prompt_length, num_prompts * (prompt_length + sampled))


def flat_cost(shape: ForkShape | TreeShape, num_prompts: int, prompt_length: int) -> StepCost:
    """A step of GRPO with as many completions: each row has its own prompt and its own response."""
    rows, length = num_prompts * shape.num_leaves, shape.max_completion_length
    return StepCost(rows * length, rows * prompt_length, rows * (prompt_length + length))


@dataclass(frozen=True)
class ModelSize:
    """What memory follows from.

    Args:
        num_parameters: All of them.
        cache_bytes: Of the keys and values of one token, in bf16.
    """

    num_parameters: int
    cache_bytes: int

    @classmethod
    def of(cls, name: str) -> ModelSize:
        """Of a model's configuration; no weight is read or made.

        Args:
            name: Folder, or id on the Hub.
        """
        if Path(name).parent.is_dir() and str(Path(name).parent) != "." and not Path(name).exists():
            raise ValueError(f"there is no folder {name}, and it names no model of the Hub")
        config: Any = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(model.num_parameters(), 2 * CACHE_BYTES * text.num_hidden_layers * heads * size)


def training_bytes(num_parameters: int, num_gpus: int) -> dict[str, int]:
    """Bytes a GPU of weights, gradients and AdamW's moments, by configuration in `accelerate_configs/`."""
    engines = ENGINES if num_gpus > 1 else ONE_GPU
    return {
        name: num_parameters * (whole * num_gpus + shared) // num_gpus for name, (whole, shared) in engines.items()
    }


def cache_bytes(
    shape: ForkShape | TreeShape, trees_per_gpu: int, args: argparse.Namespace, model: ModelSize
) -> tuple[int, int]:
    """Most bytes of keys and values while a GPU samples: of trees, and of GRPO's rows."""
    rows = trees_per_gpu * shape.num_leaves * (args.prompt_length + shape.max_completion_length)
    if isinstance(shape, TreeShape):
        tree = most_cached_tokens(shape, trees_per_gpu, args.prompt_length, args.max_frontier_rows)
    else:
        width = min(args.max_frontier_rows, trees_per_gpu * shape.num_leaves)
        tree = shape.num_waves * width * (args.prompt_length + shape.max_completion_length)
    return tree * model.cache_bytes, rows * model.cache_bytes


# What `TreeRPOConfig` derives a tree from, as far as it is asked for here.
TREE_OPTIONS = (
    "branching_factor",
    "max_depth",
    "segment_length",
    "max_completion_length",
    "num_trunks",
    "forks_per_trunk",
    "continuations_per_fork",
    "fork_rounds",
)


def make_shape(args: argparse.Namespace) -> ForkShape | TreeShape:
    """The shape of the trees that `TreeRPOConfig` would grow with these options.

    Raises:
        TypeError: A number is no whole number.
        ValueError: No tree can have that shape; or a number is below 1.
    """
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    given = {name: getattr(args, name) for name in TREE_OPTIONS if getattr(args, name) is not None}
    options: tuple[Any, ...] = fields(TreeRPOConfig)
    defaults = {
        option.name: option.default_factory() if option.default is MISSING else option.default
        for option in options
        if option.default is not MISSING or option.default_factory is not MISSING
    }
    forks = [name for name in given if name in TREE_OPTIONS[4:]]
    if args.split_rule == "uncertainty":
        forks.insert(0, "split_rule='uncertainty'")
    elif args.split_rule and forks:
        raise ValueError(f"{forks[0]} is for responses that fork; leave it out, or split_rule='{args.split_rule}'")
    if forks and (branching := [name for name in TREE_OPTIONS[:3] if name in given]):
        raise ValueError(f"{branching[0]} is for trees, and {forks[0]} for responses that fork; give one of them")
    config = SimpleNamespace(**{**defaults, "split_rule": "uncertainty" if forks else "length", **given})
    derive_tree(config)
    shape = shape_of(config)
    assert isinstance(shape, ForkShape | TreeShape)
    return shape


def report(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(what, TreeRPO's, GRPO's) lines.

    Raises:
        ValueError: As [`make_shape`]; or the prompts cannot be divided among the GPUs.
    """
    shape = make_shape(args)
    if args.num_prompts % args.num_gpus:
        raise ValueError(
            f"num_prompts {args.num_prompts} cannot be divided among {args.num_gpus} GPUs, and a whole tree is grown "
            f"by one of them; use a multiple of {args.num_gpus}"
        )
    trees_per_gpu = args.num_prompts // args.num_gpus
    tree, flat = (cost(shape, args.num_prompts, args.prompt_length) for cost in (tree_cost, flat_cost))
    rows = trees_per_gpu * shape.num_leaves
    lines = [
        ("leaves of a tree; completions of a prompt", f"{shape.num_leaves}", f"{shape.num_leaves}"),
        ("longest response, tokens", f"{shape.max_completion_length}", f"{shape.max_completion_length}"),
        ("completions of a step", f"{rows * args.num_gpus}", f"{rows * args.num_gpus}"),
        ("per_device_train_batch_size * steps_per_generation", f"{rows}", f"{rows}"),
        *((name, f"{getattr(tree, field):,}", f"{getattr(flat, field):,}") for name, field in TOKENS.items()),
        ("arithmetic of sampling, against GRPO", f"{_ratio(tree, flat, 1, 0):.2f}", "1"),
        ("arithmetic of training, against GRPO", f"{_ratio(tree, flat, 0, 1):.2f}", "1"),
        ("arithmetic of the step, against GRPO", f"{tree.arithmetic / flat.arithmetic:.2f}", "1"),
    ]
    if args.model is not None:
        model = ModelSize.of(args.model)
        of_trees, of_rows = cache_bytes(shape, trees_per_gpu, args, model)
        lines.append(("parameters", f"{model.num_parameters:,}", f"{model.num_parameters:,}"))
        lines.append(("keys and values while sampling, a GPU", _size(of_trees), _size(of_rows)))
        for engine, size in training_bytes(model.num_parameters, args.num_gpus).items():
            lines.append((f"weights, gradients, AdamW with {engine}, a GPU", _size(size), _size(size)))
    return lines


TOKENS = {"tokens sampled": "sampled", "tokens of prompts read": "prefilled", "tokens trained": "trained"}


def _ratio(tree: StepCost, flat: StepCost, sampling: int, training: int) -> float:
    tokens = [sampling * (cost.sampled + cost.prefilled) + training * cost.trained for cost in (tree, flat)]
    return tokens[0] / tokens[1]


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m treerpo_trl.plan",
        description="Print what a step with trees costs, beside GRPO's with as many completions of the same length.",
    )
    own = {field.name: field.metadata["help"] for field in fields(TreeRPOConfig) if field.name in TREE_OPTIONS}
    parser.add_argument(
        "--split_rule", choices=("length", "uncertainty"), help="where trees branch; follows from what else is given"
    )
    for name in TREE_OPTIONS:
        parser.add_argument(f"--{name}", type=int, nargs="+" if name == "branching_factor" else None, help=own[name])
    parser.add_argument(
        "--num_prompts", type=int, default=8, help="prompts per step, on all GPUs (default: %(default)s)"
    )
    parser.add_argument("--prompt_length", type=int, default=256, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs that the step runs on (default: %(default)s)")
    parser.add_argument(
        "--max_frontier_rows", type=int, default=256, help="branches decoded at a time (default: %(default)s)"
    )
    parser.add_argument("--model", help="folder or Hub id of the model, to see how much memory it takes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    args = _parser().parse_args(arguments)
    try:
        lines = report(args)
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = Table("a step", "TreeRPO", "GRPO", caption=NOTE, caption_justify="left")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    return 0


NOTE = (
    "For responses of full length. Arithmetic is what a step takes where the device is busy; where it waits for each "
    "token, as with few rows on a GPU, sampling takes as long as GRPO's, and that of responses that fork twice as "
    "long. Activations, logits and the framework are not counted."
)


if __name__ == "__main__":
    sys.exit(main())
