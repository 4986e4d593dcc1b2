"""What we rest on in TRL. When an upgrade breaks something, it should fail here first and say what moved."""

import inspect
import re

import pytest
import torch
from tiny import make_tokenizer, spread_reward
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler, print_prompt_completions_sample

from treerpo_trl import TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.checks.compatibility import LOSS_TYPES, MAX_COLOCATED_ROWS
from treerpo_trl.trainers.resuming import ResumableGRPOTrainer


SEAMS = {
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["inputs"],
    "_prepare_inputs": ["generation_batch"],
    "_compute_loss": ["model", "inputs"],
    "_tokenize_prompts": ["prompts"],
    "get_high_entropy_mask": ["entropies", "mask", "threshold"],
}
ATTRIBUTES = [
    "generation_config", "generation_kwargs", "eos_token_ids", "num_generations", "max_completion_length",
    "_tokenizer", "_dist", "_logs", "_metrics", "_step", "_buffered_inputs", "reward_funcs", "reward_weights",
    "model_wrapped",
]  # fmt: skip


def test_the_seams_have_their_signatures():
    for name, expected in SEAMS.items():
        method = getattr(GRPOTrainer, name, None)
        assert method is not None, f"GRPOTrainer.{name} is gone; the trainer overrides or calls it"
        parameters = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
        assert parameters == expected, f"GRPOTrainer.{name} now takes {parameters}"


