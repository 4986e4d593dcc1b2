"""The same seed gives the same run, bit for bit, on a CPU; and what of the configuration changes the run, and how."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shared_fixtures import tiny_args
from tiny import make_tokenizer, spread_reward
from torch import Tensor
from transformers import Qwen2ForCausalLM, TrainerCallback

from treerpo_trl import Tree, TreeRPOTrainer


WIDEST_WAVE = 32  # rows: the last of four 2 x 2 x 2 trees
# How the batch of 32 rows is cut up, for training and for sampling.
DIVISIONS = [
    {},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 8},
    {"max_frontier_rows": 5},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16, "max_frontier_rows": 3},
]
# Nothing of the run is another.
UNCHANGED: list[dict[str, Any]] = [
    {"max_frontier_rows": WIDEST_WAVE},
    {"log_trees": True, "log_trees_steps": 1, "num_trees_to_print": 0},
    {"log_completions": True, "num_completions_to_print": 0},
    {"logging_steps": 3},
    {"save_strategy": "steps", "save_steps": 1},
    {"dataloader_num_workers": 1},
    {"gradient_checkpointing": True},
]
# The same trees in the first batch, and the gradient but for rounding; from there on runs drift apart.
ROUNDED: list[dict[str, Any]] = [
    {"prefix_sharing": False},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16},
    {"pad_to_multiple_of": 8},
]
# Other trees from the first batch on, drawn from the same distribution: the random numbers come in another order.
REDRAWN: list[dict[str, Any]] = [{"max_frontier_rows": WIDEST_WAVE // 2}, {"max_frontier_rows": 3}, {"seed": 1}]


@dataclass
class Run:
    """What a run was: the trees of its first batch, its first gradient, its logs, and its weights at the end."""

    trees: list[Tree]
    gradient: dict[str, Tensor]
    logs: list[dict[str, Any]]
    weights: dict[str, Tensor]

    def has_the_bits_of(self, other: "Run") -> bool:
        pairs = [(self.weights, other.weights), (self.gradient, other.gradient)]
        return self.trees == other.trees and all(
            torch.equal(ours[name], theirs[name]) for ours, theirs in pairs for name in ours
        )

    def error_of_gradient(self, other: "Run") -> float:
        errors = [
            (self.gradient[name] - theirs).abs().max() / theirs.abs().max() for name, theirs in other.gradient.items()
        ]
        return max(errors).item()


class FirstStep(TrainerCallback):
    """Keeps the trees and the gradient of the first update."""

    trainer: TreeRPOTrainer
    trees: list[Tree] | None = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.trees is None:
            self.trees = [scored.tree for scored in self.trainer.last_trees]
            self.gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def run(model_path, dataset, tmp_path_factory):
    def make(**options) -> Run:
        first = FirstStep()
        defaults = {"per_device_train_batch_size": 32, "max_steps": 3, "max_grad_norm": 0.0, "beta": 0.1}
        args = tiny_args(str(tmp_path_factory.mktemp("run")), **{**defaults, **options})
        model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        first.trainer = trainer = TreeRPOTrainer(
            model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer(), callbacks=[first]
        )
        trainer.train()
        logs = [
            {name: value for name, value in log.items() if "time" not in name and "second" not in name}
            for log in trainer.state.log_history[:-1]
        ]
        return Run(first.trees, first.gradient, logs, trainer.model.state_dict())

    return make


@pytest.fixture(scope="module")
def plain(run) -> Run:
    return run()


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "defaults"


@pytest.mark.parametrize("options", DIVISIONS, ids=name_of)
def test_the_same_seed_gives_the_same_run_however_the_batch_is_cut_up(run, options):
    first, second = run(**options), run(**options)
    assert first.has_the_bits_of(second)
    assert first.logs == second.logs and len(first.logs) == 3


@pytest.mark.parametrize("options", UNCHANGED, ids=name_of)
def test_options_that_change_no_bit(plain, run, options):
    assert plain.has_the_bits_of(run(**options))


@pytest.mark.parametrize("options", ROUNDED, ids=name_of)
def test_options_that_change_the_rounding(plain, run, options):
    other = run(**options)
    assert plain.trees == other.trees
    assert 0 < plain.error_of_gradient(other) < 1e-4


@pytest.mark.parametrize("options", REDRAWN, ids=name_of)
def test_options_that_draw_other_trees(plain, run, options):
    assert plain.trees != run(**options).trees
