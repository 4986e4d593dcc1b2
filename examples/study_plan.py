"""What the study compares: methods, tasks, learning rates, seeds and budgets."""

from dataclasses import dataclass, field, replace
from typing import Any

from compare_plan import Budget, Method


def paper(*branching: int) -> Method:
    """Segments of equal length and the paper's credit."""
    return Method(f"paper-{'x'.join(map(str, branching))}", branching, options={"advantage_estimator": "treerpo"})


def optimal(*branching: int, **options: Any) -> Method:
    """The same with the credit of the whole batch; with one factor, flat samples."""
    name = ("flat-" if len(branching) == 1 else "tree-") + "x".join(map(str, branching))
    return Method(name, branching, options={"advantage_estimator": "optimal_baseline", **options})


def forks(num_trunks: int, forks_per_trunk: int) -> Method:
    """Whole responses that fork at their most surprising tokens, with the credit of the whole batch."""
    return Method(
        f"forks-{num_trunks}x{forks_per_trunk}",
        options={
            "advantage_estimator": "optimal_baseline",
            "split_rule": "uncertainty",
            "num_trunks": num_trunks,
            "forks_per_trunk": forks_per_trunk,
            "min_segment_length": 2,
        },
    )


GRPO = [Method(f"grpo-{count}", (), count) for count in (8, 4)]
RATE = 2e-4


@dataclass(frozen=True)
class Comparison:
    """Methods on one task, each against GRPO.

    Args:
        task: Name in `TASKS`.
        families: What each method is chosen from; the family `GRPO` is what the others are compared with.
        learning_rates: And each learning rate; with one method and one rate there is nothing to choose.
        tuning_seeds: Seeds of the choice.
        seeds: Seeds of the result.
        workload: Of [`Workload`], such as the temperature of the policy and the number of test problems.
        final_samples: Samples of each test problem.
        curve_problems: Problems of the measurements on the way, one sample each.
    """

    task: str
    families: dict[str, list[Method]]
    learning_rates: tuple[float, ...] = (RATE,)
    tuning_seeds: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    budget: Budget = field(default_factory=lambda: Budget("tokens", total=160_000, per_step=4000))
    workload: dict[str, Any] = field(default_factory=lambda: {"num_test": 512})
    num_evaluations: int = 6
    final_samples: int = 8
    curve_problems: int = 512


def credit(task: str, families: dict[str, list[Method]], **changes: Any) -> Comparison:
    """A comparison of the credit of the whole batch with GRPO, learning rates and shapes chosen in one run each."""
    choice = {"learning_rates": (RATE, 4e-4), "tuning_seeds": (100,), **changes}
    return Comparison(task, families={"GRPO": GRPO, **families}, **choice)


def equal_prompts(task: str, per_step: int, families: dict[str, list[Method]], **changes: Any) -> Comparison:
    """As many prompts a step for as many steps, whatever is sampled for each: the paper's protocol."""
    choice = {"learning_rates": (4e-4, 8e-4), "tuning_seeds": (100,), **changes}
    budget = Budget("prompts", total=40 * per_step, per_step=per_step)
    return Comparison(task, {"GRPO": GRPO[:1], **families}, seeds=(0, 1, 2), budget=budget, **choice)


FAMILIES = {"tree": [optimal(2, 2)], "flat": [optimal(2)], "forks": [forks(1, 1)]}
MANY_LEAVES = {"tree": [optimal(4, 4), optimal(4, 4, 4)], "flat": [optimal(16), optimal(32)]}
CREDIT = {
    **{
        task: credit(task, {**FAMILIES, "paper": [paper(4, 2)]})
        for task in ("chain_arithmetic", "countdown", "chains_of_8")
    },
    "noisy_graded_chains": credit(
        "noisy_graded_chains",
        {
            "tree": [optimal(2, 2, 2, 2), optimal(2, 4)],
            "flat": [optimal(2), optimal(4)],
            "forks": [forks(1, 2)],
            "paper": [paper(2, 2, 2, 2)],
        },
    ),
    # The problems of `chain_arithmetic` under long prompts, so with what was chosen there.
    "few_shot_chains": Comparison(
        "few_shot_chains",
        families={"GRPO": GRPO[1:], "paper": [paper(4, 2)], **FAMILIES},
        learning_rates=(4e-4,),
        seeds=(0, 1, 2),
        budget=Budget("tokens", total=80_000, per_step=4000),
        num_evaluations=4,
    ),
    # Chains of 8 at this temperature: 3% of the responses are right. With the learning rate that GRPO chose there.
    "rare_chains": Comparison(
        "chains_of_8",
        families={"GRPO": GRPO[:1], "tree": [optimal(4, 4, 4)], "flat": [optimal(16)], "forks": [forks(8, 1)]},
        seeds=tuple(range(8)),
        budget=Budget("tokens", total=160_000, per_step=8000),
        workload={"temperature": 1.2, "num_test": 512},
    ),
    # A pretrained model, sized for an hour on two cores that multiply bfloat16. With the learning rate that GRPO with
    # 8 completions chose of 1e-4, 3e-4 and 1e-3 on validation problems; with 4 it ends higher.
    "additions": Comparison(
        "additions",
        families={"GRPO": GRPO[1:], "flat": [optimal(2)], "forks": [forks(1, 1)]},
        learning_rates=(3e-4,),
        seeds=(0, 1),
        budget=Budget("tokens", total=20_000, per_step=2000),
        workload={
            "num_validation": 256,
            "num_test": 512,
            "eval_batch_size": 256,
            "max_rows_per_micro_batch": 64,
            "lora_rank": 16,
            "dtype": "bfloat16",
        },
        num_evaluations=2,
        final_samples=2,
        curve_problems=256,
    ),
}
# About as many prompts a step as GRPO with 8 completions has at 4,000 tokens a step. On the first two the largest rate
# was never chosen; on the others the shapes are those that did best there, and a smaller rate is tried.
PROMPTS = {
    f"{task}_prompts": equal_prompts(task, per_step, MANY_LEAVES)
    for task, per_step in (("chain_arithmetic", 18), ("countdown", 9))
} | {
    f"{task}_prompts": equal_prompts(
        task, 8, {"tree": [optimal(4, 4, 4)], "flat": [optimal(32)]}, learning_rates=(RATE, 4e-4)
    )
    for task in ("chains_of_8", "noisy_graded_chains")
}


def costly(method: Method, cost: float) -> Method:
    """The method, in whose training responses of the greatest length cost so much."""
    return replace(method, name=f"{method.name}-cost{cost:g}", length_cost=cost)


# Credit that counts tokens, where routes and so responses vary in length; against GRPO without that.
LENGTHS = {
    "countdown_lengths": Comparison(
        "countdown",
        families={
            "GRPO": GRPO[:1],
            "forks": [forks(1, 1)],
            **{
                f"{family}, cost {cost:g}": [costly(method, cost)]
                for cost in (0.1, 0.3, 0.6)
                for family, method in (("GRPO", GRPO[0]), ("forks", forks(1, 1)))
            },
        },
        learning_rates=(RATE,),
        seeds=(0, 1, 2),
    )
}

COMPARISONS = CREDIT | PROMPTS | LENGTHS
GRADIENT_BATCHES = 48
