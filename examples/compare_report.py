"""What a comparison found: differences with 95% intervals over seeds and problems, a table, and figures.

Legend of shapes: R runs (seeds) of one method, P problems.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from compare_plan import read_records
from scipy import stats


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """One run's measurements, the first before training.

    Args:
        tokens, seconds, cpu_seconds, pass_at_1, mean_length: [E] at each evaluation.
        problem_scores: [P] mean reward of each problem at the end.
        metrics: [E] what the trainer logged, averaged since the evaluation before; the first is empty.
        final: The whole last record.
    """

    tokens: np.ndarray
    seconds: np.ndarray
    cpu_seconds: np.ndarray
    pass_at_1: np.ndarray
    mean_length: np.ndarray
    problem_scores: np.ndarray
    metrics: list[dict[str, float]]
    final: dict[str, Any]


def read_curve(path: Path) -> Curve:
    """The measurements of a complete run."""
    _, *records = read_records(path)
    columns = {
        name: np.array([record[name] for record in records], dtype=float)
        for name in ("tokens", "seconds", "cpu_seconds", "pass_at_1", "mean_length")
    }
    return Curve(
        **columns,
        problem_scores=np.array(records[-1]["problem_scores"], dtype=float),
        metrics=[record["metrics"] for record in records],
        final=records[-1],
    )


def finals(curves: Sequence[Curve], name: str) -> np.ndarray:
    """[R] a number of the last record of each run."""
    return np.array([curve.final[name] for curve in curves], dtype=float)


def welch(a: np.ndarray, b: np.ndarray, extra_variance: float = 0.0) -> tuple[float, float, float]:
    """Difference of means a - b with its interval: Welch's t over seeds.

    Args:
        a, b: [R] one number a seed.
        extra_variance: Variance of the difference that seeds do not show, added to theirs.
    """
    variances = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    variance = sum(variances)
    if variance == 0:
        freedom = len(a) + len(b) - 2.0
    else:
        freedom = variance**2 / (variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance + extra_variance)
    delta = float(a.mean() - b.mean())
    return delta, delta - half, delta + half


def pass_at_1_difference(a: Sequence[Curve], b: Sequence[Curve]) -> tuple[float, float, float]:
    """Pass@1 of a - b at the end, with an interval over seeds and problems.

    Runs of other seeds differ, and all of them are measured on the same P problems, of many that could have been
    drawn: the variance of the paired differences over problems is added to that over seeds. It holds the noise of
    sampling responses a second time, so the interval is rather too wide than too narrow.
    """
    difference = np.mean([c.problem_scores for c in a], axis=0) - np.mean([c.problem_scores for c in b], axis=0)
    difference = difference[~np.isnan(difference)]  # problems that no reward function could score
    over_problems = difference.var(ddof=1) / len(difference)
    return welch(finals(a, "pass_at_1"), finals(b, "pass_at_1"), over_problems)


def difference_at_equal_cost(
    a: Sequence[Curve], b: Sequence[Curve], axis: str = "cpu_seconds"
) -> tuple[float, float, float]:
    """Pass@1 of a - b where both have spent what the cheaper one spends in all, with an interval over seeds.

    Linear between the measurements on the way, which have fewer problems than the last one, and so more noise.
    """
    spent = min(float(np.mean([getattr(curve, axis)[-1] for curve in curves])) for curves in (a, b))
    at_spent = [
        np.array([np.interp(spent, getattr(curve, axis), curve.pass_at_1) for curve in curves]) for curves in (a, b)
    ]
    return welch(*at_spent)


def length_ratio(a: Sequence[Curve], b: Sequence[Curve]) -> tuple[float, float, float]:
    """Mean response length of a / b at the end, with an interval over seeds (of the difference of logarithms)."""
    ratio, low, high = welch(np.log(finals(a, "mean_length")), np.log(finals(b, "mean_length")))
    return math.exp(ratio), math.exp(low), math.exp(high)


def parity(a: Sequence[Curve], b: Sequence[Curve], axis: str = "tokens") -> float | None:
    """What a spends to reach b's final Pass@1, as a share of what b spent; `None` if it never does.

    Mean curves over seeds, linear between evaluations.
    """
    goal = float(np.mean(finals(b, "pass_at_1")))
    spent, reached = mean_curve(a, axis, "pass_at_1")
    total = float(np.mean([getattr(curve, axis)[-1] for curve in b]))
    for index in range(len(spent)):
        if reached[index] >= goal:
            if index == 0:
                return 0.0
            share = (goal - reached[index - 1]) / (reached[index] - reached[index - 1])
            return float((spent[index - 1] + share * (spent[index] - spent[index - 1])) / total)
    return None


def mean_curve(curves: Sequence[Curve], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """[E] mean x and mean y over runs, evaluation by evaluation."""
    count = min(len(curve.tokens) for curve in curves)
    return (
        np.mean([getattr(curve, x)[:count] for curve in curves], axis=0),
        np.mean([getattr(curve, y)[:count] for curve in curves], axis=0),
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """Student's t interval of a mean over seeds."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def compare(tree: Sequence[Curve], flat: Sequence[Curve]) -> dict[str, Any]:
    """The headline numbers of TreeRPO against GRPO."""
    delta, low, high = pass_at_1_difference(tree, flat)
    ratio, ratio_low, ratio_high = length_ratio(tree, flat)
    timed, timed_low, timed_high = difference_at_equal_cost(tree, flat)
    tree_tokens, flat_tokens = finals(tree, "tokens").mean(), finals(flat, "tokens").mean()
    return {
        "pass_at_1_before": float(np.mean([curve.pass_at_1[0] for curve in [*tree, *flat]])),
        "pass_at_1_treerpo": float(finals(tree, "pass_at_1").mean()),
        "pass_at_1_grpo": float(finals(flat, "pass_at_1").mean()),
        "delta_pass_at_1": delta,
        "delta_pass_at_1_ci": [low, high],
        "length_treerpo": float(finals(tree, "mean_length").mean()),
        "length_grpo": float(finals(flat, "mean_length").mean()),
        "length_ratio": ratio,
        "length_ratio_ci": [ratio_low, ratio_high],
        "tokens_to_parity": parity(tree, flat),
        "seconds_to_parity": parity(tree, flat, "seconds"),
        "cpu_seconds_to_parity": parity(tree, flat, "cpu_seconds"),
        "seeds": min(len(tree), len(flat)),
        "token_mismatch": abs(tree_tokens - flat_tokens) / flat_tokens,
        "delta_at_equal_cpu_seconds": timed,
        "delta_at_equal_cpu_seconds_ci": [timed_low, timed_high],
        "cpu_seconds_ratio": float(finals(tree, "cpu_seconds").mean() / finals(flat, "cpu_seconds").mean()),
    }


