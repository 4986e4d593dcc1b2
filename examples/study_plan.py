"""What the study compares: methods, tasks, learning rates, seeds and budgets."""

from dataclasses import dataclass, field
from typing import Any

from compare_plan import Budget, Method


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
