# /// script
# dependencies = [
#     "treerpo-trl[deepspeed]",
# ]
# ///
"""Benchmark: a step of the same global batch under each engine, against one process: wall time and peak memory.

    python examples/benchmark_engines.py --configs multi_cpu fsdp2_cpu deepspeed_zero2_cpu deepspeed_zero3_cpu

Each is launched as a user would launch it, in turns, on a random Qwen2. Configurations without `_cpu` run on GPUs. The
last line printed is JSON.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from benchmark_speed import EOS_TOKEN_ID, make_model, make_tokenizer, parity_reward
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


EXAMPLES = Path(__file__).resolve().parent
CONFIGS = ["multi_cpu", "fsdp2_cpu", "deepspeed_zero1_cpu", "deepspeed_zero2_cpu", "deepspeed_zero3_cpu"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="files in accelerate_configs/")
    parser.add_argument("--alone", default="single_cpu", help="the configuration to compare with")
    parser.add_argument("--repeats", type=int, default=3, help="launches of each configuration, taking turns")
    parser.add_argument("--num_steps", type=int, default=5, help="steps of a launch; the first is not counted")
    parser.add_argument("--num_trees", type=int, default=4, help="trees per step, over all processes")
    parser.add_argument("--branching_factor", type=int, nargs="+", default=[2, 2, 2, 2], help="branching by depth")
    parser.add_argument("--segment_length", type=int, default=16, help="tokens of a segment")
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--hidden_size", type=int, default=512, help="width of the random Qwen2")
    parser.add_argument("--num_layers", type=int, default=8, help="layers of the random Qwen2")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16")
    parser.add_argument("--model_path", help=argparse.SUPPRESS)  # what a launched process trains
    return parser.parse_args()


class StepTimer(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop it when the kernels have run."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def run(args: argparse.Namespace) -> None:
    """One launched process: train, and print seconds and peak memory of all processes as JSON."""
    prompts = [" ".join(str(2 + (7 * i + j) % 500) for j in range(args.prompt_length)) for i in range(256)]
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.num_trees % num_processes:
        sys.exit(
            f"--num_trees is {args.num_trees}, which {num_processes} processes cannot share; use a multiple of "
            f"{num_processes}"
        )
    config = TreeRPOConfig(
        output_dir=args.model_path + "-out",
        branching_factor=args.branching_factor,
        segment_length=args.segment_length,
        per_device_train_batch_size=torch.tensor(args.branching_factor).prod().item(),
        gradient_accumulation_steps=args.num_trees // num_processes,
        generation_kwargs={"suppress_tokens": [EOS_TOKEN_ID]},
        prune_threshold=None,
        max_steps=args.num_steps,
        bf16=args.bf16,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    timer = StepTimer()
    trainer = TreeRPOTrainer(
        model=args.model_path,
        reward_funcs=parity_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=make_tokenizer(),
        callbacks=[timer],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    peaks = gather_object([peak])
    if trainer.accelerator.is_main_process:
        print(json.dumps({"seconds": timer.seconds[1:], "peak_bytes": peaks}), flush=True)
    os._exit(0)  # nothing is left to do, and torch may hang on its way out of gloo


def launch(config: str, model_path: str, args: argparse.Namespace) -> dict:
    """What a launch of a configuration measured."""
    is_cpu, is_alone = config.endswith("_cpu"), config == args.alone
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0" if is_alone else "29511"]
    command += ["--config_file", str(EXAMPLES.parent / "accelerate_configs" / f"{config}.yaml")]
    command += [str(EXAMPLES / "on_cpu.py")] if is_cpu and not is_alone else []
    command += [__file__, "--model_path", model_path, *sys.argv[1:]]
    # The same number of threads in all, however many processes share them.
    threads = os.cpu_count() if is_alone else max(1, os.cpu_count() // 2)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"} if is_cpu else {})}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"seconds"')]
    if result.returncode or not lines:
        sys.exit(f"{config} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return json.loads(lines[-1])


def main() -> None:
    """Launch every configuration in turns, and compare each with the one process of the same turn."""
    args = parse_arguments()
    if args.model_path:
        run(args)
    configs = [args.alone, *args.configs]
    measured: dict[str, list[dict]] = {config: [] for config in configs}
    with tempfile.TemporaryDirectory() as folder:
        make_model(args).save_pretrained(f"{folder}/model")
        for config in tqdm(configs * args.repeats, desc="launches"):
            measured[config].append(launch(config, f"{folder}/model", args))

    summary = {}
    table = Table("configuration", "steps", "seconds a step", f"against {args.alone}", "peak memory a process (MB)")
    for config, launches in measured.items():
        medians = [statistics.median(run["seconds"]) for run in launches]
        alone = [statistics.median(run["seconds"]) for run in measured[args.alone]]
        ratios = sorted(median / other for median, other in zip(medians, alone, strict=True))
        summary[config] = {
            "steps": sum(len(run["seconds"]) for run in launches),
            "seconds": round(statistics.median(medians), 3),
            "ratio": [round(ratio, 2) for ratio in (statistics.median(ratios), ratios[0], ratios[-1])],
            "peak_mb": [round(max(run["peak_bytes"]) / 1e6) for run in launches],
        }
        row = summary[config]
        ratio = "{} ({} - {})".format(*row["ratio"])
        table.add_row(config, str(row["steps"]), str(row["seconds"]), ratio, str(max(row["peak_mb"])))
    Console().print(table)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
