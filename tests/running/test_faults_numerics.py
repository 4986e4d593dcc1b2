"""Numbers at the edge of their range: large ratios, precisions, and gradients that are not finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_reference import Loss, tokens_of
from test_gradient import snapshot
from test_trainer import train
from tiny import coin_reward, make_tokenizer, spread, spread_reward
from transformers import Qwen2ForCausalLM, TrainerCallback

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.credit import treerpo
from treerpo_trl.running.numerics import MOST_SKIPPED


class Spoiler(TrainerCallback):
    """Makes the gradient of some steps not finite, and watches the weights."""

    def __init__(self, steps, value=math.nan):
        self.steps = steps
        self.value = value
        self.weights = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        def spoil(gradient):
            return torch.full_like(gradient, self.value) if state.global_step + 1 in self.steps else gradient

        self.handle = model.model.norm.weight.register_hook(spoil)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})


def spoiled(model, args, dataset, steps, value=math.nan) -> TreeRPOTrainer:
    spoiler = Spoiler(steps, value)
    trainer = TreeRPOTrainer(
        model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer(), callbacks=[spoiler]
    )
    trainer.spoiler = spoiler
    return trainer


def is_same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_an_update_with_a_gradient_that_is_not_finite_is_skipped_and_told(
    model, make_args, dataset, caplog, value, max_grad_norm
):
    args = make_args(max_steps=4, max_grad_norm=max_grad_norm, lr_scheduler_type="constant")
    trainer = spoiled(model, args, dataset, {3}, value)
    trainer.train()
    first, second, third, fourth = trainer.spoiler.weights
    assert is_same(second, third) and not is_same(first, second) and not is_same(third, fourth)
    assert all(torch.isfinite(weight).all() for weight in fourth.values())
    logs = trainer.state.log_history[:4]
    assert [log["skipped_updates"] for log in logs] == [0, 0, 1, 0]
    assert [math.isfinite(log["grad_norm"]) for log in logs] == [True, True, False, True]
    assert f"An update is skipped: the gradient of step 3 has the norm {value}" in caplog.text


def test_the_optimizer_forgets_nothing_over_a_skipped_update(model_path, make_args, dataset):
    """Its moments are those of the steps before: nothing decays, and no weight moves by momentum."""
    moments = []
    for steps in (set(), {2}):
        model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        trainer = spoiled(model, make_args(max_steps=2 if steps else 1), dataset, steps)
        trainer.train()
        state = trainer.optimizer.state[model.model.norm.weight]
        moments.append([state["exp_avg"], state["exp_avg_sq"], state["step"]])
    assert all(torch.equal(first, second) for first, second in zip(*moments, strict=True))


def test_many_skipped_updates_in_a_row_are_an_error(model, make_args, dataset):
    steps = set(range(2, 2 + MOST_SKIPPED - 1)) | set(range(12, 99))
    trainer = spoiled(model, make_args(max_steps=40), dataset, steps)
    with pytest.raises(FloatingPointError, match=rf"step {11 + MOST_SKIPPED} .*{MOST_SKIPPED} in a row"):
        trainer.train()
    assert trainer.state.global_step == 10 + MOST_SKIPPED


def test_rewards_whose_gradient_overflows_leave_the_weights_alone(model, make_args, dataset):
    def reward(completions, **kwargs):
        return [1e30 * spread(text) for text in completions]

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    args = make_args(advantage_estimator="centered")
    trainer = TreeRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    assert is_same(before, dict(model.named_parameters()))
    assert [log["skipped_updates"] for log in trainer.state.log_history[:2]] == [1, 1]


def test_a_model_that_became_nan_is_told_when_it_samples(model, make_args, dataset):
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    trainer = TreeRPOTrainer(model, coin_reward, make_args(), train_dataset=dataset, processing_class=make_tokenizer())
    with pytest.raises(
        FloatingPointError, match=r"probabilities of the next token are not finite.*earlier checkpoint"
    ):
        trainer.train()


def test_half_precision_that_overflows_is_told(model_path, make_args, dataset):
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(60_000)
    trainer = TreeRPOTrainer(model, coin_reward, make_args(), train_dataset=dataset, processing_class=make_tokenizer())
    with pytest.raises(FloatingPointError, match="dtype of more range"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_train(model_path, make_args, dataset, dtype):
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=dtype)
    trainer = train(model, make_args(beta=0.1), dataset)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}


@pytest.mark.parametrize("difference", [60.0, -60.0])
@pytest.mark.parametrize("beta", [0.0, 1e-3])
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_log_probabilities_sixty_apart_give_the_exact_loss(
    model, make_args, dataset, difference, beta, prefix_sharing
):
    """A policy this far from the old one and the reference: e^60 fits single precision, so nothing is lost of it."""

    class Spy(TreeRPOTrainer):
        def _compute_loss(self, model, inputs):
            with torch.no_grad():
                logps, _, _ = self._get_per_token_logps_and_entropies(
                    model,
                    torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                    torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                    inputs["completion_ids"].size(1),
                )
            shifted = dict.fromkeys(("old_per_token_logps", "ref_per_token_logps"), logps - difference)
            self.loss = super()._compute_loss(model, {**inputs, **shifted})
            return self.loss

    args = make_args(beta=beta, max_steps=1, max_grad_norm=0.0, prefix_sharing=prefix_sharing)
    trainer = Spy(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    plain = snapshot(model)
    trainer.train()
    formula = Loss("dapo", args.epsilon, args.epsilon, None, beta, args.use_bias_correction_kl)
    losses = []
    for scored in trainer.last_trees:
        for node, (logps, _) in tokens_of(plain, scored.tree, args.temperature).items():
            if scored.kept[node]:
                far = logps.detach() - difference
                losses.append(formula.of_tokens(logps.detach(), far, far, scored.advantages[node]))
    expected = torch.cat(losses).mean().item()
    assert math.isfinite(expected)
    assert trainer.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.integers(2, 64), st.floats(0, 1e-6), st.booleans(), st.integers(0, 63))
def test_a_mean_next_to_zero_or_one_gives_bounded_advantages(size, distance, is_one, place):
    """|A| is at most the size of the group (arXiv:2506.05183, eq. 4), however close to its pole the mean comes."""
    end, other = (1.0, 1.0 - distance) if is_one else (0.0, distance)
    values = [end] * size
    values[place % size] = other
    for value in torch.tensor(values), torch.tensor(values, dtype=torch.float64):
        advantages = treerpo(value.tolist())
        assert all(math.isfinite(advantage) and abs(advantage) <= size * (1 + 1e-6) for advantage in advantages)
