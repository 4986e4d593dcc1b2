# /// script
# dependencies = [
#     "treerpo-trl[compare]",
# ]
# ///
"""Compare TreeRPO with GRPO: one base model, one budget, a learning rate chosen for each, several seeds.

    python examples/compare_grpo.py --task chain_arithmetic --output_dir compare-output

Both methods start from the same model with the same optimizer and spend the same. By default that is as many sampled
tokens a step and in all (each token counted once, prompts excluded); `--budget prompts` has them see as many prompts,
whatever is sampled for each, and `--budget seconds` train for as long. Every method takes the learning rate of the
grid that does best on validation problems, with seeds of its own. The result is measured on test problems, with other
seeds.

Each run is a JSONL file in the output folder. A comparison that was stopped goes on where it was: complete runs are
not repeated, and one that was cut short goes on from its last checkpoint. At the end there are `summary.json`,
`table.md` and `curves.png`. For a model and data of your own:

    python examples/compare_grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name gsm8k.parquet \\
        --dataset_solution_column answer --system_prompt "" --reward_funcs accuracy_reward \\
        --branching_factor 4 4 --max_completion_length 512 --per_step 200000 --total 40000000 \\
        --options bf16=true gradient_checkpointing=true --workers 1 --output_dir compare-gsm8k
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
import transformers
import yaml
from compare_plan import BUDGETS, Budget, Method, Run, check_settings, is_complete, read_records
from compare_report import compare, draw, read_curve, table
from compare_run import execute
from compare_workload import Workload, built_in
from tasks import TASKS


def start_worker(log_path: str, num_threads: int) -> None:
    """What trainers print goes to a file; the terminal has a line a run."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(num_threads)


class Workers:
    """Processes that execute runs, some at a time. They start anew, so that none inherits another's state.

    Args:
        log_path: What trainers print.
        num_workers: Processes.
        num_threads: CPU threads of each.
    """

    def __init__(self, log_path: Path, num_workers: int, num_threads: int = 1):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path = log_path
        self.pool = ProcessPoolExecutor(
            num_workers,
            mp_context=get_context("spawn"),
            initializer=start_worker,
            initargs=(str(log_path), num_threads),
        )

    def execute_all(self, runs: Sequence[tuple[Run, Path]]) -> None:
        """Execute those runs that are not complete, each in its folder.

        Raises:
            ValueError: A folder holds a run of that name with other settings.
            RuntimeError: Runs have failed; the others were executed.
        """
        for run, folder in runs:
            check_settings(run, folder)
        missing = [(run, folder) for run, folder in runs if not is_complete(folder / f"{run.name}.jsonl")]
        futures = {self.pool.submit(execute, run, folder): (run, folder) for run, folder in missing}
        start, failed = time.monotonic(), []
        for count, future in enumerate(as_completed(futures), start=1):
            run, folder = futures[future]
            minutes = (time.monotonic() - start) / 60
            line = f"[{count}/{len(missing)}, {minutes:.1f} min] {folder.name}/{run.name}"
            if isinstance(error := future.exception(), BrokenProcessPool):
                raise RuntimeError(f"a process was killed (memory?); see {self.log_path} and start again") from error
            if error is not None:
                failed.append(f"{folder.name}/{run.name}: {type(error).__name__}: {error}")
                print(f"{line}: failed: {error}", flush=True)
                continue
            final = read_records(future.result())[-1]
            print(f"{line}: Pass@1 {final['pass_at_1']:.4f}, length {final['mean_length']:.1f}", flush=True)
        if failed:
            raise RuntimeError(
                f"{len(failed)} runs failed (see {self.log_path}); start again to repeat them:\n" + "\n".join(failed)
            )


def choose(runs: Sequence[Run], folder: Path) -> tuple[Method, float]:
    """The method and learning rate with the best mean Pass@1 at the end of these runs."""
    scores: dict[tuple[str, float], list[float]] = {}
    methods = {run.method.name: run.method for run in runs}
    for run in runs:
        final = read_records(folder / f"{run.name}.jsonl")[-1]
        scores.setdefault((run.method.name, run.learning_rate), []).append(final["pass_at_1"])
    name, learning_rate = max(scores, key=lambda key: fmean(scores[key]))
    return methods[name], learning_rate


def tuning_runs(template: Run, methods: Sequence[Method], rates: Sequence[float], seeds: Sequence[int]) -> list[Run]:
    """The grid, on validation problems and without measurements on the way."""
    template = replace(template, split="validation", final_samples=2, num_evaluations=1)
    return [
        replace(template, method=method, learning_rate=rate, seed=seed)
        for method in methods
        for rate in rates
        for seed in seeds
    ]


def compare_methods(template: Run, families: dict[str, list[Method]], args: argparse.Namespace) -> None:
    """Choose on validation problems, measure on test problems, report."""
    folder = args.output_dir
    workers = Workers(folder / "workers.log", args.workers, args.threads)
    grids = {
        family: tuning_runs(template, methods, args.learning_rates, args.tuning_seeds)
        for family, methods in families.items()
    }
    workers.execute_all([(run, folder) for grid in grids.values() for run in grid])
    tests = {}
    for family, grid in grids.items():
        method, rate = choose(grid, folder)
        print(f"{family}: {method.name} with learning rate {rate:g}, the best on validation problems")
        tests[family] = [replace(template, method=method, learning_rate=rate, seed=seed) for seed in args.seeds]
    workers.execute_all([(run, folder) for runs in tests.values() for run in runs])
    curves = {family: [read_curve(folder / f"{run.name}.jsonl") for run in runs] for family, runs in tests.items()}
    summary = {
        **compare(curves["TreeRPO"], curves["GRPO"]),
        "methods": {family: [runs[0].method.name, runs[0].learning_rate] for family, runs in tests.items()},
        "budget": asdict(template.budget),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "table.md").write_text(table(curves) + "\n")
    draw(curves, args.task or args.model_name_or_path, folder / "curves.png")
    print(table(curves))
    print(json.dumps(summary))


