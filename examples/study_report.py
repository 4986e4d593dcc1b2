"""What `study.py` writes: a table, a figure and the curves of each task, tables of the ablations, diagnostics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from compare_report import Curve, draw, finals, interval, table, welch


def write_task(task: str, curves: Mapping[str, Sequence[Curve]], results_dir: Path) -> None:
    """`TASK.md`, `TASK.png` and `TASK.json`: the last has every measurement of every run."""
    (results_dir / f"{task}.md").write_text(table(curves) + "\n")
    draw(curves, task, results_dir / f"{task}.png")
    runs = {family: [plain(curve) for curve in family_curves] for family, family_curves in curves.items()}
    (results_dir / f"{task}.json").write_text(json.dumps(runs) + "\n")


def plain(curve: Curve) -> dict[str, Any]:
    """A run's measurements as JSON."""
    columns = {name: getattr(curve, name).tolist() for name in ("tokens", "seconds", "cpu_seconds")}
    columns |= {name: getattr(curve, name).tolist() for name in ("pass_at_1", "mean_length")}
    return columns | {"mean_length_correct": curve.final["mean_length_correct"], "truncated": curve.final["truncated"]}


def diagnostics(curves: Mapping[str, Sequence[Curve]]) -> dict[str, dict[str, list[float]]]:
    """Per family and metric, [E] means over runs at each evaluation: kept groups, advantages, entropy."""
    result: dict[str, dict[str, list[float]]] = {}
    for family, runs in curves.items():
        names = sorted({name for run in runs for metrics in run.metrics for name in metrics if is_diagnostic(name)})
        result[family] = {
            name: [
                round(float(np.mean([step[name] for step in steps if name in step])), 5)
                for steps in zip(*(run.metrics[1:] for run in runs), strict=False)
                if any(name in step for step in steps)
            ]
            for name in names
        }
    return result


def is_diagnostic(name: str) -> bool:
    """Whether a metric goes into the summary."""
    names = ("tree/trained_tokens", "tree/token_sharing", "entropy", "frac_reward_zero_std", "grad_norm")
    return name.startswith(("tree/kept_groups", "tree/advantage_abs")) or name in names


def draw_diagnostics(task: str, curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Entropy, kept groups and size of advantages over training."""
    numbers = diagnostics(curves)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for family, metrics in numbers.items():
        axes[0].plot(metrics["entropy"], marker=".", label=family)
    axes[0].set_title("entropy of the policy")
    for name, values in numbers["TreeRPO"].items():
        for axis, prefix in ((axes[1], "tree/kept_groups/"), (axes[2], "tree/advantage_abs/")):
            if name.startswith(prefix):
                axis.plot(values, marker=".", label=name.removeprefix(prefix).replace("_", " "))
    zero = numbers["GRPO"].get("frac_reward_zero_std", [])
    axes[1].plot([1 - share for share in zero], marker=".", color="black", linestyle=":", label="GRPO")
    axes[1].set_title("share of groups that are trained")
    axes[2].set_title("mean size of trained advantages")
    for axis in axes:
        axis.set_xlabel("evaluation")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper right")
        axis.margins(y=0.35)
    figure.suptitle(task)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def ablation_table(ablations: Mapping[str, Mapping[str, Sequence[Curve]]]) -> str:
    """Markdown: a row a variant, its difference from the first of its group with a 95% interval over seeds."""
    lines = [
        "| group | variant | seeds | Pass@1 | difference from the first (95%) | response length | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, variants in ablations.items():
        first = next(iter(variants.values()))
        for name, curves in variants.items():
            if len(curves) < 2 or len(first) < 2:
                continue
            scores = finals(curves, "pass_at_1")
            delta, low, high = welch(scores, finals(first, "pass_at_1"))
            difference = "" if curves is first else in_points(delta, (low, high))
            length, seconds = finals(curves, "mean_length").mean(), finals(curves, "cpu_seconds").mean()
            cells = [group, name, len(curves), f"{scores.mean():.3f}", difference, f"{length:.1f}", f"{seconds:.0f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def draw_ablations(ablations: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path) -> None:
    """Pass@1 of every variant with its 95% interval over seeds."""
    figure, axis = plt.subplots(figsize=(7, 7), layout="constrained")
    labels: list[str] = []
    for index, (group, variants) in enumerate(ablations.items()):
        for name, curves in variants.items():
            if len(curves) < 2:
                continue
            scores = finals(curves, "pass_at_1")
            axis.plot(interval(scores), [len(labels)] * 2, color=f"C{index}")
            axis.plot(scores.mean(), len(labels), "o", color=f"C{index}")
            labels.append(f"{group}: {name.removeprefix('treerpo-')}")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("Pass@1 on validation problems")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_snr(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The ratio of signal-to-noise ratios against the policy's share of right answers, a line a shape."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for index, name in enumerate(dict.fromkeys(result["treerpo"] for result in results)):
        points = sorted((r["pass_at_1"], r["snr_ratio"], *r["snr_ratio_ci"]) for r in results if r["treerpo"] == name)
        x, ratio, low, high = np.array(points).T
        axis.errorbar(x, ratio, yerr=[ratio - low, high - ratio], marker="o", color=f"C{index}", label=name, capsize=3)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(ticks := (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), map(str, ticks))
    axis.minorticks_off()
    axis.set_xlabel("Pass@1 of the policy")
    axis.set_ylabel("gradient SNR, TreeRPO / GRPO")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def headline_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a task, as in the README."""
    columns = [
        "task",
        "Pass@1 before",
        "GRPO",
        "TreeRPO",
        "difference at equal tokens, points",
        "at equal CPU time",
        "length, TreeRPO / GRPO",
        "tokens to parity",
        "CPU time, TreeRPO / GRPO",
        "gradient SNR, TreeRPO / GRPO",
    ]
    lines = [columns, ["---"] * len(columns)]
    for task, numbers in summary.items():
        shares = [f"{numbers[name]:.3f}" for name in ("pass_at_1_before", "pass_at_1_grpo", "pass_at_1_treerpo")]
        ends = [numbers["ci_low"], numbers["ci_high"]]
        timed = in_points(numbers["delta_at_equal_cpu_seconds"], numbers["delta_at_equal_cpu_seconds_ci"])
        length = "{:.3f} ({:.3f} to {:.3f})".format(numbers["length_ratio"], *numbers["length_ratio_ci"])
        parity = "not reached" if numbers["tokens_to_parity"] is None else f"{numbers['tokens_to_parity']:.2f}"
        snr = ""
        if numbers["snr_ratio"] is not None:
            snr = "{:.2f} ({:.2f} to {:.2f})".format(numbers["snr_ratio"], *numbers["snr_ratio_ci"])
        points = in_points(numbers["delta_pass_at_1"], ends)
        lines.append([task, *shares, points, timed, length, parity, f"{numbers['cpu_seconds_ratio']:.2f}", snr])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def in_points(delta: float, ends: Sequence[float]) -> str:
    """A difference of Pass@1 with its interval, in percentage points."""
    low, high = ends
    return f"{100 * delta:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
