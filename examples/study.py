# /// script
# dependencies = [
#     "treerpo-trl[compare]",
# ]
# ///
"""The study behind `examples/results/`: TreeRPO against GRPO on the built-in tasks, and what its options contribute.

    python examples/study.py --output_dir study-output --results_dir examples/results

It takes some hours on two CPU cores, and goes on where it was stopped. Stages, in this order:

- `headline`: both tasks; every method's learning rate (and GRPO's group size) from a grid on validation problems, the
  result on test problems with seeds that served for nothing else.
- `ablations`: estimator, pruning, weighting and shape, on validation problems, at TreeRPO's learning rate.
- `lengths`: chains of 2, 4 and 8 operations.
- `gradients`: the signal-to-noise ratio of the gradient on the base models.
- `report`: tables, figures and JSON from all runs that are complete.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare_grpo import Workers, choose, tuning_runs
from compare_plan import Budget, Method, Run, is_complete
from compare_report import compare, read_curve
from compare_workload import built_in
from gradient_snr import measure_snr
from study_report import (
    ablation_table,
    diagnostics,
    draw_ablations,
    draw_diagnostics,
    draw_snr,
    headline_table,
    write_task,
)


HEADLINE_TASKS = ("chain_arithmetic", "countdown")
ABLATION_TASKS = ("chain_arithmetic",)
LENGTH_TASKS = ("chains_of_2", "chains_of_4", "chains_of_8")
TASK_NAMES = (*HEADLINE_TASKS, *LENGTH_TASKS)
LEARNING_RATES = (1e-4, 2e-4, 4e-4)
TUNING_SEEDS, ABLATION_SEEDS, TEST_SEEDS, LENGTH_SEEDS = (100, 101), (100, 101, 102), range(5), range(3)
BUDGET = Budget("tokens", total=320_000, per_step=4000)
GRADIENT_BATCHES = 48
LATE = 30  # tokens of the first segment, of the 37 of the longest solution in chain_arithmetic
SPARSE_TEMPERATURES = (0.6, 0.8, 1.0, 1.2, 1.4)


def tree(*branching: int, suffix: str = "", **options: Any) -> Method:
    """TreeRPO with this shape, and segments of equal length."""
    return Method(f"treerpo-{suffix or 'x'.join(map(str, branching))}", branching, options=options)


TREERPO = tree(2, 2, 2, 2)
# What the headline chooses from, besides the learning rate.
GRPO = [Method(f"grpo-{count}", (), count) for count in (8, 4)]
FAMILIES = {"TreeRPO": [TREERPO, tree(4, 4), tree(8, 2)], "GRPO": GRPO}
SPARSE_TREES = [TREERPO, tree(4, 4), tree(4, 4, 4)]
LENGTH_FAMILIES = {"TreeRPO": [TREERPO], "GRPO": GRPO[:1]}
# What differs from TREERPO, a row of the table each; the first of every group is TREERPO itself.
ABLATIONS: dict[str, list[Method]] = {
    "estimator": [
        TREERPO,
        *(
            tree(2, 2, 2, 2, suffix=name, advantage_estimator=name)
            for name in ("bernoulli_std", "group_std", "centered")
        ),
    ],
    "pruning": [TREERPO, tree(2, 2, 2, 2, suffix="tau0", prune_threshold=0.0)],
    "weighting": [TREERPO, tree(2, 2, 2, 2, suffix="node", loss_weighting="node")],
    "fewer leaves": [TREERPO, tree(2, 2), tree(4, 2), tree(2, 2, 2)],
    "16 leaves": [TREERPO, tree(16), tree(8, 2), tree(4, 4), tree(4, 2, 2)],
    "64 leaves": [TREERPO, tree(64), tree(8, 8), tree(4, 4, 4), tree(2, 2, 2, 2, 2, 2)],
    # Of the tokens of the longest response: 1/4 (TREERPO), 1/5 (about a line), 4/5 (only the end branches again).
    "segment length": [
        TREERPO,
        tree(2, 2, 2, 2, 2),
        tree(4, 4, suffix="4x4-late", segment_length=LATE),
        tree(8, 2, suffix="8x2-late", segment_length=LATE),
    ],
}


class Study:
    """The runs of the study, in one folder a task, and what has been chosen from them."""

    def __init__(self, output_dir: Path, num_workers: int):
        self.output_dir = output_dir
        self.workers = Workers(output_dir / "workers.log", num_workers)

    def template(self, task: str) -> Run:
        """A run of the task; method, learning rate and seed are to be replaced."""
        workload = built_in(task, self.output_dir / "base_models")
        return Run(workload, TREERPO, BUDGET, LEARNING_RATES[0], 0, "test")

    def execute(self, runs: Sequence[tuple[str, Run]]) -> None:
        """(task, run) pairs."""
        self.workers.execute_all([(run, self.output_dir / task) for task, run in runs])

    def grid(self, task: str, family: str, seeds: Sequence[int]) -> list[Run]:
        """The runs from which a family's learning rate is chosen."""
        methods = FAMILIES[family] if task in HEADLINE_TASKS else LENGTH_FAMILIES[family]
        return tuning_runs(self.template(task), methods, LEARNING_RATES, seeds)

    def chosen(self, task: str, family: str, seeds: Sequence[int] = TUNING_SEEDS) -> tuple[Method, float]:
        """The family's method and learning rate that are best on validation problems."""
        return choose(self.grid(task, family, seeds), self.output_dir / task)

    def tests(self, task: str, family: str, seeds: Sequence[int], tuning: Sequence[int]) -> list[Run]:
        """The runs of the result."""
        method, rate = self.chosen(task, family, tuning)
        return [replace(self.template(task), method=method, learning_rate=rate, seed=seed) for seed in seeds]

    def compared(self, tasks: Sequence[str], seeds: Sequence[int], tuning: Sequence[int]) -> None:
        """Choose, then measure."""
        families = ("TreeRPO", "GRPO")
        self.execute([(t, run) for t in tasks for family in families for run in self.grid(t, family, tuning)])
        # Seed by seed, so that an interrupted study has both methods.
        runs = [(t, run) for t in tasks for family in families for run in self.tests(t, family, seeds, tuning)]
        self.execute(sorted(runs, key=lambda pair: pair[1].seed))

    def ablations(self, task: str, group: str) -> list[Run]:
        """The runs of one group of the ablations."""
        runs = [run for run in self.grid(task, "TreeRPO", TUNING_SEEDS) if run.method == TREERPO]
        _, rate = choose(runs, self.output_dir / task)
        return tuning_runs(self.template(task), ABLATIONS[group], [rate], ABLATION_SEEDS)

    def paths(self, task: str, runs: Sequence[Run]) -> list[Path]:
        """Files of those runs that are complete."""
        paths = [self.output_dir / task / f"{run.name}.jsonl" for run in runs]
        return [path for path in paths if is_complete(path)]


