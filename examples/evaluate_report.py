"""What `evaluate.py` says of responses: the numbers of a run, two runs compared, as tables and as JSON."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import differences, read_responses
from rich.console import Console
from rich.table import Table

from treerpo_trl.evaluation import Response, mean, summarize
from treerpo_trl.statistics import (
    bootstrap_interval,
    majority_at_k,
    paired_bootstrap,
    pass_at_k,
    ratio_interval,
    sign_flip_test,
)


def by_problem(records: Sequence[dict[str, Any]], num_samples: int) -> list[list[dict[str, Any]]]:
    """The records, which come in order, problem by problem."""
    return [list(records[start : start + num_samples]) for start in range(0, len(records), num_samples)]


def measure(records: Sequence[dict[str, Any]], num_samples: int, ks: Sequence[int]) -> dict[str, Any]:
    """The numbers of one dataset. Responses and problems without a reward are in the lengths only."""
    names = ("problem", "sample", "text", "length", "finished", "reward")
    responses = [Response(**{name: record[name] for name in names}) for record in records]
    result = summarize(responses, len(records) // num_samples, num_samples)
    scores = [score for score in result.problem_scores if score is not None]
    numbers: dict[str, Any] = {"pass_at_1": result.pass_at_1, "scores": scores}
    scored = [
        [record for record in group if record["reward"] is not None] for group in by_problem(records, num_samples)
    ]
    has_answers = any(record["answer"] is not None for record in records)
    for k in ks:
        groups = [group for group in scored if len(group) >= k]
        correct = [sum(record["reward"] >= 1 for record in group) for group in groups]
        numbers[f"pass_at_{k}"] = mean([pass_at_k(len(g), c, k) for g, c in zip(groups, correct, strict=True)])
        wins = [majority_at_k([vote_of(record) for record in group], True, k) for group in groups]
        numbers[f"majority_at_{k}"] = mean(wins) if has_answers else math.nan
    return numbers | {
        "mean_length": result.mean_length,
        "mean_length_correct": result.mean_length_correct,
        "truncated": result.truncated,
        "num_problems": result.num_problems,
        "num_unscored": result.num_problems - len(scores),
    }


def vote_of(record: dict[str, Any]) -> str | bool | None:
    """What a response votes for: True for the right answer in any form, a wrong answer, or None if it has none."""
    return True if record["answer"] is not None and record["reward"] >= 1 else record["answer"]


def summarize_all(records: dict[str, list[dict[str, Any]]], num_samples: int, ks: Sequence[int]) -> dict[str, Any]:
    """The numbers of every dataset and, of several, their macro mean: the mean over datasets."""
    table = {name: measure(rows, num_samples, ks) for name, rows in records.items()}
    groups = {name: numbers.pop("scores") for name, numbers in table.items()}
    if len(table) > 1:
        keys = [key for key in next(iter(table.values())) if not key.startswith("num_")]
        table["macro mean"] = {key: mean([numbers[key] for numbers in table.values()]) for key in keys}
    for name, numbers in table.items():
        chosen = [groups[name]] if name in groups else list(groups.values())
        numbers["pass_at_1_interval"] = bootstrap_interval(chosen) if all(chosen) else (math.nan, math.nan)
    return table


def read_columns(path: Path) -> tuple[dict[str, Any], list[float | None], list[float]]:
    """The settings of a file, and the mean reward and the mean length of each problem."""
    settings, records = read_responses(path)
    if len(records) != settings["num_responses"]:
        raise ValueError(
            f"{path} holds {len(records)} of {settings['num_responses']} responses; start its evaluation again, which "
            "goes on where it stopped"
        )
    scores: list[float | None] = []
    lengths = []
    for group in by_problem(records, settings["num_samples"]):
        rewards = [record["reward"] for record in group if record["reward"] is not None]
        scores.append(mean(rewards) if rewards else None)
        lengths.append(mean([record["length"] for record in group]))
    return settings, scores, lengths


def pair_columns(first: Path, second: Path) -> dict[str, list[list[float]]]:
    """The scores and lengths of the problems that both runs scored, each a list of one dataset."""
    (settings, *columns), (other_settings, *other_columns) = read_columns(first), read_columns(second)
    if settings["problems"] != other_settings["problems"]:
        raise ValueError(
            f"{first} is of {settings['dataset_name']} ({len(columns[0])} problems) and {second} of "
            f"{other_settings['dataset_name']} ({len(other_columns[0])} problems), which are not the same problems; "
            "compare runs on one dataset"
        )
    varied = ("model", "base_model", "seed", "batch_size", "dataset_", "num_responses")  # what one may compare
    for difference in differences(settings, other_settings):
        if not difference.startswith(varied):
            print(f"Note: the runs differ also in {difference}", file=sys.stderr)
    rows = zip(*columns, *other_columns, strict=True)
    both = [row for row in rows if row[0] is not None and row[2] is not None]
    if not both:
        raise ValueError(f"{first} and {second} have no problem that both scored; use a reward that scores them")
    names = ("scores", "lengths", "other_scores", "other_lengths")
    return {name: [list(column)] for name, column in zip(names, zip(*both, strict=True), strict=True)}


def compare_columns(columns: dict[str, list[list[float]]]) -> dict[str, Any]:
    """The second run against the first, on one dataset or on the macro mean of several."""
    scores, other_scores = columns["scores"], columns["other_scores"]
    lengths, other_lengths = columns["lengths"], columns["other_lengths"]
    pass_at_1 = [mean([mean(group) for group in groups]) for groups in (scores, other_scores)]
    mean_length = [mean([mean(group) for group in groups]) for groups in (lengths, other_lengths)]
    return {
        "pass_at_1": pass_at_1,
        "difference": pass_at_1[1] - pass_at_1[0],
        "difference_interval": paired_bootstrap(scores, other_scores),
        "p_value": sign_flip_test(scores, other_scores),
        "mean_length": mean_length,
        "length_ratio": mean_length[1] / mean_length[0],
        "length_ratio_interval": ratio_interval(lengths, other_lengths),
        "num_problems": sum(map(len, scores)),
    }


def compare_all(first: Path, second: Path) -> dict[str, Any]:
    """Two files of responses, or two folders with files of the same names and the macro mean over them."""
    for path in (first, second):
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}; give what evaluate.py wrote")
    pairs = {first.stem: (first, second)}
    if first.is_dir() and second.is_dir():
        names = sorted({path.name for path in first.glob("*.jsonl")} & {path.name for path in second.glob("*.jsonl")})
        pairs = {Path(name).stem: (first / name, second / name) for name in names}
        if not pairs:
            raise ValueError(f"{first} and {second} have no .jsonl files of the same name; evaluate on one dataset")
    columns = {name: pair_columns(*pair) for name, pair in pairs.items()}
    if len(columns) > 1:
        keys = ("scores", "lengths", "other_scores", "other_lengths")
        columns["macro mean"] = {key: [one[key][0] for one in columns.values()] for key in keys}
    return {name: compare_columns(of_dataset) for name, of_dataset in columns.items()}


def show(title: str, rows: dict[str, dict[str, str]]) -> None:
    """Print a table: a row a dataset, a column a number."""
    table = Table("", *next(iter(rows.values())), title=title)
    for name, cells in rows.items():
        table.add_row(name, *cells.values())
    console = Console()
    Console(width=max(console.width, 119)).print(table)


def show_number(value: float, style: str = ".3f") -> str:
    """A number as the tables show it."""
    return "-" if math.isnan(value) else format(value, style)


def show_interval(numbers: dict[str, Any], key: str) -> str:
    """A number with its interval."""
    low, high = map(show_number, numbers[f"{key}_interval"])
    return f"{show_number(numbers[key])} [{low}, {high}]"


def cells_of_run(numbers: dict[str, Any], ks: Sequence[int]) -> dict[str, str]:
    """A run's row of the table: column -> cell."""
    draws = {f"pass@{k}": show_number(numbers[f"pass_at_{k}"]) for k in ks}
    draws |= {f"maj@{k}": show_number(numbers[f"majority_at_{k}"]) for k in ks}
    return {
        "Pass@1 [95%]": show_interval(numbers, "pass_at_1"),
        **draws,
        "Length": show_number(numbers["mean_length"], ".1f"),
        "if correct": show_number(numbers["mean_length_correct"], ".1f"),
        "Truncated": show_number(numbers["truncated"], ".1%"),
        "Problems": str(numbers.get("num_problems", "")),
    }


def cells_of_comparison(numbers: dict[str, Any]) -> dict[str, str]:
    """A comparison's row of the table: column -> cell."""
    return {
        "Pass@1": " / ".join(f"{value:.3f}" for value in numbers["pass_at_1"]),
        "Difference [95%]": show_interval(numbers, "difference"),
        "p": f"{numbers['p_value']:.4f}",
        "Length": " / ".join(f"{value:.1f}" for value in numbers["mean_length"]),
        "Ratio [95%]": show_interval(numbers, "length_ratio"),
        "Problems": str(numbers["num_problems"]),
    }


def to_json(value: Any) -> Any:
    """With null for nan, which JSON lacks."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def run_comparison(arguments: Sequence[str]) -> None:
    """`evaluate.py compare FIRST SECOND`."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py compare", description="Compare two runs on the same problems: the second against the first."
    )
    parser.add_argument("first", type=Path, help="a file of responses, or a folder of them")
    parser.add_argument("second", type=Path, help="the same, of the other run")
    args = parser.parse_args(arguments)
    comparison = compare_all(args.first, args.second)
    show(f"{args.first} / {args.second}", {name: cells_of_comparison(row) for name, row in comparison.items()})
    print(json.dumps(to_json(comparison)))