def table(methods: dict[str, Sequence[Curve]]) -> str:
    """A Markdown table: a row a method, means over seeds with 95% intervals."""
    lines = [
        "| method | seeds | Pass@1 | response length | correct only | truncated | sampled tokens | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, curves in methods.items():
        cells = []
        for column, places in (("pass_at_1", 4), ("mean_length", 2), ("mean_length_correct", 2), ("truncated", 4)):
            values = finals(curves, column)
            low, high = interval(values)
            cells.append(f"{values.mean():.{places}f} ({low:.{places}f} - {high:.{places}f})")
        tokens, seconds = finals(curves, "tokens").mean(), finals(curves, "cpu_seconds").mean()
        lines.append(f"| {name} | {len(curves)} | {' | '.join(cells)} | {tokens:.0f} | {seconds:.1f} |")
    return "\n".join(lines)


def draw(methods: dict[str, Sequence[Curve]], title: str, path: Path) -> None:
    """Pass@1 and response length against sampled tokens and time: means over seeds, and every run thinly."""
    panels = [
        ("tokens", "sampled tokens, thousands", 1000),
        ("seconds", "seconds of training", 1),
        ("cpu_seconds", "CPU seconds of training", 1),
    ]
    rows = [("pass_at_1", "Pass@1"), ("mean_length", "response length (tokens)")]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex="col", sharey="row", layout="constrained")
    for row, (y, y_label) in enumerate(rows):
        for column, (x, x_label, unit) in enumerate(panels):
            axis = axes[row][column]
            for index, (name, curves) in enumerate(methods.items()):
                color = f"C{index}"
                for curve in curves:
                    axis.plot(getattr(curve, x) / unit, getattr(curve, y), color=color, alpha=0.25, linewidth=0.8)
                spent, reached = mean_curve(curves, x, y)
                axis.plot(spent / unit, reached, color=color, linewidth=2, label=name)
            axis.grid(alpha=0.3)
            if row == 1:
                axis.set_xlabel(x_label)
            if column == 0:
                axis.set_ylabel(y_label)
    axes[0][0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)