def test_the_seams_of_resuming():
    """What is overridden of the training loop, and the order in which a checkpoint is written."""
    seams = {
        "_save_checkpoint": ["model", "trial"],
        "_save_rng_state": ["output_dir"],
        "_load_rng_state": ["checkpoint"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_best_model": [],
        "_get_train_sampler": ["dataset"],
    }
    for name, expected in seams.items():
        parameters = [name for name in inspect.signature(getattr(GRPOTrainer, name)).parameters if name != "self"]
        assert parameters == expected, f"GRPOTrainer.{name} now takes {parameters}"
    for name, value in vars(ResumableGRPOTrainer).items():
        if inspect.isfunction(value) and name not in ("_check_reference", "_restore"):
            assert hasattr(GRPOTrainer, name), f"GRPOTrainer.{name} is gone; what it put back would be lost"
    for name in ("shuffle", "num_samples", "generator"):
        assert f"self.{name} = " in inspect.getsource(RepeatSampler), f"TRL's sampler no longer has {name}"
    source = inspect.getsource(Trainer._save_checkpoint)
    parts = ["self.save_model(", "self._save_rng_state(", "self.state.save_to_json(", "rotate_checkpoints("]
    places = [source.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), f"a checkpoint is no longer written in the order {parts}"


def test_the_seams_of_the_gradients_guard_and_of_the_printed_table():
    """The norm is asked for before the update, whatever `max_grad_norm` is; 0 completions to print are none."""
    source = inspect.getsource(Trainer._run_epoch)
    places = [source.find(part) for part in ("self._get_grad_norm(", "self.optimizer.step()", "model.zero_grad()")]
    assert -1 not in places and places == sorted(places), "the norm is no longer asked for just before the update"
    parameters = list(inspect.signature(print_prompt_completions_sample).parameters)
    expected = ["prompts", "completions", "rewards", "advantages", "step", "num_samples", "extra"]
    assert parameters == expected, f"the table of completions now takes {parameters}"
    assert "self.num_completions_to_print" in inspect.getsource(GRPOTrainer.log)


def test_the_forward_seam_begins_as_expected():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    expected = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert parameters[: len(expected)] == expected, f"it now takes {parameters}"


def test_the_constructor_is_grpos():
    ours = inspect.signature(TreeRPOTrainer).parameters
    theirs = inspect.signature(GRPOTrainer).parameters
    assert list(ours) == list(theirs), "TreeRPOTrainer must take what GRPOTrainer takes"
    assert [parameter.default for parameter in ours.values()] == [parameter.default for parameter in theirs.values()]


def test_the_vllm_seam():
    """What the vLLM backend reads, sets and calls of TRL's handle of an engine."""
    source = inspect.getsource(VLLMGeneration)
    for name in ("max_completion_length", "generation_kwargs", "enable_sleep_mode", "_llm_weights_sleeping", "llm"):
        assert f"self.{name}" in source, f"VLLMGeneration no longer has {name}"
    parameters = list(inspect.signature(VLLMGeneration.generate).parameters)
    assert parameters == ["self", "prompts", "images", "num_generations", "profiler"], f"it now takes {parameters}"
    assert f"max_num_batched_tokens={MAX_COLOCATED_ROWS}" in source
    source = inspect.getsource(GRPOTrainer)
    assert "self._last_loaded_step = self.state.global_step" in source, "the trainer loads weights at other times"
    assert "self.vllm_generation = VLLMGeneration(" in source


def test_every_loss_type_is_known():
    """A new loss type upstream must be looked at: does it average over rows?"""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    conditions = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
    names = {name for condition in conditions for name in re.findall(r"\"(\w+)\"", condition)}
    assert names == {*LOSS_TYPES, "grpo", "sapo", "luspo", "vespo"}


def test_the_attributes_are_there(model, make_args, dataset, tokenizer):
    trainer = TreeRPOTrainer(model, spread_reward, make_args(), train_dataset=dataset, processing_class=tokenizer)
    for name in ATTRIBUTES:
        assert hasattr(trainer, name), f"GRPOTrainer no longer has {name}"
    maxlen = trainer._logs["advantages"].maxlen
    assert maxlen == trainer.args.generation_batch_size, "the table of completions does not hold one batch any more"


def make_loss(model, tmp_path, dataset, tokenizer, **options):
    """TRL's trainer, and a micro-batch with (B, T) advantages and a float mask."""
    args = GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=4, max_completion_length=5, bf16=False,
        report_to="none", gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = GRPOTrainer(model, spread_reward, args, train_dataset=dataset, processing_class=tokenizer)
    torch.manual_seed(0)
    completion_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    advantages, weights = torch.randn(2, 5), torch.rand(2, 5)
    inputs = {
        "prompt_ids": torch.tensor([[5, 6], [7, 8]]),
        "prompt_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_ids": torch.randint(2, 9, (2, 5)),
        "completion_mask": completion_mask,
        "advantages": advantages,
        "tool_mask": weights,
        "num_items_in_batch": (weights * completion_mask).sum(),
    }
    return trainer, inputs


def test_the_loss_takes_token_advantages_and_a_float_mask(model, tmp_path, dataset, tokenizer):
    """(B, T) advantages, and weights in `tool_mask`: the loss is linear in their product, token by token."""
    trainer, inputs = make_loss(model, tmp_path, dataset, tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    weights = inputs["tool_mask"] * inputs["completion_mask"]
    assert torch.allclose(loss, -(inputs["advantages"] * weights).sum() / weights.sum(), atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropies_get_their_gradient_from_the_bonus_alone(model, tmp_path, dataset, tokenizer, loss_type):
    """It is a mean over the micro-batch, over the number of these. `rows.entropy_of_the_batch` rests on that."""
    trainer, inputs = make_loss(model, tmp_path, dataset, tokenizer, loss_type=loss_type, entropy_coef=0.3)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4
    forward = trainer._get_per_token_logps_and_entropies
    entropies = []

    def keep(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs[1].retain_grad()
        entropies.append(outputs[1])
        return outputs

    trainer._get_per_token_logps_and_entropies = keep
    trainer._compute_loss(trainer.model, inputs).backward()
    weights = inputs["tool_mask"] * inputs["completion_mask"]
    message = "TRL's entropy bonus is normalized in another way now"
    assert torch.allclose(entropies[0].grad, -0.3 * weights / weights.sum() / 4), message


def test_generation_rows_are_grouped_by_prompt(model, make_args, dataset, tokenizer):
    """The rows of a prompt come together and `_prepare_inputs` is given a whole generation batch."""
    seen = []

    class Spy(TreeRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            seen.append([row["answer"] for row in inputs])
            return super()._generate_and_score_completions(inputs)

    args = make_args(per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1)
    Spy(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer()).train()
    (answers,) = seen
    assert len(answers) == 16 and answers == [answers[0]] * 8 + [answers[8]] * 8


def test_micro_batches_hold_neighbouring_rows(model, make_args, dataset, tokenizer):
    """Depth-first neighbours stay together: only whole micro-batches are shuffled."""
    seen = []

    class Spy(TreeRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(inputs["row"].tolist())
            return super()._compute_loss(model, inputs)

    args = make_args(per_device_train_batch_size=4, gradient_accumulation_steps=8, max_steps=3, seed=1)
    Spy(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer()).train()
    assert len(seen) == 24
    for step in range(3):
        rows = seen[8 * step : 8 * (step + 1)]
        assert all(row == list(range(row[0], row[0] + 4)) and row[0] % 4 == 0 for row in rows)
        assert sorted(row[0] for row in rows) == list(range(0, 32, 4))
    assert any(seen[8 * step : 8 * (step + 1)] != sorted(seen[8 * step : 8 * (step + 1)]) for step in range(3))


def test_the_configuration_class_extends_grpos():
    assert issubclass(TreeRPOConfig, GRPOConfig)
    changed = {"num_generations", "max_completion_length", "vllm_importance_sampling_mode"}
    for name, field in GRPOConfig.__dataclass_fields__.items():
        ours = TreeRPOConfig.__dataclass_fields__[name]
        assert name in changed or ours.default == field.default, f"{name} differs from TRL's default"
