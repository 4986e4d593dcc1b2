"""Random trees, rewards and configurations through the trainer, from rewards to gradients, against a plain reference.

python tests/tools/fuzz.py [--cases 10000] [--seed 0] [--jobs 2]

A case goes the way of a training run: the trees become rows, their rewards advantages, the rows micro-batches, and
every micro-batch is trained on. Between updates the weights move at random, so that ratios are not 1. The gradient of
every update must be that of `plain_reference.py`. Trees branch by every split rule.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # as pytest does

import torch
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from plain_reference import Loss, advantages_of, reward_of, rows_of, tokens_of
from tiny import EOS, make_tokenizer, tiny_config
from transformers import Qwen2ForCausalLM

from treerpo_trl import Tree, TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.credit import ESTIMATORS, UNIT_INTERVAL_ESTIMATORS
from treerpo_trl.growth import Backend, Delimiters, ForkShape, Shape, TreeShape, grow
from treerpo_trl.tree import Segment


TOLERANCE = 1e-3  # of the largest element of a gradient; in single precision it is below 1e-4 with few exceptions
NEAR_A_KINK = 1e-4
WEIGHTS = {1: [(Fraction(1),)], 2: [(Fraction(1, 2), Fraction(1, 2)), (Fraction(3, 4), Fraction(1, 4))]}
MOST_ROWS, MOST_LEAVES = 48, 16
# Advantages are fractions of small numbers, which are not as close to this as rounding would take them.
MIN_ADVANTAGE = 0.1234567


@dataclass(frozen=True)
class Case:
    """One generation batch and how it is trained on.

    Args:
        shape: When to branch.
        num_trees, end_probability, seed: The trees, their prompts and rewards, and how the weights move.
        pattern: A name in `PATTERNS`: what rewards look like.
        none_share: Share of rewards that are `None`.
        weights: Of the reward functions.
        tau: `prune_threshold`.
        micro_batches: Of the generation batch; `accumulated` of them make an update.
        options: Of the configuration.
        pad_is_eos: Whether the tokenizer pads with its end-of-sequence token.
        has_score_norms: Whether nodes have them, as a backend that measures them gives them.
    """

    shape: Shape
    num_trees: int
    end_probability: float
    seed: int
    pattern: str
    none_share: float
    weights: tuple[Fraction, ...]
    tau: Fraction | None
    micro_batches: int
    accumulated: int
    options: dict[str, Any]
    pad_is_eos: bool
    has_score_norms: bool = False


# What a reward function may give, by the random number of a completion.
PATTERNS = {
    "coins": lambda draw: Fraction(draw.randint(0, 1)),
    "tenths": lambda draw: Fraction(draw.randint(0, 10), 10),
    "thirds": lambda draw: Fraction(draw.randint(0, 3), 3),
    "equal": lambda draw: Fraction(1, 2),
    "nearly all": lambda draw: Fraction(int(draw.random() < 0.95)),
    "nearly none": lambda draw: Fraction(int(draw.random() < 0.05)),
    "close": lambda draw: Fraction(49 + draw.randint(0, 2), 100),
    "any number": lambda draw: Fraction(draw.randint(-300, 300), 10),
}
ANY_ESTIMATOR = sorted(set(ESTIMATORS) - UNIT_INTERVAL_ESTIMATORS)


@st.composite
def complete_shapes(draw: st.DrawFn, fewest: int) -> TreeShape:
    """Trees that branch at a length, into `fewest` branches or more."""
    numbers = st.lists(st.integers(fewest, 4), min_size=1, max_size=4)
    branching = draw(numbers.filter(lambda numbers: math.prod(numbers) <= MOST_LEAVES))
    length = draw(st.integers(1, 5))
    return TreeShape(tuple(branching), length, len(branching) * length - draw(st.integers(0, length - 1)))


@st.composite
def delimited_shapes(draw: st.DrawFn, fewest: int) -> TreeShape:
    """Trees whose segments end anywhere, and whose paths may be full above the last depth."""
    shape = draw(complete_shapes(fewest))
    delimiters = Delimiters(("\n\n",), draw(st.integers(1, shape.segment_length)))
    return replace(shape, max_completion_length=draw(st.integers(1, 16)), delimiters=delimiters)


@st.composite
def fork_shapes(draw: st.DrawFn, fewest: int) -> ForkShape:
    """Trees of `fewest` trunks or more that fork anywhere."""
    numbers = st.tuples(st.integers(fewest, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
    trunks, forks, width, rounds = draw(numbers.filter(lambda n: n[0] * (1 + n[1] * n[2] * n[3]) <= MOST_LEAVES))
    shortest = draw(st.integers(1, 3))
    return ForkShape(trunks, forks, width, rounds, shortest, draw(st.integers(2 * shortest, 16)))


SHAPES = {"length": complete_shapes, "delimiter": delimited_shapes, "uncertainty": fork_shapes}


@st.composite
def cases(draw: st.DrawFn, rules: Sequence[str] = tuple(SHAPES)) -> Case:
    """Cases of every kind that a configuration allows, of these split rules."""
    pattern = draw(st.sampled_from(sorted(PATTERNS)))
    estimator = draw(st.sampled_from(ANY_ESTIMATOR if pattern == "any number" else sorted(ESTIMATORS)))
    rule = draw(st.sampled_from(rules))
    shape = draw(SHAPES[rule](2 if ESTIMATORS[estimator].needs_siblings else 1))
    # One completion is refused, and so is a single tree where trees are compared with each other.
    fewest = 2 if shape.num_leaves == 1 or ESTIMATORS[estimator].of_forest is not None else 1
    num_trees = draw(st.integers(fewest, max(fewest, min(4, MOST_ROWS // shape.num_leaves))))
    rows = num_trees * shape.num_leaves
    micro_batches = draw(st.sampled_from([count for count in range(1, 9) if rows % count == 0]))
    accumulated = draw(st.sampled_from([count for count in range(1, 9) if micro_batches % count == 0]))
    whole_trees = ["bnpo"] if num_trees % micro_batches == 0 else []  # bnpo is refused where trees are split
    loss_type = draw(st.sampled_from(["dapo", "dapo", *whole_trees, "dr_grpo", "cispo"]))
    options = {
        "loss_type": loss_type,
        "advantage_estimator": estimator,
        "loss_weighting": draw(st.sampled_from(["token", "node"])),
        "beta": draw(st.sampled_from([0.0, 0.1])),
        "use_bias_correction_kl": draw(st.booleans()),
        "entropy_coef": draw(st.sampled_from([0.0, 0.01])),
        "epsilon_high": draw(st.sampled_from([5.0, 1.2] if loss_type == "cispo" else [None, 0.28])),
        "delta": draw(st.sampled_from([None, None, 1.5])),
        "temperature": draw(st.sampled_from([1.0, 0.6])),
        "mask_truncated_completions": draw(st.booleans()),
        "min_advantage": 0.0 if loss_type == "bnpo" else draw(st.sampled_from([0.0, 0.0, MIN_ADVANTAGE])),
        "prefix_sharing": draw(st.booleans()),
        "num_iterations": draw(st.sampled_from([1, 2])),
        "pad_to_multiple_of": draw(st.sampled_from([None, 8])),
        "split_rule": rule,
    }
    return Case(
        shape=shape,
        num_trees=num_trees,
        end_probability=draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**32)),
        pattern=pattern,
        none_share=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        weights=draw(st.sampled_from(WEIGHTS[1] + WEIGHTS[2])),
        tau=draw(st.sampled_from([None, Fraction(0), Fraction(1, 10), Fraction(1, 3), Fraction(-1)])),
        micro_batches=micro_batches,
        accumulated=accumulated,
        options=options,
        pad_is_eos=draw(st.booleans()),
        has_score_norms=draw(st.booleans()),
    )


class RandomSegments(Backend):
    """Segments of a few different tokens, so that siblings are sometimes equal; those that end do so with EOS.

    Where a delimiter may end a segment, most end before they are full. Uncertainties tie as often as not.
    """

    def __init__(self, draw: random.Random, end_probability: float):
        self.draw, self.end_probability = draw, end_probability

    def extend(self, trees, wave) -> list[list[Segment]]:
        short = 0.1 if wave.delimiters is None else 0.7
        return [[self._segment(most, short) for _ in range(wave.num_children)] for most in wave.max_tokens]

    def _segment(self, max_tokens: int, short_probability: float) -> Segment:
        ended = self.draw.random() < self.end_probability
        length = self.draw.randint(1, max_tokens) if ended or self.draw.random() < short_probability else max_tokens
        ids = [self.draw.randint(2, 6) for _ in range(length)]
        uncertainties = tuple(float(self.draw.randint(0, 4)) for _ in range(length))
        return Segment(tuple([*ids[:-1], EOS] if ended else ids), ended, uncertainties=uncertainties)


class GivenTrees(TreeRPOTrainer):
    """The trainer, with trees that are given instead of sampled."""

    trees: list[Tree]

    def _grow(self, prompts: list[list[int]]) -> list[Tree]:
        assert [tuple(prompt) for prompt in prompts] == [tree.prompt_ids for tree in self.trees]
        return self.trees


@cache
def model_folder() -> str:
    """A tiny random Qwen2 on disk."""
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="fuzz-")
    config = tiny_config(initializer_range=0.3, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def load() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)


@dataclass
class Outcome:
    """What a case came to: how many updates were compared, how many tokens they trained, and the largest error."""

    updates: int = 0
    trained_tokens: int = 0
    at_a_kink: int = 0
    worst: float = 0.0


def check(case: Case) -> Outcome:
    """Train on a case, and compare the gradient of every update with the plain reference's.

    Raises:
        AssertionError: They differ.
    """
    draw = random.Random(case.seed)
    torch.manual_seed(case.seed % 2**31)
    prompts = [[draw.randint(2, 9) for _ in range(draw.randint(1, 4))] for _ in range(case.num_trees)]
    trees = grow(prompts, case.shape, RandomSegments(draw, case.end_probability))
    if case.has_score_norms:
        with torch.no_grad():
            trees = [with_score_norms(load(), tree, case.options["temperature"]) for tree in trees]
    parts: dict[tuple[int, tuple[int, ...]], list[Fraction | None]] = {}
    for index, tree in enumerate(trees):
        for leaf in tree.leaves:
            drawn = [None if draw.random() < case.none_share else PATTERNS[case.pattern](draw) for _ in case.weights]
            parts.setdefault((index, tuple(tree.completion_ids(leaf))), drawn)

    tokenizer = make_tokenizer(case.pad_is_eos)
    trainer = make_trainer(case, tokenizer, [tokenizer.decode(prompt) for prompt in prompts], parts)
    trainer.trees = trees
    rows = [
        {"prompt": tokenizer.decode(prompt), "tree": index}
        for index, prompt in enumerate(prompts)
        for _ in range(case.shape.num_leaves)
    ]
    return train(case, trainer, rows, reference_of(case, trees, parts))


def with_score_norms(model: Qwen2ForCausalLM, tree: Tree, temperature: float) -> Tree:
    """The tree, each node with 1 - 2 p + sum p^2 of its tokens by the model's own probabilities."""
    norms: dict[int, tuple[float, ...]] = {}
    for leaf in tree.leaves:
        ids = torch.tensor([[*tree.prompt_ids, *tree.completion_ids(leaf)]])
        probs = (model(input_ids=ids).logits[0, :-1].double() / temperature).softmax(-1)
        drawn = probs.gather(1, ids[0, 1:, None]).squeeze(1)
        each, start = 1 - 2 * drawn + probs.square().sum(-1), len(tree.prompt_ids) - 1
        for node in tree.path(leaf):
            end = start + len(tree.nodes[node].token_ids)
            norms[node], start = tuple(each[start:end].tolist()), end
    return Tree(tuple(replace(node, score_norms=norms.get(index)) for index, node in enumerate(tree.nodes)))


