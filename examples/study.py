# /// script
# dependencies = [
#     "treerpo-trl[compare]",
# ]
# ///
"""The study behind `examples/results/`: TreeRPO against GRPO on the built-in tasks, and what its options contribute.

    python examples/study.py --output_dir study-output --results_dir examples/results

It takes some hours on two CPU cores, and goes on where it was stopped. Stages, in this order:

- `headline`: two tasks; every method's learning rate and shape (GRPO's group size) from a grid on validation problems,
  the result on test problems with seeds that served for nothing else.
- `ablations`: estimator, pruning, weighting and shape, on validation problems, at TreeRPO's learning rate.
- `lengths`: chains of 2, 4 and 8 operations, and chains of 8 that rarely succeed, at one learning rate.
- `gradients`: the signal-to-noise ratio of the gradient on the base models.
- `report`: tables, figures and JSON from all runs that are complete.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare_grpo import Workers, choose, tuning_runs
from compare_plan import Run, is_complete
from compare_report import compare, read_curve
from compare_workload import built_in
from gradient_snr import measure_snr
from study_plan import (
    ABLATION_SEEDS,
    ABLATION_TASK,
    ABLATIONS,
    COMPARISONS,
    GRADIENT_BATCHES,
    GRPO,
    HEADLINE,
    LENGTHS,
    RATE,
    SPARSE_TEMPERATURES,
    SPARSE_TREES,
    TREERPO,
)
from study_report import (
    ablation_table,
    diagnostics,
    draw_ablations,
    draw_diagnostics,
    draw_snr,
    headline_table,
    write_task,
)


class Study:
    """The runs of the study, in one folder a task, and what has been chosen from them."""

    def __init__(self, output_dir: Path, num_workers: int):
        self.output_dir = output_dir
        self.workers = Workers(output_dir / "workers.log", num_workers)

    def template(self, name: str) -> Run:
        """A run of a comparison; method, learning rate and seed are to be replaced."""
        comparison = COMPARISONS[name]
        models_dir = self.output_dir / "base_models"
        return Run(
            workload=built_in(comparison.task, models_dir, temperature=comparison.temperature),
            method=TREERPO,
            budget=comparison.budget,
            learning_rate=RATE,
            seed=0,
            split="test",
            num_evaluations=comparison.num_evaluations,
        )

    def execute(self, runs: Sequence[tuple[str, Run]]) -> None:
        """(name of the comparison, run) pairs."""
        self.workers.execute_all([(run, self.output_dir / name) for name, run in runs])

    def grid(self, name: str, family: str) -> list[Run]:
        """The runs from which a family's method and learning rate are chosen."""
        comparison = COMPARISONS[name]
        methods, rates = comparison.families[family], comparison.learning_rates
        return tuning_runs(self.template(name), methods, rates, comparison.tuning_seeds)

    def tests(self, name: str, family: str) -> list[Run]:
        """The runs of the result."""
        comparison = COMPARISONS[name]
        if comparison.tuning_seeds:
            method, rate = choose(self.grid(name, family), self.output_dir / name)
        else:
            (method,), (rate,) = comparison.families[family], comparison.learning_rates
        template = replace(self.template(name), method=method, learning_rate=rate)
        return [replace(template, seed=seed) for seed in comparison.seeds]

    def compare(self, names: Iterable[str]) -> None:
        """Choose, then measure."""
        families = ("TreeRPO", "GRPO")
        self.execute([(name, run) for name in names for family in families for run in self.grid(name, family)])
        # Seed by seed, so that an interrupted study has both methods.
        runs = [(name, run) for name in names for family in families for run in self.tests(name, family)]
        self.execute(sorted(runs, key=lambda pair: pair[1].seed))

    def ablations(self, group: str) -> list[Run]:
        """The runs of one group of the ablations."""
        runs = [run for run in self.grid(ABLATION_TASK, "TreeRPO") if run.method == TREERPO]
        _, rate = choose(runs, self.output_dir / ABLATION_TASK)
        return tuning_runs(self.template(ABLATION_TASK), ABLATIONS[group], [rate], ABLATION_SEEDS)

    def is_chosen(self, name: str) -> bool:
        """Whether the runs are there from which the methods are chosen."""
        return all(
            len(self.paths(name, grid)) == len(grid)
            for family in COMPARISONS[name].families
            for grid in [self.grid(name, family)]
        )

    def paths(self, task: str, runs: Sequence[Run]) -> list[Path]:
        """Files of those runs that are complete."""
        paths = [self.output_dir / task / f"{run.name}.jsonl" for run in runs]
        return [path for path in paths if is_complete(path)]


