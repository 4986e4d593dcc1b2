"""What `study.py` writes: a table, a figure and the curves of each comparison, and an overview of all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from compare_report import Curve, compare, draw, finals, table
from matplotlib.patches import Patch


LABELS = {
    "GRPO": "GRPO",
    "paper": "trees, the paper's credit",
    "flat": "flat samples, optimal baseline",
    "tree": "trees, optimal baseline",
    "forks": "forks, optimal baseline",
}
NUM_SAMPLES = 8  # of a test problem, unless a comparison says otherwise


@dataclass(frozen=True)
class Found:
    """What the study found of one family.

    Args:
        method, learning_rate: What was chosen.
        curves: Its runs on test problems.
        snr: What `gradient_snr` says of it against GRPO.
    """

    method: str
    learning_rate: float
    curves: Sequence[Curve]
    snr: Mapping[str, Any] | None = None


def write_comparison(name: str, found: Mapping[str, Found], results_dir: Path) -> None:
    """`NAME.md`, `NAME.png` and `NAME.json`: the last has every measurement of every run."""
    curves = {LABELS.get(family, family): entry.curves for family, entry in found.items()}
    (results_dir / f"{name}.md").write_text(table(curves) + "\n")
    draw(curves, name, results_dir / f"{name}.png")
    runs = {family: [plain(curve) for curve in entry.curves] for family, entry in found.items()}
    (results_dir / f"{name}.json").write_text(json.dumps(runs) + "\n")


def plain(curve: Curve) -> dict[str, Any]:
    """A run's measurements as JSON."""
    columns = ("tokens", "seconds", "cpu_seconds", "pass_at_1", "mean_length")
    kept = ("prompts", "mean_length_correct", "truncated", "num_samples", "pass_at_k")
    metrics = [{name: value for name, value in step.items() if is_diagnostic(name)} for step in curve.metrics]
    return {
        **{name: getattr(curve, name).tolist() for name in columns},
        **{name: curve.final[name] for name in kept},
        "metrics": metrics,
    }


def is_diagnostic(name: str) -> bool:
    """Whether a metric goes into the results."""
    names = ("tree/trained_tokens", "tree/token_sharing", "entropy", "frac_reward_zero_std", "grad_norm")
    return name.startswith(("tree/kept_groups", "tree/advantage_abs")) or name in names


def comparison_report(found: Mapping[str, Found]) -> dict[str, Any]:
    """The numbers of one comparison: each family's own, and those of its difference from GRPO."""
    flat = found["GRPO"].curves
    families = {}
    for family, entry in found.items():
        numbers: dict[str, Any] = {"method": entry.method, "learning_rate": entry.learning_rate}
        numbers |= {"seeds": len(entry.curves), "entropy": end_entropy(entry.curves)}
        for name in ("pass_at_1", "num_samples", "pass_at_k", "mean_length", "tokens", "prompts", "cpu_seconds"):
            numbers[name] = float(finals(entry.curves, name).mean())
        if family != "GRPO":
            numbers["against_grpo"] = compare(entry.curves, flat)
            numbers |= {"snr_ratio": None, "snr_ratio_ci": [None, None]}
        if family not in ("GRPO", "flat") and "flat" in found:
            numbers["against_flat"] = compare(entry.curves, found["flat"].curves)
        families[family] = numbers
    add_snr(families, {entry.method: entry.snr for entry in found.values() if entry.snr})
    return {"pass_at_1_before": float(np.mean([curve.pass_at_1[0] for curve in flat])), "families": families}