def make_trainer(case: Case, tokenizer: Any, prompts: list[str], parts: Any) -> GivenTrees:
    def reward_func(part):
        def reward(completion_ids, tree, **kwargs):
            given = [parts[key][part] for key in zip(tree, map(tuple, completion_ids), strict=True)]
            return [None if reward is None else float(reward) for reward in given]

        reward.__name__ = f"reward_{part}"
        return reward

    rows = case.num_trees * case.shape.num_leaves
    args = TreeRPOConfig(
        tempfile.gettempdir(),
        **shape_options(case.shape),
        max_completion_length=case.shape.max_completion_length,
        per_device_train_batch_size=rows // case.micro_batches,
        steps_per_generation=case.micro_batches,
        gradient_accumulation_steps=case.accumulated,
        prune_threshold=None if case.tau is None else float(case.tau),
        reward_weights=[float(weight) for weight in case.weights],
        max_steps=1,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        **case.options,
    )
    trainer = GivenTrees(
        load(),
        [reward_func(part) for part in range(len(case.weights))],
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts, "tree": list(range(len(prompts)))}),
        processing_class=tokenizer,
    )
    assert trainer.tree_shape == case.shape
    return trainer


def shape_options(shape: Shape) -> dict[str, Any]:
    """What a configuration calls a shape."""
    if isinstance(shape, ForkShape):
        return {
            "num_trunks": shape.num_trunks,
            "forks_per_trunk": shape.forks_per_trunk,
            "continuations_per_fork": shape.continuations_per_fork,
            "fork_rounds": shape.num_rounds,
            "min_segment_length": shape.min_segment_length,
        }
    return {
        "branching_factor": list(shape.branching),
        "max_depth": shape.max_depth,
        "segment_length": shape.segment_length,
        "min_segment_length": 1 if shape.delimiters is None else shape.delimiters.min_tokens,
    }


