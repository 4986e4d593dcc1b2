# /// script
# dependencies = [
#     "treerpo-trl",
# ]
# ///
"""Check on one GPU: are shared prefixes exact, what do trees save, and does training run?

    make gpu-check

Random weights of Qwen2.5's sizes, so nothing is downloaded. It writes `gpu-check.json` and prints a table of it. On a
GPU of little memory, try `--sizes 0.5B --rows 16`. On a CPU it runs with `--sizes tiny`.

- exact: log-probabilities and gradients of shared prefixes against dense rows, in float32 and in bf16, beside the
  distance of bf16 itself from float32; and whether the same step twice gives the same bits.
- kernels: seconds of training with FlexAttention against those with SDPA, and the difference between their gradients.
- speed: seconds of sampling, training and a whole step against GRPO with as many completions, and of training against
  rows without padding.
- memory: peak of sampling, against what `max_frontier_rows` is said to bound; once, on a model of its own.
- training: steps of TreeRPO and GRPO, with all weights or LoRA, and with vLLM if it is installed: seconds and peak.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import benchmark_memory
import benchmark_speed
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.prefix_sharing import forward
from treerpo_trl.prefix_sharing.attention import KERNELS


# Hidden size, width of the feed-forward layers, layers, heads, heads of keys, vocabulary.
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
}
HAS_GPU = torch.cuda.is_available()
LEAVES, NUM_PROMPTS = 64, 2  # of a tree, and of a batch


def make_model(size: str, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Random weights of a size of `SIZES`."""
    hidden_size, width, num_layers, num_heads, num_key_heads, vocabulary_size = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=benchmark_speed.PAD_TOKEN_ID,
        eos_token_id=benchmark_speed.EOS_TOKEN_ID,
        bos_token_id=None,
    )
    with torch.device("cuda" if HAS_GPU else "cpu"):
        return Qwen2ForCausalLM(config).to(dtype)


def make_trainer(
    trainer_class: type[GRPOTrainer], size: str, lengths: argparse.Namespace, dtype: str = "float32", **options: Any
) -> GRPOTrainer:
    """A trainer of 4 x 4 x 4 trees, or of 64 completions a prompt, of two prompts a batch, in micro-batches."""
    peft_config = options.pop("peft_config", None)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": lengths.rows,
        "gradient_accumulation_steps": NUM_PROMPTS * LEAVES // lengths.rows,
        "max_steps": lengths.steps,
        "logging_steps": 1,
        "learning_rate": 1e-6,
        "bf16": dtype == "bfloat16",
        "use_cpu": not HAS_GPU,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    if trainer_class is TreeRPOTrainer:
        shape = {"branching_factor": [4, 4, 4], "max_depth": 3, "segment_length": lengths.segment_length}
        args: Any = TreeRPOConfig(**common, **shape, prune_threshold=None)
    else:
        args = GRPOConfig(**common, num_generations=LEAVES, max_completion_length=3 * lengths.segment_length)
    prompts = [" ".join(str(2 + (7 * i + j) % 500) for j in range(lengths.prompt_length)) for i in range(64)]
    return trainer_class(
        make_model(size, getattr(torch, dtype) if peft_config is not None else torch.float32),
        benchmark_speed.parity_reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=benchmark_speed.make_tokenizer(),
        peft_config=peft_config,
    )