def run_headline(study: Study) -> None:
    """Both tasks, one after the other."""
    for name in HEADLINE:
        study.compare([name])


def run_ablations(study: Study) -> None:
    """All groups; equal runs are executed once."""
    runs = {run.name: (ABLATION_TASK, run) for group in ABLATIONS for run in study.ablations(group)}
    study.execute(list(runs.values()))


def run_lengths(study: Study) -> None:
    """Short, middle and long chains, and long ones that rarely succeed."""
    study.compare(LENGTHS)


def run_gradients(study: Study) -> None:
    """Signal-to-noise ratios, kept as JSON: of the methods of every comparison, and from rare to frequent success."""
    jobs = []
    for name, comparison in COMPARISONS.items():
        trees, flats = ([study.tests(name, family)[0].method] for family in ("TreeRPO", "GRPO"))
        path = study.output_dir / name / "snr.json"
        jobs.append((path, comparison.task, comparison.temperature, trees, flats[0], comparison.budget.per_step))
    for temperature in SPARSE_TEMPERATURES:
        path = study.output_dir / "sparse" / f"snr-{temperature}.json"
        jobs.append((path, "chains_of_8", temperature, SPARSE_TREES, GRPO[0], 8000))
    futures = {}
    for path, task, temperature, trees, flat, per_step in jobs:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            workload = built_in(task, study.output_dir / "base_models", temperature=temperature)
            arguments = workload, trees, flat, per_step, GRADIENT_BATCHES
            futures[study.workers.pool.submit(measure_snr, *arguments)] = path
    for future in as_completed(futures):
        path = futures[future]
        print(*(f"{path.parent.name} {json.dumps(result)}" for result in future.result()), sep="\n", flush=True)
        path.write_text(json.dumps(future.result()) + "\n")


def report_comparison(study: Study, name: str, results_dir: Path) -> dict[str, Any] | None:
    """Table, figures and numbers of one comparison; `None` if its runs are not complete."""
    if not study.is_chosen(name):
        return None
    tests = {family: study.tests(name, family) for family in COMPARISONS[name].families}
    paths = {family: study.paths(name, runs) for family, runs in tests.items()}
    if any(len(paths[family]) < len(runs) for family, runs in tests.items()):
        return None
    curves = {family: [read_curve(path) for path in paths[family]] for family in tests}
    write_task(name, curves, results_dir)
    if name in HEADLINE:
        draw_diagnostics(name, curves, results_dir / f"{name}_diagnostics.png")
    snr_path = study.output_dir / name / "snr.json"
    snr = json.loads(snr_path.read_text())[0] if snr_path.exists() else {"snr_ratio": None}
    chosen = {
        family: {"method": runs[0].method.name, "learning_rate": runs[0].learning_rate}
        for family, runs in tests.items()
    }
    return {**snr, **compare(curves["TreeRPO"], curves["GRPO"]), "chosen": chosen, "diagnostics": diagnostics(curves)}


def write_report(study: Study, results_dir: Path) -> None:
    """Everything in `results_dir`, from the comparisons and ablations that are complete."""
    results_dir.mkdir(parents=True, exist_ok=True)
    reports = {name: report_comparison(study, name, results_dir) for name in COMPARISONS}
    summary = {name: report for name, report in reports.items() if report is not None}
    (results_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (results_dir / "headline.md").write_text(headline_table(summary))
    sparse = [json.loads(path.read_text()) for path in sorted(study.output_dir.glob("sparse/*.json"))]
    if sparse:
        (results_dir / "snr_by_success.json").write_text(json.dumps(sparse, indent=2) + "\n")
        draw_snr([result for results in sparse for result in results], results_dir / "snr_by_success.png")
    if ABLATION_TASK in summary:
        ablations = {
            group: {
                method.name: [
                    read_curve(path)
                    for path in study.paths(ABLATION_TASK, [r for r in study.ablations(group) if r.method == method])
                ]
                for method in methods
            }
            for group, methods in ABLATIONS.items()
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