@dataclass
class Trained:
    """A node that carries loss: its tree, its row in the batch, its advantage and what each of its tokens weighs."""

    tree: Tree
    node: int
    row: int
    advantage: float
    weight: float


def reference_of(case: Case, trees: list[Tree], parts: Any) -> list[Trained]:
    """Every node that is trained, in the row that trains it: the first one that may carry loss."""
    trained = []
    rewards = [
        {leaf: reward_of(parts[index, tuple(tree.completion_ids(leaf))], case.weights) for leaf in tree.leaves}
        for index, tree in enumerate(trees)
    ]
    tau = None if case.tau is not None and case.tau < 0 else case.tau
    estimator = case.options["advantage_estimator"]
    branching = None if case.options["split_rule"] == "uncertainty" else case.shape.branching
    is_length = case.options["split_rule"] == "length"
    longest = case.shape.segment_length if is_length else case.shape.max_completion_length
    of_trees = advantages_of(trees, rewards, estimator, tau, branching)
    for index, (tree, advantages) in enumerate(zip(trees, of_trees, strict=True)):
        first_row: dict[int, int] = {}
        for row, path in enumerate(rows_of(tree, branching), start=index * case.shape.num_leaves):
            is_truncated = tree.nodes[path[-1]].token_ids[-1] != EOS
            if case.options["mask_truncated_completions"] and is_truncated:
                continue
            for node in path:
                first_row.setdefault(node, row)
        for node, advantage in advantages.items():
            if node in first_row:
                length = len(tree.nodes[node].token_ids)
                weight = 1.0 if case.options["loss_weighting"] == "token" else longest / length
                trained.append(Trained(tree, node, first_row[node], advantage, weight))
    return trained


