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
from dataclasses import dataclass, field, replace
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


def tree(*branching: int, suffix: str = "", **options: Any) -> Method:
    """TreeRPO with this shape, and segments of equal length."""
    return Method(f"treerpo-{suffix or 'x'.join(map(str, branching))}", branching, options=options)


TREERPO = tree(2, 2, 2, 2)
SMALL = tree(4, 2)  # the best of the ablations
GRPO = [Method(f"grpo-{count}", (), count) for count in (8, 4)]
BUDGET = Budget("tokens", total=320_000, per_step=4000)
RATE = 2e-4


@dataclass(frozen=True)
class Comparison:
    """TreeRPO against GRPO on one task.

    Args:
        task: Name in `TASKS`.
        families: What each method is chosen from.
        learning_rates: And each learning rate; with one method and one rate there is nothing to choose.
        tuning_seeds: Seeds of the choice.
        seeds: Seeds of the result.
        temperature: Of the policy.
    """

    task: str
    families: dict[str, list[Method]] = field(default_factory=lambda: {"TreeRPO": [SMALL], "GRPO": GRPO[:1]})
    learning_rates: tuple[float, ...] = (RATE,)
    tuning_seeds: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = BUDGET
    temperature: float = 1.0
    num_evaluations: int = 4


def headline(task: str) -> Comparison:
    """Shapes, GRPO's group size and learning rates chosen on validation problems; five seeds."""
    return Comparison(
        task,
        families={"TreeRPO": [TREERPO, tree(4, 4), tree(8, 2), SMALL], "GRPO": GRPO},
        learning_rates=(1e-4, RATE, 4e-4),
        tuning_seeds=(100, 101),
        seeds=(0, 1, 2, 3, 4),
        num_evaluations=8,
    )


HEADLINE = {"chain_arithmetic": headline("chain_arithmetic"), "countdown": headline("countdown")}
# At the learning rate that both methods have in both of the above, and with as many leaves.
LENGTHS = {name: Comparison(name) for name in ("chains_of_2", "chains_of_4", "chains_of_8")} | {
    # At this temperature 3% of the responses are right.
    "rare_chains": Comparison(
        "chains_of_8",
        families={"TreeRPO": [tree(4, 4, 4)], "GRPO": GRPO[:1]},
        seeds=(0, 1, 2, 3, 4),
        budget=Budget("tokens", total=640_000, per_step=8000),
        temperature=1.2,
    )
}
COMPARISONS = HEADLINE | LENGTHS
ABLATION_TASK, ABLATION_SEEDS = "chain_arithmetic", (100, 101, 102)
LATE = 30  # tokens of the first segment, of the 37 of the longest solution in chain_arithmetic
GRADIENT_BATCHES = 48
SPARSE_TEMPERATURES, SPARSE_TREES = (0.6, 0.8, 1.0, 1.2, 1.4), [TREERPO, tree(4, 4), tree(4, 4, 4)]
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
    "fewer leaves": [TREERPO, tree(2, 2), SMALL, tree(2, 2, 2)],
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
    """Signal-to-noise ratios, kept as JSON: of every comparison, and of long chains from rare to frequent success."""
    jobs = [
        (study.output_dir / name / "snr.json", comparison.task, comparison.temperature,
         comparison.families["TreeRPO"][-1:], comparison.budget.per_step)
        for name, comparison in COMPARISONS.items()
    ]  # fmt: skip
    jobs += [
        (study.output_dir / "sparse" / f"snr-{temperature}.json", "chains_of_8", temperature, SPARSE_TREES, 8000)
        for temperature in SPARSE_TEMPERATURES
    ]
    futures = {}
    for path, task, temperature, trees, per_step in jobs:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            workload = built_in(task, study.output_dir / "base_models", temperature=temperature)
            arguments = workload, trees, GRPO[0], per_step, GRADIENT_BATCHES
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