def run_headline(study: Study) -> None:
    """Both tasks, the methods' shapes and learning rates chosen."""
    for task in HEADLINE_TASKS:
        study.compared([task], TEST_SEEDS, TUNING_SEEDS)


def run_ablations(study: Study) -> None:
    """All groups; equal runs are executed once."""
    runs = {
        (task, run.name): (task, run)
        for task in ABLATION_TASKS
        for group in ABLATIONS
        for run in study.ablations(task, group)
    }
    study.execute(list(runs.values()))


def run_lengths(study: Study) -> None:
    """Short, middle and long chains; the grid has one seed."""
    study.compared(LENGTH_TASKS, LENGTH_SEEDS, TUNING_SEEDS[:1])


def run_gradients(study: Study) -> None:
    """Signal-to-noise ratios, kept as JSON: of every task, and of long chains from rare to frequent success."""
    jobs = [(study.output_dir / task / "snr.json", task, 1.0, [TREERPO], BUDGET.per_step) for task in TASK_NAMES]
    jobs += [
        (study.output_dir / "sparse" / f"snr-{temperature}.json", "chains_of_8", temperature, SPARSE_TREES, 8000)
        for temperature in SPARSE_TEMPERATURES
    ]
    futures = {}
    for path, task, temperature, trees, per_step in jobs:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            workload = replace(study.template(task).workload, temperature=temperature)
            arguments = workload, trees, GRPO[0], per_step, GRADIENT_BATCHES
            futures[study.workers.pool.submit(measure_snr, *arguments)] = path
    for future in as_completed(futures):
        path = futures[future]
        print(*(f"{path.parent.name} {json.dumps(result)}" for result in future.result()), sep="\n", flush=True)
        path.write_text(json.dumps(future.result()) + "\n")


def write_report(study: Study, results_dir: Path) -> None:
    """Everything in `results_dir`, from the runs that are complete."""
    results_dir.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    for task in TASK_NAMES:
        seeds, tuning = (TEST_SEEDS, TUNING_SEEDS) if task in HEADLINE_TASKS else (LENGTH_SEEDS, TUNING_SEEDS[:1])
        families = {}
        for family in ("TreeRPO", "GRPO"):
            if len(study.paths(task, grid := study.grid(task, family, tuning))) < len(grid):
                break
            families[family] = study.tests(task, family, seeds, tuning)
        curves = {family: [read_curve(path) for path in study.paths(task, runs)] for family, runs in families.items()}
        if len(curves) < 2 or min(map(len, curves.values())) < 2:
            continue
        snr_path = study.output_dir / task / "snr.json"
        snr = json.loads(snr_path.read_text())[0] if snr_path.exists() else {"snr_ratio": None}
        chosen = {
            family: {"method": r[0].method.name, "learning_rate": r[0].learning_rate} for family, r in families.items()
        }
        summary[task] = {**snr, **compare(curves["TreeRPO"], curves["GRPO"]), "chosen": chosen}
        summary[task]["diagnostics"] = diagnostics(curves)
        write_task(task, curves, results_dir)
        if task in HEADLINE_TASKS:
            draw_diagnostics(task, curves, results_dir / f"{task}_diagnostics.png")
    (results_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (results_dir / "headline.md").write_text(headline_table(summary))
    sparse = [json.loads(path.read_text()) for path in sorted(study.output_dir.glob("sparse/*.json"))]
    if sparse:
        (results_dir / "snr_by_success.json").write_text(json.dumps(sparse, indent=2) + "\n")
        draw_snr([result for results in sparse for result in results], results_dir / "snr_by_success.png")
    ablations = {
        task: {
            group: {
                method.name: [
                    read_curve(path)
                    for path in study.paths(
                        task, [run for run in study.ablations(task, group) if run.method == method]
                    )
                ]
                for method in methods
            }
            for group, methods in ABLATIONS.items()
        }
        for task in ABLATION_TASKS
        if task in summary
    }
    (results_dir / "ablations.md").write_text(ablation_table(ablations))
    draw_ablations(ablations, results_dir / "ablations.png")


STAGES = {"headline": run_headline, "ablations": run_ablations, "lengths": run_lengths, "gradients": run_gradients}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("study-output"), help="runs and base models")
    parser.add_argument("--results_dir", type=Path, default=Path("study-output/results"), help="tables and figures")
    parser.add_argument("--stages", nargs="+", choices=[*STAGES, "report"], default=[*STAGES, "report"])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    study = Study(args.output_dir, args.workers)
    for stage in args.stages:
        if stage == "report":
            write_report(study, args.results_dir)
        else:
            STAGES[stage](study)


if __name__ == "__main__":
    main()