def sample_rows(trainer: GRPOTrainer, indices: Sequence[int], count: int) -> dict[str, Any]:
    """The first micro-batch of trees of these prompts, ready for the loss."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    prompts = [trainer.train_dataset[index] for index in indices for _ in range(LEAVES)]
    batch = trainer._generate_and_score_completions(prompts)
    return split_tensor_dict(batch, len(prompts) // count)[0]


def check_exact(size: str, lengths: argparse.Namespace) -> dict[str, Any]:
    """Shared prefixes against dense rows, on sampled trees."""
    trainer = make_trainer(TreeRPOTrainer, size, lengths)
    batch = sample_rows(trainer, range(NUM_PROMPTS), lengths.rows)
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    needed = batch["completion_mask"].bool()
    model = trainer.model

    def log_probs(share: bool, low_precision: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(input_ids.device.type, torch.bfloat16, enabled=low_precision):
            if share:
                return forward.forward_shared(model, input_ids, mask, needed).log_probs[needed]
            chunks = zip(input_ids.split(16), mask.split(16), strict=True)
            dense = [forward.forward_dense(model, *chunk, needed.size(1)) for chunk in chunks]
            return torch.cat(dense)[needed]

    def gradient(share: bool) -> torch.Tensor:
        trainer._prefix_sharing.is_active = share
        model.zero_grad()
        trainer.compute_loss(model, batch).backward()
        trainer._prefix_sharing.is_active = True
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact, shared = log_probs(False, False), log_probs(True, False)
    low_dense, low_shared = log_probs(False, True), log_probs(True, True)
    of_dense, of_shared = gradient(False), gradient(True)
    return {
        "log_probs_float32": (exact - shared).abs().max().item(),
        "log_probs_bf16": (exact - low_shared).abs().mean().item(),
        "log_probs_bf16_dense": (exact - low_dense).abs().mean().item(),
        "gradient": ((of_dense - of_shared).norm() / of_dense.norm()).item(),
        "gradient_has_same_bits_again": torch.equal(of_shared, gradient(True)),
        "and_with_deterministic_algorithms": repeats_with_deterministic_algorithms(gradient),
    }


def repeats_with_deterministic_algorithms(gradient: Callable[[bool], torch.Tensor]) -> bool | str:
    """Whether shared prefixes give the same bits twice, as `full_determinism=True` has it; or why it cannot."""
    torch.use_deterministic_algorithms(True)
    try:
        return torch.equal(gradient(True), gradient(True))
    except RuntimeError as error:
        return str(error)
    finally:
        torch.use_deterministic_algorithms(False)


def check_kernels(size: str, lengths: argparse.Namespace) -> dict[str, Any]:
    """The attention of packed rows by FlexAttention, the first calls left out: they compile it."""
    if not HAS_GPU:
        return {"skipped": "FlexAttention has a backward pass on GPUs only"}
    trainer = make_trainer(TreeRPOTrainer, size, lengths, "bfloat16")
    batches = [sample_rows(trainer, (index, index + 1), lengths.rows) for index in range(4)]

    def timed_gradient(kernel: str, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
        trainer.model.zero_grad()
        with patch.dict(KERNELS, sdpa=KERNELS[kernel]):
            start = benchmark_speed.now()
            trainer.compute_loss(trainer.model, batch).backward()
            seconds = benchmark_speed.now() - start
        return seconds, torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])

    ratios, differences = [], []
    for batch in batches:  # of other lengths each
        seconds, gradient = timed_gradient("sdpa", batch)
        of_flex, other = timed_gradient("flex_attention", batch)
        ratios.append(of_flex / seconds)
        differences.append(((gradient - other).norm() / gradient.norm()).item())
    return {
        "flex_by_sdpa": statistics.median(ratios[1:]),
        "flex_by_sdpa_first": ratios[0],
        "gradient": max(differences),
    }


def check_speed(size: str, lengths: argparse.Namespace) -> dict[str, Any]:
    """Medians of the benchmark, in bf16."""
    hidden_size, _, num_layers, *_ = SIZES[size]
    words = argparse.Namespace(
        segment_length=lengths.segment_length,
        prompt_length=lengths.prompt_length,
        num_prompts=max(1, lengths.rows // LEAVES),
        repeats=3,
        hidden_size=hidden_size // 64 * 64,
        num_layers=num_layers,
        bf16=HAS_GPU,
        mean_length=None,
    )
    figures = benchmark_speed.measure(words, "4x4x4")
    names = ("train_ratio", "train_ratio_rows", "train_ratio_prompts", "rho", "share_of_rho", "memory_ratio")
    names += ("sampling_ratio", "step_ratio", "TreeRPO own")
    return {name: statistics.median(figures[name]) for name in names}


def check_memory(size: str, lengths: argparse.Namespace) -> dict[str, Any]:
    """Peak of sampling by its bound; the model is the benchmark's own."""
    words = argparse.Namespace(
        shape="8x8x8", segment_length=lengths.segment_length, prompt_length=lengths.prompt_length, num_trees=4
    )
    found = {rows: benchmark_memory.measure(words, rows) for rows in ((64, 256) if HAS_GPU else (64,))}
    return {f"peak_by_bound_at_{rows}": result["peak"] / result["bound"] for rows, result in found.items()}