def train(case: Case, trainer: GivenTrees, rows: list[dict[str, Any]], trained: list[Trained]) -> Outcome:
    """Make every update of the batch; the weights move before each of them."""
    args, model = trainer.args, trainer.model
    twin, outcome = load(), Outcome()
    per_tree = {id(one.tree): one.tree for one in trained}

    def tokens(weights: dict[str, Any]) -> dict[int, Any]:
        twin.load_state_dict(weights)
        return {key: tokens_of(twin, tree, args.temperature) for key, tree in per_tree.items()}

    with torch.no_grad():
        reference = tokens(twin.state_dict())
        move(model, 0.02)
        old = tokens(model.state_dict())
    model.train()
    trainer.current_gradient_accumulation_steps = case.accumulated
    updates = case.micro_batches * args.num_iterations // case.accumulated
    is_off_policy = case.accumulated % (case.micro_batches * args.num_iterations) != 0
    for update in range(updates):
        model.zero_grad()
        held = []
        for micro_step in range(case.accumulated):
            trainer.training_step(model, rows, None)
            place = (update * case.accumulated + micro_step) % case.micro_batches
            held.append(set(trainer._buffered_inputs[place]["row"].tolist()))
        now = tokens(model.state_dict())
        if not is_off_policy:
            old = {key: {node: (x.detach(), y) for node, (x, y) in nodes.items()} for key, nodes in now.items()}
        compare(case, trainer, twin, held, trained, (now, old, reference), outcome)
        move(model, 0.02)
    return outcome


