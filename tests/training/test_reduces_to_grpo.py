"""A tree of depth one with GRPO's estimator is GRPO: same samples, same batch, same loss, same gradient."""

import pytest
import torch
from tiny import make_tokenizer, spread_reward
from transformers import Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer


COMMON = {
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_steps": 3,
    "shuffle_dataset": False,
    "max_grad_norm": 0.0,
    "beta": 0.05,
    "entropy_coef": 0.01,
}
TREE = {"branching_factor": 8, "max_depth": 1, "segment_length": 6, "advantage_estimator": "group_std"}
FLAT = {"num_generations": 8, "max_completion_length": 6}


class Gradients(TrainerCallback):
    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.first is None:
            self.first = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run(trainer_class, config_class, options, model_path, dataset, tmp_path):
    gradients = Gradients()
    batches = []

    class Spy(trainer_class):
        def _generate_and_score_completions(self, inputs):
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

    trainer = Spy(
        Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        spread_reward,
        config_class(str(tmp_path), **COMMON, **options),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, batches[0], gradients.first


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "dr_grpo", "cispo"])
def test_depth_one_with_group_std_is_grpo(model_path, dataset, tmp_path, loss_type):
    tree_options = {**TREE, "prune_threshold": None, "loss_type": loss_type}
    tree, tree_batch, tree_gradient = run(
        TreeRPOTrainer, TreeRPOConfig, tree_options, model_path, dataset, tmp_path / "tree"
    )
    flat, flat_batch, flat_gradient = run(
        GRPOTrainer, GRPOConfig, {**FLAT, "loss_type": loss_type}, model_path, dataset, tmp_path / "flat"
    )
    for name in ["prompt_ids", "prompt_mask", "completion_ids", "completion_mask"]:
        assert torch.equal(tree_batch[name], flat_batch[name]), name
    assert tree_batch["num_items_in_batch"] == flat_batch["num_items_in_batch"]
    mask = flat_batch["completion_mask"]
    expected = flat_batch["advantages"].unsqueeze(1) * mask
    # The samples may repeat by chance, but every row is a leaf of its own and owns its tokens.
    assert torch.equal(tree_batch["tool_mask"] * mask, mask)
    assert torch.allclose(tree_batch["advantages"] * mask, expected, atol=1e-5)
    assert torch.allclose(tree_batch["ref_per_token_logps"] * mask, flat_batch["ref_per_token_logps"] * mask)
    for name, gradient in flat_gradient.items():
        error = (tree_gradient[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, name
    logs = [trainer.state.log_history[0] for trainer in (tree, flat)]
    for name, value in logs[1].items():
        if name != "step_time":
            assert logs[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_group_that_ties_is_pruned_and_grpos_zero_advantage(model_path, dataset, tmp_path):
    """What pruning changes at depth one: tied groups leave the denominator of the mean as well."""
    tree, batch, _ = run(TreeRPOTrainer, TreeRPOConfig, TREE, model_path, dataset, tmp_path)
    for scored in tree.last_trees:
        values = [scored.values[child] for child in scored.tree.children[0]]
        assert all(scored.kept[1:]) == (max(values) - min(values) > 0.1)
    assert batch["num_items_in_batch"] == (batch["tool_mask"] * batch["completion_mask"]).sum()
