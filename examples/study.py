# /// script
# dependencies = [
#     "treerpo-trl[compare]",
# ]
# ///
"""The study behind `examples/results/`: TreeRPO against GRPO on the built-in tasks, and what its options contribute.

    python examples/study.py --output_dir study-output --results_dir examples/results

It takes many hours on two CPU cores and goes on where it was stopped. The report has what is complete. Stages, in this
order:

- `credit`: GRPO, flat samples and trees with the credit of the whole batch, and the paper's credit, on every task at
  equal sampled tokens. Learning rates, shapes and GRPO's group size are chosen on validation problems. The result is
  measured on test problems with other seeds.
- `prompts`: the same at as many prompts, whatever is sampled for each.
- `lengths`: credit that counts tokens, where responses vary in length.
- `gradients`: the signal-to-noise ratio of the gradient on the base models.
- `report`: tables, figures and JSON from all runs that are complete.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare_grpo import Workers, choose, tuning_runs
from compare_plan import Method, Run, is_complete
from compare_report import finals, read_curve
from compare_workload import PRETRAINED, built_in
from gradient_snr import measure_snr
from study_plan import COMPARISONS, CREDIT, GRADIENT_BATCHES, LENGTHS, PROMPTS, RATE, Comparison
from study_report import (
    Found,
    add_snr,
    comparison_report,
    draw_overview,
    headline_table,
    overview_table,
    summarize,
    write_comparison,
)
from tasks import TASKS


REPORTS, SNR = "comparisons.json", "snr.json"  # files of the results, and of a comparison's runs
FEWEST_SEEDS = 2  # of a result that is reported
QUICK = 1.1  # times GRPO's CPU seconds: where time is what counts, the best of those that take no longer is reported


class Study:
    """The runs of the study, in one folder a comparison, and what has been chosen from them.

    Args:
        results_dir: Where reports are; what an earlier one has chosen holds until it is chosen again.
        names: Comparisons to run; by default, all.
    """

    def __init__(self, output_dir: Path, results_dir: Path, num_workers: int, names: Sequence[str] | None = None):
        self.output_dir, self.results_dir = output_dir, results_dir
        self.names = names or list(COMPARISONS)
        self.workers = Workers(output_dir / "workers.log", num_workers)

    def template(self, name: str) -> Run:
        """A run of a comparison; method, learning rate and seed are to be replaced."""
        comparison = COMPARISONS[name]
        return Run(
            workload=built_in(comparison.task, self.output_dir / "base_models", **comparison.workload),
            method=comparison.families["GRPO"][0],
            budget=comparison.budget,
            learning_rate=RATE,
            seed=0,
            split="test",
            num_evaluations=comparison.num_evaluations,
            curve_problems=comparison.curve_problems,
            final_samples=comparison.final_samples,
        )

    def execute(self, runs: Sequence[tuple[str, Run]]) -> None:
        """(name of the comparison, run) pairs."""
        self.workers.execute_all([(run, self.output_dir / name) for name, run in runs])

    def grid(self, name: str, *families: str) -> list[Run]:
        """The runs from which the method and learning rate of a family, or the best of several, are chosen."""
        comparison = COMPARISONS[name]
        methods = [method for family in families for method in comparison.families[family]]
        return tuning_runs(self.template(name), methods, comparison.learning_rates, comparison.tuning_seeds)

    def chosen(self, name: str, *families: str) -> tuple[Method, float] | None:
        """The best method and learning rate of these families; `None` before their grid is complete."""
        comparison = COMPARISONS[name]
        if not comparison.tuning_seeds:  # there is nothing to choose
            return comparison.families[families[-1]][0], comparison.learning_rates[0]
        grid = self.grid(name, *families)
        if len(self.paths(name, grid)) < len(grid):
            return self.reported(name, *families)
        return choose(grid, self.output_dir / name)

    def reported(self, name: str, *families: str) -> tuple[Method, float] | None:
        """The method and learning rate of one family in the last report."""
        known = self.reports().get(name, {}).get("families", {})
        if len(families) != 1 or families[0] not in known:
            return None
        numbers = known[families[0]]
        methods = {method.name: method for method in COMPARISONS[name].families[families[0]]}
        return methods[numbers["method"]], numbers["learning_rate"]

    def reports(self) -> dict[str, Any]:
        """The last report, by comparison."""
        path = self.results_dir / REPORTS
        return json.loads(path.read_text()) if path.exists() else {}

    def snr(self, name: str) -> dict[str, dict[str, Any]]:
        """Signal-to-noise ratios that were measured, by method."""
        path = self.output_dir / name / SNR
        return {result["treerpo"]: result for result in json.loads(path.read_text())} if path.exists() else {}

    def tests(self, name: str, family: str) -> list[Run]:
        """The runs of the result; none before the method is chosen."""
        chosen = self.chosen(name, family)
        if chosen is None:
            return []
        method, rate = chosen
        template = replace(self.template(name), method=method, learning_rate=rate)
        return [replace(template, seed=seed) for seed in COMPARISONS[name].seeds]

    def compare(self, names: Iterable[str]) -> None:
        """Choose, then measure."""
        names = [name for name in names if name in self.names]
        pairs = [(name, family) for name in names for family in COMPARISONS[name].families]
        self.execute([(name, run) for name, family in pairs for run in self.grid(name, family)])
        # Seed by seed, so that an interrupted study has all methods.
        runs = [(name, run) for name, family in pairs for run in self.tests(name, family)]
        self.execute(sorted(runs, key=lambda pair: pair[1].seed))

    def paths(self, name: str, runs: Sequence[Run]) -> list[Path]:
        """Files of those runs that are complete."""
        paths = [self.output_dir / name / f"{run.name}.jsonl" for run in runs]
        return [path for path in paths if is_complete(path)]


def run_comparisons(comparisons: dict[str, Comparison]) -> Callable[[Study], None]:
    """A stage: one comparison after the other."""

    def stage(study: Study) -> None:
        for name in comparisons:
            study.compare([name])

    return stage


def run_gradients(study: Study) -> None:
    """Signal-to-noise ratios of the chosen methods at equal sampled tokens, kept as JSON."""
    futures = {}
    for name, comparison in CREDIT.items():
        # The gradients of all batches are in memory, for which those of a pretrained model are too large.
        if name not in study.names or TASKS[comparison.task].base in PRETRAINED:
            continue
        path = study.output_dir / name / SNR
        chosen = {family: study.chosen(name, family) for family in comparison.families}
        if path.exists() or None in chosen.values():
            continue
        methods = {family: choice[0] for family, choice in chosen.items() if choice is not None}
        flat = methods.pop("GRPO")
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = study.template(name).workload, list(methods.values()), flat, comparison.budget.per_step
        futures[study.workers.pool.submit(measure_snr, *arguments, GRADIENT_BATCHES)] = path
    for future in as_completed(futures):
        path = futures[future]
        print(*(f"{path.parent.name} {json.dumps(result)}" for result in future.result()), sep="\n", flush=True)
        path.write_text(json.dumps(future.result()) + "\n")


def find(study: Study, name: str) -> dict[str, Found]:
    """By family, GRPO first, what the study has found so far; families with too few runs are left out."""
    if not (study.output_dir / name).exists():  # a base model need not be made to find nothing
        return {}
    snr, found = study.snr(name), {}
    for family in COMPARISONS[name].families:
        runs = study.tests(name, family)
        paths = study.paths(name, runs)
        if len(paths) >= FEWEST_SEEDS:
            method, rate = runs[0].method.name, runs[0].learning_rate
            found[family] = Found(method, rate, [read_curve(path) for path in paths], snr.get(method))
    return found if "GRPO" in found else {}


def cost(found: Found) -> float:
    """Mean CPU seconds of a family's runs."""
    return float(finals(found.curves, "cpu_seconds").mean())