def add_snr(families: Mapping[str, dict[str, Any]], snr: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the signal-to-noise ratios, by method, into the numbers of the families."""
    for numbers in families.values():
        if numbers["method"] in snr:
            numbers |= {key: snr[numbers["method"]][key] for key in ("snr_ratio", "snr_ratio_ci")}


def end_entropy(curves: Sequence[Curve]) -> float:
    """Entropy of the policy's tokens over the last stretch of training, the mean of the runs."""
    return float(np.mean([curve.metrics[-1]["entropy"] for curve in curves]))


def summarize(name: str, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The best trees of a task against GRPO under the three budgets, and flat samples with the same credit.

    Differences are in points of Pass@1. Each budget has the trees that were chosen for it.
    """
    report, prompts = reports[name], reports.get(f"{name}_prompts")
    families = report["families"]
    summary = {
        "method": families[report["best"]]["method"],
        "baseline": families["GRPO"]["method"],
        "pass_at_1_before": report["pass_at_1_before"],
        "pass_at_1_baseline": families["GRPO"]["pass_at_1"],
    }
    for prefix, family, quick in (("", report["best"], report["best_time"]), ("flat_", "flat", "flat")):
        if family not in families:
            continue
        summary |= {prefix + key: value for key, value in differences(families[family]).items()}
        summary[f"{prefix}method_time"] = families[quick]["method"]
        source = families[quick]["against_grpo"]
        summary |= in_points(f"{prefix}delta_time", source, "delta_at_equal_cpu_seconds")
        if prompts is not None:
            fitting = prompts["best"] if prefix == "" else "flat"
            if fitting in prompts["families"]:
                found = prompts["families"][fitting]
                summary[f"{prefix}method_prompts"] = found["method"]
                summary |= in_points(f"{prefix}delta_prompts", found["against_grpo"], "delta_pass_at_1")
    return summary


def differences(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A family's numbers of the summary, from those of its comparison with GRPO."""
    against = numbers["against_grpo"]
    return {
        "pass_at_1": numbers["pass_at_1"],
        **in_points("delta_tokens", against, "delta_pass_at_1"),
        "length_ratio": against["length_ratio"],
        "snr_ratio": numbers["snr_ratio"],
        "seeds": against["seeds"],
    }


def in_points(name: str, numbers: Mapping[str, Any], source: str) -> dict[str, float]:
    """A difference of Pass@1 with its interval, in points."""
    low, high = numbers[f"{source}_ci"]
    values = {name: numbers[source], f"{name}_low": low, f"{name}_high": high}
    return {key: round(100 * value, 2) for key, value in values.items()}


def headline_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a task, as in docs/results.md."""
    columns = ["task", "Pass@1 before", "GRPO", "trees", "points above GRPO, equal tokens", "equal CPU time",
               "equal prompts", "flat samples: equal tokens", "equal CPU time", "equal prompts", "seeds"]  # fmt: skip
    lines = [columns, ["---"] * len(columns)]
    for task, numbers in summary.items():
        before, baseline, trees = (
            f"{numbers[name]:.3f}" for name in ("pass_at_1_before", "pass_at_1_baseline", "pass_at_1")
        )
        deltas = [
            prefix + name for prefix in ("", "flat_") for name in ("delta_tokens", "delta_time", "delta_prompts")
        ]
        lines.append(
            [
                task,
                before,
                f"{baseline} ({numbers['baseline']})",
                f"{trees} ({numbers['method']})",
                *(show_delta(numbers, name) for name in deltas),
                str(numbers["seeds"]),
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def show_delta(summary: Mapping[str, Any], name: str) -> str:
    """A difference of the summary with its interval and its method, if that is another; nothing if not measured."""
    if name not in summary:
        return ""
    method = summary.get(name.replace("delta", "method"), summary.get("method"))
    other = "" if name.startswith("flat_") or method == summary.get("method") else f", {method}"
    return f"{summary[name]:+.1f} ({summary[f'{name}_low']:+.1f} to {summary[f'{name}_high']:+.1f}{other})"


def overview_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a method of every comparison."""
    columns = ["task", "method", "seeds", "Pass@1", "points above GRPO (95%)", "at equal CPU time",
               f"pass@{NUM_SAMPLES}", "entropy", "length", "tokens, thousands", "prompts", "CPU seconds"]  # fmt: skip
    lines = [columns, ["---"] * len(columns)]
    for name, report in reports.items():
        for numbers in report["families"].values():
            against = numbers.get("against_grpo")
            points = [show_points(against, key) for key in ("delta_pass_at_1", "delta_at_equal_cpu_seconds")]
            lines.append(
                [
                    name,
                    numbers["method"],
                    str(numbers["seeds"]),
                    f"{numbers['pass_at_1']:.3f}",
                    *points,
                    show_pass_at_k(numbers),
                    f"{numbers['entropy']:.3f}",
                    f"{numbers['mean_length']:.1f}",
                    f"{numbers['tokens'] / 1000:.0f}",
                    f"{numbers['prompts']:.0f}",
                    f"{numbers['cpu_seconds']:.0f}",
                ]
            )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def show_pass_at_k(numbers: Mapping[str, Any]) -> str:
    """The share of problems that one of k samples solves; k is said where it is not that of the column."""
    k = round(numbers.get("num_samples", NUM_SAMPLES))
    return f"{numbers['pass_at_k']:.3f}" + ("" if k == NUM_SAMPLES else f" (pass@{k})")


def show_points(numbers: Mapping[str, Any] | None, source: str) -> str:
    """A difference of Pass@1 with its interval, in points, for a table."""
    return "" if numbers is None else show_delta(in_points("delta", numbers, source), "delta")


def draw_overview(reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Points of Pass@1 above GRPO at equal sampled tokens and at equal time, a bar a method, tasks side by side."""
    shown = ("paper", "flat", "tree", "forks")
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), layout="constrained", sharex=True)
    sources = (("delta_pass_at_1", "equal sampled tokens"), ("delta_at_equal_cpu_seconds", "equal CPU time"))
    for axis, (source, title) in zip(axes, sources, strict=True):
        for index, family in enumerate(shown):
            for place, report in enumerate(reports.values()):
                if family not in report["families"]:
                    continue
                delta, low, high = in_points("", report["families"][family]["against_grpo"], source).values()
                x = place + 0.2 * (index - 1.5)
                axis.bar(x, delta, 0.18, color=f"C{index}")
                axis.plot([x, x], [low, high], color="black", linewidth=1)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylim(-15, 45)  # the intervals of two seeds go further
        axis.set_title(f"Pass@1 above GRPO at {title}, points", loc="left", fontsize="medium")
        axis.grid(axis="y", alpha=0.3)
    bars = [Patch(color=f"C{index}", label=LABELS[family]) for index, family in enumerate(shown)]
    axes[0].legend(handles=bars, fontsize="small", ncols=2)
    axes[1].set_xticks(range(len(reports)), [name.replace("_", "\n") for name in reports])
    figure.savefig(path, dpi=100)
    plt.close(figure)