def check_training(size: str, lengths: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, the first left out, and peak memory in GB."""
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    dtype = "bfloat16" if HAS_GPU else "float32"
    ways: dict[str, tuple[type[GRPOTrainer], dict[str, Any]]] = {
        "TreeRPO": (TreeRPOTrainer, {}),
        "GRPO": (GRPOTrainer, {}),
        "TreeRPO with LoRA": (TreeRPOTrainer, {"peft_config": adapters}),
    }
    if HAS_GPU and find_spec("vllm") is not None:
        vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        ways["TreeRPO with vLLM"] = (TreeRPOTrainer, vllm)
    found: dict[str, Any] = {}
    for name, (trainer_class, options) in ways.items():
        if HAS_GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer = make_trainer(trainer_class, size, lengths, dtype, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = [log["step_time"] for log in trainer.state.log_history if "step_time" in log][1:]
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        found[f"{name}: seconds"] = statistics.median(seconds)
        found[f"{name}: losses are finite"] = all(loss == loss and abs(loss) < float("inf") for loss in losses)
        if HAS_GPU:
            found[f"{name}: peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        del trainer
        gc.collect()
    return found


CHECKS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "exact": check_exact,
    "kernels": check_kernels,
    "speed": check_speed,
    "memory": check_memory,
    "training": check_training,
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = ["0.5B", "1.5B"] if HAS_GPU else ["tiny"]
    rows = [2**power for power in range(1, 8)]
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=sizes, help="sizes of the random models")
    parser.add_argument(
        "--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="run only these checks"
    )
    parser.add_argument("--rows", type=int, choices=rows, default=32, help="rows of a micro-batch")
    parser.add_argument("--segment_length", type=int, default=64 if HAS_GPU else 4, help="tokens of a segment")
    parser.add_argument("--prompt_length", type=int, default=128 if HAS_GPU else 8, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="where to write the numbers")
    return parser.parse_args()


def main() -> None:
    """Check by check; one that fails is reported, and the others go on."""
    args = parse_arguments()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms ask for
    start = time.monotonic()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if HAS_GPU else "CPU", "torch": torch.__version__}
    table = Table("check", "size", "figure", "value", title=found["device"])
    failures = 0
    for size in args.sizes:
        for name in args.checks:
            if name == "memory" and size != args.sizes[0]:
                continue
            try:
                figures = CHECKS[name](size, args)
            except Exception as error:  # the report is what the check is for
                figures, failures = {"failed": f"{type(error).__name__}: {error}"}, failures + 1
            found[f"{name} {size}"] = figures
            for figure, value in figures.items():
                table.add_row(name, size, figure, f"{value:.3g}" if isinstance(value, float) else str(value))
            args.output.write_text(json.dumps(found, indent=2) + "\n")
            gc.collect()
            if HAS_GPU:
                torch.cuda.empty_cache()
    Console(width=120).print(table)
    print(f"{args.output}, {time.monotonic() - start:.0f} seconds")
    if failures:
        raise SystemExit(f"{failures} checks failed")


if __name__ == "__main__":
    main()