def best(study: Study, name: str, found: dict[str, Found], families: Sequence[str]) -> str | None:
    """The best of these families on the validation problems; `None` of none."""
    chosen = study.chosen(name, *families) if families else None
    return next((family for family in families if chosen and found[family].method == chosen[0].name), None)


def write_report(study: Study) -> None:
    """Everything in the study's `results_dir`, from the runs that are complete; what has no runs here stays."""
    results_dir = study.results_dir
    results_dir.mkdir(parents=True, exist_ok=True)
    reports = study.reports()
    for name in COMPARISONS:
        found = find(study, name)
        if len(found) > 1:
            write_comparison(name, found, results_dir)
            reports[name] = comparison_report(found)
            trees = [family for family in found if family not in ("GRPO", "flat")]
            quick = [family for family in trees if cost(found[family]) <= QUICK * cost(found["GRPO"])]
            reports[name]["best"] = best(study, name, found, trees)
            reports[name]["best_time"] = best(study, name, found, quick or trees)
        elif name in reports:
            add_snr(reports[name]["families"], study.snr(name))
    reports = {name: reports[name] for name in COMPARISONS if name in reports}
    summary = {name: summarize(name, reports) for name in CREDIT if name in reports and reports[name]["best"]}
    (results_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (results_dir / REPORTS).write_text(json.dumps(reports, indent=2) + "\n")
    (results_dir / "headline.md").write_text(headline_table(summary))
    (results_dir / "overview.md").write_text(overview_table(reports))
    draw_overview({name: reports[name] for name in CREDIT if name in reports}, results_dir / "overview.png")


STAGES = {
    "credit": run_comparisons(CREDIT),
    "prompts": run_comparisons(PROMPTS),
    "lengths": run_comparisons(LENGTHS),
    "gradients": run_gradients,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output_dir", type=Path, default=Path("study-output"), help="where to keep runs and base models"
    )
    parser.add_argument(
        "--results_dir", type=Path, default=Path("study-output/results"), help="where to write tables and figures"
    )
    parser.add_argument("--stages", nargs="+", choices=[*STAGES, "report"], default=[*STAGES, "report"])
    parser.add_argument("--tasks", nargs="+", choices=list(COMPARISONS), help="limit the stages to these comparisons")
    parser.add_argument("--workers", type=int, default=2, help="how many runs at a time")
    args = parser.parse_args()
    study = Study(args.output_dir, args.results_dir, args.workers, args.tasks)
    for stage in args.stages:
        if stage == "report":
            write_report(study)
        else:
            STAGES[stage](study)


if __name__ == "__main__":
    main()