def parse_options(pairs: Sequence[str]) -> dict:
    """`name=value` pairs, values in YAML."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"option '{pair}' has no value; write name=value")
        options[name] = yaml.safe_load(value)
    return options


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    work = parser.add_argument_group("what is trained")
    work.add_argument("--task", choices=list(TASKS), help="a built-in task, instead of a model and a dataset")
    work.add_argument("--model_name_or_path", help="base model: folder or Hub id")
    work.add_argument("--dataset_name", help="dataset: Hub id, folder or file")
    work.add_argument("--dataset_train_split", default="train", help="split to train on")
    work.add_argument("--dataset_test_split", default="test", help="split for validation and test")
    work.add_argument("--dataset_prompt_column", help="column of the prompts")
    work.add_argument("--dataset_solution_column", help="column of the right answers")
    work.add_argument("--system_prompt", help="system message of every prompt")
    work.add_argument("--reward_funcs", nargs="+", default=[], help="reward functions, named as in train.py")
    work.add_argument("--max_completion_length", type=int, default=256, help="maximum number of tokens of a response")
    work.add_argument("--temperature", type=float, default=1.0, help="sampling temperature of training and evaluation")
    work.add_argument("--num_validation", type=int, default=1024, help="held-out problems to choose on")
    work.add_argument("--num_test", type=int, default=2048, help="held-out problems to report on")
    work.add_argument(
        "--rows_per_micro_batch", type=int, default=1024, help="maximum number of rows in a forward pass"
    )
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--budget", choices=BUDGETS, default="tokens", help="what both methods spend equally")
    how.add_argument("--per_step", type=float, default=4000, help="sampled tokens per step (leaves, with that budget)")
    how.add_argument("--total", type=float, default=320_000, help="size of the whole budget")
    how.add_argument("--branching_factor", type=int, nargs="+", default=[2, 2], help="TreeRPO: branching by depth")
    how.add_argument(
        "--num_generations", type=int, nargs="+", default=[8], help="GRPO: one, or several to choose from"
    )
    how.add_argument("--options", nargs="*", default=[], help="name=value options for both methods")
    how.add_argument("--treerpo_options", nargs="*", default=[], help="name=value options for TreeRPOConfig")
    how.add_argument("--grpo_options", nargs="*", default=[], help="name=value options for GRPOConfig")
    how.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[1e-4, 2e-4, 4e-4],
        help="rates that both methods choose from",
    )
    how.add_argument("--tuning_seeds", type=int, nargs="+", default=[100, 101], help="seeds of the runs to choose by")
    how.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the runs to report")
    how.add_argument("--num_evaluations", type=int, default=8, help="how often to measure during a run")
    how.add_argument("--workers", type=int, default=2, help="how many runs at a time")
    how.add_argument("--threads", type=int, default=1, help="CPU threads per run")
    how.add_argument("--output_dir", type=Path, default=Path("compare-output"), help="where to write runs and results")
    return parser


def make_workload(args: argparse.Namespace) -> Workload:
    """What the command line asks to train."""
    sizes = {
        "temperature": args.temperature,
        "num_validation": args.num_validation,
        "num_test": args.num_test,
        "max_rows_per_micro_batch": args.rows_per_micro_batch,
    }
    if args.task is not None:
        return built_in(args.task, args.output_dir / "base_models", **sizes)
    return Workload(
        model=args.model_name_or_path,
        dataset=args.dataset_name,
        train_split=args.dataset_train_split,
        held_out_split=args.dataset_test_split,
        prompt_column=args.dataset_prompt_column,
        solution_column=args.dataset_solution_column,
        system_prompt=args.system_prompt,
        reward_names=tuple(args.reward_funcs),
        max_completion_length=args.max_completion_length,
        **sizes,
    )


def main() -> None:
    """Command line."""
    parser = make_parser()
    args = parser.parse_args()
    is_own = None not in (args.model_name_or_path, args.dataset_name) and bool(args.reward_funcs)
    if (args.task is not None) == is_own:
        parser.error("give either --task, or all of --model_name_or_path, --dataset_name and --reward_funcs")
    workload = make_workload(args)
    workload.reward_funcs()  # a mistake in the data should show before anything is trained
    workload.held_out("test")
    options = parse_options(args.treerpo_options)
    branching = () if options.get("split_rule") == "uncertainty" else tuple(args.branching_factor)
    tree = Method(f"treerpo-{'x'.join(map(str, branching)) or 'forks'}", branching, options=options)
    flat = [Method(f"grpo-{g}", (), g, parse_options(args.grpo_options)) for g in args.num_generations]
    template = Run(
        workload=workload,
        method=tree,
        budget=Budget(args.budget, args.total, args.per_step),
        learning_rate=args.learning_rates[0],
        seed=0,
        split="test",
        num_evaluations=args.num_evaluations,
        options=parse_options(args.options),
    )
    compare_methods(template, {"TreeRPO": [tree], "GRPO": flat}, args)


if __name__ == "__main__":
    main()