def move(model: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def compare(
    case: Case,
    trainer: GivenTrees,
    twin: Qwen2ForCausalLM,
    held: list[set[int]],
    trained: list[Trained],
    tokens: tuple[dict[int, Any], ...],
    outcome: Outcome,
) -> None:
    """Compare the gradient of one update, whose micro-batches hold these rows, with that of the plain loss."""
    args = trainer.args
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    loss = Loss(args.loss_type, args.epsilon, high, args.delta, args.beta, args.use_bias_correction_kl)
    everything = sum(one.weight * len(one.tree.nodes[one.node].token_ids) for one in trained)
    now, old, reference = tokens
    total = torch.zeros((), dtype=torch.float64)
    for rows_held in held:
        losses, entropies, weights = [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)]
        for one in trained:
            if one.row not in rows_held or abs(one.advantage) < args.min_advantage:
                continue
            logps, entropy = now[id(one.tree)][one.node]
            old_logps, reference_logps = (found[id(one.tree)][one.node][0] for found in (old, reference))
            ratio = (logps - old_logps).detach().exp()
            if any(((ratio - kink).abs() < NEAR_A_KINK).any() for kink in loss.kinks()):
                outcome.at_a_kink += 1
                return
            losses.append(loss.of_tokens(logps, old_logps, reference_logps, one.advantage))
            entropies.append(entropy)
            weights.append(torch.full_like(logps.detach(), one.weight))
        weight = torch.cat(weights)
        outcome.trained_tokens += len(weight)
        summed = (torch.cat(losses) * weight).sum()
        window = max(everything, 1.0) * case.accumulated / case.micro_batches
        if loss.loss_type == "bnpo":
            policy = summed / weight.sum().clamp(min=1.0) / case.accumulated
        elif loss.loss_type == "dr_grpo":
            size = args.per_device_train_batch_size * case.shape.max_completion_length
            policy = summed / size / case.accumulated
        else:
            policy = summed / window
        bonus = (torch.cat(entropies) * weight).sum() / window
        total = total + policy - args.entropy_coef * bonus
    twin.zero_grad()
    if total.requires_grad:
        total.backward()
    outcome.updates += 1
    # Siblings that are equal cancel out, which leaves the rounding of what their advantages amount to.
    rounding = 1e-4 * (1 + max((abs(one.advantage) for one in trained), default=0.0))
    largest = max(gradient_of(parameter).abs().max().item() for parameter in twin.parameters())
    for (name, parameter), (_, expected) in zip(
        trainer.model.named_parameters(), twin.named_parameters(), strict=True
    ):
        difference = (gradient_of(parameter) - gradient_of(expected)).abs().max().item()
        error = difference / max(gradient_of(expected).abs().max().item(), 1e-2 * largest, rounding)
        outcome.worst = max(outcome.worst, error)
        assert error < TOLERANCE, f"{name}: relative error {error:.1e} of {case}"


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# The fuzz run


def run(cases_to_run: int, seed: int) -> dict[str, Any]:
    """Check that many cases, in this process."""
    torch.set_num_threads(1)
    seen, totals, worst = Counter(), Counter(), 0.0

    @hypothesis_seed(seed)
    @settings(
        max_examples=cases_to_run, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases())
    def fuzz(case):
        nonlocal worst
        outcome = check(case)
        worst = max(worst, outcome.worst)
        totals.update(cases=1, **{key: value for key, value in asdict(outcome).items() if key != "worst"})
        totals.update(trained=outcome.trained_tokens > 0)
        rule = case.options["split_rule"]
        totals.update({f"tokens_of_{rule}": outcome.trained_tokens})
        seen.update({f"{name}={value}" for name, value in {**case.options, "pattern": case.pattern}.items()})
        seen.update([f"{rule} with {case.options['advantage_estimator']}"])

    fuzz()
    return {"totals": dict(totals), "worst": worst, "seen": dict(seen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    start = time.monotonic()
    shares = [options.cases // options.jobs + (job < options.cases % options.jobs) for job in range(options.jobs)]
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run, shares, [options.seed + job for job in range(options.jobs)]))
    totals = sum((Counter(result["totals"]) for result in results), Counter())
    report = {
        **totals,
        "worst_relative_error": max(result["worst"] for result in results),
        "seconds": round(time.monotonic() - start),
        "seen": dict(sorted(sum((Counter(result["seen"]) for result in results), Counter()).items())),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
