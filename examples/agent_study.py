# /// script
# dependencies = [
#     "treerpo-trl[compare]",
# ]
# ///
"""TreeRPO against GRPO on the agent of `agent.py`, at equal sampled tokens and at equal tool calls.

    python examples/agent_study.py --output_dir agent-study

Every run is measured on held-out problems on its way. Pass@1 is compared where both have spent what the cheaper one
spends in all. It goes on where it was stopped.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from agent import ROWS_PER_STEP, make_trainer, parse_arguments
from compare_report import difference_at_equal_cost, welch
from lookup import make_base_model
from trl import GRPOTrainer

from treerpo_trl import TreeRPOTrainer


METHODS = {
    "grpo-8": ["--trainer", "grpo"],
    "grpo-4": ["--trainer", "grpo", "--num_generations", "4"],
    "tree-2x2": [],
    "tree-4x4": ["--branching_factor", "4", "4"],
    "tree-2x2x4": ["--branching_factor", "2", "2", "4"],  # as many leaves, more shared turns
}
MAX_STEPS, EVAL_STEPS = 12, 3


def train(words: list[str], seed: int, base_model: Path, folder: Path) -> list[dict[str, float]]:
    """A run's measurements: what was spent, and Pass@1."""
    args = parse_arguments([*words, "--seed", str(seed), "--max_steps", str(MAX_STEPS), "--output_dir", str(folder)])
    options = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": EVAL_STEPS, "eval_on_start": True}
    trainer = make_trainer(args, base_model, **options)
    trainer.train()
    return measurements(trainer)


def measurements(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """Of each evaluation: sampled tokens and tool calls that were spent before, each counted once, and Pass@1."""
    found, tokens, calls = [], 0.0, 0.0
    num_trees = ROWS_PER_STEP // trainer.num_generations
    for log in trainer.state.log_history:
        if "eval_reward" in log:
            found.append({"tokens": tokens, "calls": calls, "pass_at_1": log["eval_reward"]})
        elif isinstance(trainer, TreeRPOTrainer) and "tree/sampled_tokens" in log:
            tokens += num_trees * log["tree/sampled_tokens"]
            calls += num_trees * log["tree/tool_calls"]
        elif "completions/mean_length" in log:
            tokens += ROWS_PER_STEP * log["completions/mean_length"]
            calls += ROWS_PER_STEP * log["tools/call_frequency"]
    return found


def compare(runs: dict[str, list[list[dict[str, float]]]], baseline: str) -> str:
    """Markdown: a row a method, differences from the baseline in points of Pass@1 with 95% intervals over seeds."""
    curves = {name: [as_curve(run) for run in of_seeds] for name, of_seeds in runs.items()}
    lines = [
        "| method | seeds | Pass@1 | tokens | calls | points above GRPO: as many rows | tokens | calls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, of_seeds in curves.items():
        ends = {
            key: np.mean([getattr(curve, key)[-1] for curve in of_seeds]) for key in ("tokens", "calls", "pass_at_1")
        }
        cells = [name, str(len(of_seeds)), f"{ends['pass_at_1']:.3f}", f"{ends['tokens']:.0f}", f"{ends['calls']:.0f}"]
        if name == baseline:
            cells += ["", "", ""]
        else:
            others = curves[baseline]
            rows = welch(*(np.array([curve.pass_at_1[-1] for curve in each]) for each in (of_seeds, others)))
            spent = [difference_at_equal_cost(of_seeds, others, axis) for axis in ("tokens", "calls")]
            cells += [f"{100 * d:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for d, low, high in (rows, *spent)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_curve(run: list[dict[str, float]]) -> Any:
    """[E] arrays by name."""
    return SimpleNamespace(**{key: np.array([point[key] for point in run]) for key in run[0]})


def main() -> None:
    """Train all methods seed by seed, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output_dir", type=Path, default=Path("agent-study"), help="where to keep base model and measurements"
    )
    parser.add_argument("--results_dir", type=Path, help="also write the table and all measurements here")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs per method")
    args = parser.parse_args()
    base_model = args.output_dir / "base_model"
    if not (base_model / "config.json").exists():
        make_base_model(base_model)
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in METHODS}
    for seed in range(args.seeds):
        for name, words in METHODS.items():
            path = args.output_dir / f"{name}-seed{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(train(words, seed, base_model, args.output_dir / "trainer")))
            runs[name].append(json.loads(path.read_text()))
            print(path.stem, runs[name][-1][-1], flush=True)
    best = max(("grpo-8", "grpo-4"), key=lambda name: np.mean([run[-1]["pass_at_1"] for run in runs[name]]))
    table = compare(runs, best)
    print(table)
    if args.results_dir is not None:
        (args.results_dir / "agent.md").write_text(table + "\n")
        (args.results_dir / "agent.json").write_text(json.dumps(runs) + "\n")


if __name__ == "__main__":
    main()
