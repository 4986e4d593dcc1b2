"""What a comparison runs: methods, budgets, runs, and the JSONL file of a run.

The file has a line that says what was run and then a line a measurement, the last of which is `final`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from compare_workload import Workload

from treerpo_trl import TreeRPOConfig
from treerpo_trl.growth import Shape, TreeShape, shape_of


BUDGETS = ("tokens", "leaves", "prompts", "seconds")


@dataclass(frozen=True)
class Method:
    """What is compared: an algorithm, its shape and options.

    Args:
        name: What it is called in files, tables and figures.
        branching: [D] branching factors of TreeRPO; empty is GRPO.
        num_generations: GRPO's completions a prompt.
        options: Other options of its config.
        length_cost: What a response of the greatest length costs of its reward in training; a shorter one costs its
            share. Evaluation is without it.
    """

    name: str
    branching: tuple[int, ...] = ()
    num_generations: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    length_cost: float = 0.0

    @property
    def grows_trees(self) -> bool:
        """Whether it is TreeRPO; with forks instead of branching factors, `options` names the split rule."""
        return bool(self.branching) or "split_rule" in self.options

    @property
    def statistics(self) -> tuple[str, ...]:
        """What sampling has to note of each token, so that trees can be grown."""
        return (self.options.get("uncertainty_measure", "surprisal"),)

    def shape(self, max_completion_length: int) -> Shape:
        """The tree; GRPO's is one of depth 1."""
        branching = self.branching or (self.num_generations,)
        settings = {
            **{name: field.default for name, field in TreeRPOConfig.__dataclass_fields__.items()},
            "step_delimiters": ["\n\n"],
            "branching_factor": branching,
            "segment_length": -(-max_completion_length // len(branching)),
            "max_completion_length": max_completion_length,
            **self.options,
        }
        return shape_of(SimpleNamespace(**settings))


@dataclass(frozen=True)
class Budget:
    """What both methods may spend.

    Args:
        kind: "tokens": sampled tokens, each counted once, prompts excluded; "leaves": completions of the complete
            trees; "prompts": prompts, whatever is sampled for each; "seconds": time of training, evaluation excluded.
        total: Of these, in all.
        per_step: Sampled tokens a step ("leaves", "prompts": of these a step), which sets the prompts a step.
    """

    kind: str
    total: float
    per_step: float

    def prompts_per_step(self, shape: Shape, tokens_per_tree: float) -> int:
        """Prompts whose completions cost `per_step`, for trees that cost so many sampled tokens."""
        cost = {"leaves": shape.num_leaves, "prompts": 1}.get(self.kind, tokens_per_tree)
        return max(1, round(self.per_step / cost))


@dataclass(frozen=True)
class Run:
    """One run, as it can be handed to another process.

    Args:
        split: Held-out problems it is measured on: "validation" or "test".
        num_evaluations: Measurements on the way, after equal shares of the budget, the last one at the end.
        curve_problems: Problems of those on the way, one sample each.
        final_samples: Samples of every problem at the end.
    """

    workload: Workload
    method: Method
    budget: Budget
    learning_rate: float
    seed: int
    split: str
    num_evaluations: int = 8
    curve_problems: int = 1024
    final_samples: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.method.name}-lr{self.learning_rate:g}-{self.split}-seed{self.seed}"


def expected_tokens(shape: TreeShape, lengths: Sequence[int]) -> float:
    """Expected sampled tokens of a tree whose responses are as long as these: the number of nodes at each depth of
    the complete tree times the mean number of a response's tokens that lie in the segment of that depth.

    Exact for any policy, because every path of the tree is a sample from it.
    """
    total, num_nodes, start = 0.0, 1, 0
    for factor in shape.branching:
        num_nodes *= factor
        size = min(shape.segment_length, shape.max_completion_length - start)
        total += num_nodes * fmean(min(max(length - start, 0), size) for length in lengths)
        start += size
    return total


def check_settings(run: Run, folder: Path) -> None:
    """Refuse a folder that holds a run of this name made with other settings, before anything is trained.

    How often a run is measured on the way does not count.
    """
    path = folder / f"{run.name}.jsonl"
    records = read_records(path) if path.exists() else []
    if not records:
        return
    here, there = (flat_settings(settings) for settings in (asdict(run), records[0]["run"]))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{path} was made with {name}={there.get(name)}, but now it is {here.get(name)}; use another "
                "output_dir"
            )


def flat_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Settings by dotted names, as text."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in flat_settings(value).items()}
        elif name not in ("num_evaluations", "curve_problems"):
            flat[name] = str(list(value) if isinstance(value, tuple) else value)
    return flat


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's file; a last line that was cut short is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def is_complete(path: Path) -> bool:
    """Whether the file ends with the final measurement."""
    return path.exists() and bool((read_records(path) or [{}])[-1].get("final"))
