"""The gradient of a training step against a plain reference: every kept node as a sample of its own."""

import copy
import dataclasses

import pytest
import torch
from tiny import EOS, PAD, coin_reward, make_tokenizer
from transformers import Qwen2ForCausalLM, TrainerCallback

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.checks.compatibility import LOSS_TYPES


class Recorder(TrainerCallback):
    """Copies of the model and its gradient at each optimizer step, and the trees of the batch."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        self.steps.append((snapshot(model), gradient, self.trainer.last_trees))


def snapshot(model) -> Qwen2ForCausalLM:
    """A plain model with the same weights. A deep copy would keep TRL's patched forward, bound to the original."""
    plain = Qwen2ForCausalLM(copy.deepcopy(model.config)).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    # TRL changed config.pad_token_id after the model was made, and an embedding keeps no gradient of its padding.
    plain.model.embed_tokens.padding_idx = model.model.embed_tokens.padding_idx
    return plain


def train(model, args, dataset, tokenizer, reward=coin_reward) -> Recorder:
    recorder = Recorder()
    recorder.trainer = TreeRPOTrainer(
        model, reward, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[recorder]
    )
    recorder.trainer.train()
    return recorder


def token_logps_and_entropies(model, prefix, token_ids, temperature):
    """Log-probabilities and entropies of `token_ids` after `prefix`: one sequence, no padding, no packing."""
    input_ids = torch.tensor([[*prefix, *token_ids]])
    logits = model(input_ids=input_ids).logits[0, len(prefix) - 1 : -1].double() / temperature
    logps = logits.log_softmax(-1)
    return logps[torch.arange(len(token_ids)), list(token_ids)], -(logps.exp() * logps).sum(-1)


def reference_loss(policy, old, reference, trees, args):
    """TreeRPO's eq. 5 node by node: PPO-clip, KL to the reference, entropy bonus."""
    losses, entropies, weights = [], [], []
    for scored in trees:
        for index, kept in enumerate(scored.kept):
            if not kept:
                continue
            tree, node = scored.tree, scored.tree.nodes[index]
            prefix = [*tree.prompt_ids, *tree.completion_ids(node.parent)]
            logps, entropy = token_logps_and_entropies(policy, prefix, node.token_ids, args.temperature)
            with torch.no_grad():
                old_logps, _ = token_logps_and_entropies(old, prefix, node.token_ids, args.temperature)
                ref_logps, _ = token_logps_and_entropies(reference, prefix, node.token_ids, args.temperature)
            ratio, advantage = (logps - old_logps).exp(), scored.advantages[index]
            clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
            kl = ((ref_logps - logps).exp() - (ref_logps - logps) - 1) * ratio  # use_bias_correction_kl
            losses.append(-torch.min(ratio * advantage, clipped * advantage) + args.beta * kl)
            entropies.append(entropy)
            weight = 1.0 if args.loss_weighting == "token" else 1 / len(node.token_ids)
            weights.append(torch.full((len(node.token_ids),), weight, dtype=torch.float64))
    weights = torch.cat(weights)
    total = ((torch.cat(losses) - args.entropy_coef * torch.cat(entropies)) * weights).sum()
    return total / weights.sum()


def assert_gradients_match(policy, gradient, loss):
    loss.backward()
    for name, parameter in policy.named_parameters():
        scale = gradient[name].abs().max().clamp(min=1e-6)
        error = ((parameter.grad - gradient[name]).abs().max() / scale).item()
        assert error < 2e-4, f"{name}: relative error {error:.1e}"


def check_step(step, old, reference, args):
    policy, gradient, trees = step
    assert_gradients_match(policy, gradient, reference_loss(policy, old, reference, trees, args))


def assert_all_kinds_of_nodes(trees, shape):
    """The batch holds early ends, repeats, pruned and kept groups, and prompts of different lengths."""
    assert any(len(scored.tree.leaves) < shape.num_leaves for scored in trees)
    assert any(node.ended for scored in trees for node in scored.tree.nodes)
    groups = [[scored.kept[child] for child in group] for scored in trees for group in scored.tree.children if group]
    assert {all(group) for group in groups} == {True, False}
    assert len({len(scored.tree.prompt_ids) for scored in trees}) > 1


@pytest.fixture
def reference(model_path):
    """What TRL loads as the reference model."""
    return Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)


@pytest.fixture
def moved(model):
    """A policy that is not the reference, so that the KL term has a gradient."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("loss_weighting", ["token", "node"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_gradient_is_the_references(moved, reference, make_args, dataset, loss_weighting, pad_is_eos):
    args = make_args(
        loss_weighting=loss_weighting, beta=0.1, entropy_coef=0.01, temperature=0.9, max_grad_norm=0.0, max_steps=1,
        per_device_train_batch_size=32,
    )  # fmt: skip
    old = snapshot(moved)
    recorder = train(moved, args, dataset, make_tokenizer(pad_is_eos))
    assert_all_kinds_of_nodes(recorder.steps[0][2], recorder.trainer.tree_shape)
    check_step(recorder.steps[0], old, reference, args)


@pytest.mark.parametrize("loss_weighting", ["token", "node"])
def test_accumulated_micro_batches_add_up_to_the_references(moved, reference, make_args, dataset, loss_weighting):
    """Trees scattered over micro-batches of 4 rows (half a tree) give the gradient of the whole batch."""
    args = make_args(
        loss_weighting=loss_weighting, beta=0.1, entropy_coef=0.5, max_grad_norm=0.0, max_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=8,
    )  # fmt: skip
    old = snapshot(moved)
    recorder = train(moved, args, dataset, make_tokenizer())
    check_step(recorder.steps[0], old, reference, args)


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - {"bnpo"}))
def test_every_loss_has_one_gradient_however_trees_are_divided(moved, make_args, dataset, loss_type):
    """Whole trees or parts of them in a micro-batch, with the KL term and the entropy bonus. (`bnpo` is refused.)"""
    gradients = []
    for rows in (32, 8, 2):
        args = make_args(
            loss_type=loss_type, beta=0.1, entropy_coef=0.5, max_grad_norm=0.0, max_steps=1,
            per_device_train_batch_size=rows, gradient_accumulation_steps=32 // rows,
        )  # fmt: skip
        gradients.append(train(snapshot(moved), args, dataset, make_tokenizer()).steps[0][1])
    for divided in gradients[1:]:
        for name, whole in gradients[0].items():
            error = (divided[name] - whole).abs().max() / whole.abs().max().clamp(min=1e-6)
            assert error < 2e-4, f"{name}: relative error {error:.1e}"


def test_a_second_update_of_a_batch_is_clipped_against_the_old_policy(moved, reference, make_args, dataset):
    args = make_args(
        num_iterations=2, beta=0.1, max_grad_norm=0.0, max_steps=2, learning_rate=3e-2, max_depth=2,
        branching_factor=4, lr_scheduler_type="constant",
    )  # fmt: skip
    old = snapshot(moved)
    recorder = train(moved, args, dataset, make_tokenizer())
    check_step(recorder.steps[0], old, reference, args)
    check_step(recorder.steps[1], old, reference, args)
    assert recorder.steps[0][2] is recorder.steps[1][2]
    ratios = [log["clip_ratio/region_mean"] for log in recorder.trainer.state.log_history if "loss" in log]
    assert ratios[0] == 0 and ratios[1] > 0  # so the second check did go through the clip


def test_truncated_completions_can_be_masked(model, reference, make_args, dataset):
    """With mask_truncated_completions, nodes that only truncated rows pass are not trained; others still are, once."""
    args = make_args(mask_truncated_completions=True, max_grad_norm=0.0, max_steps=1, per_device_train_batch_size=32)
    recorder = train(model, args, dataset, make_tokenizer())
    policy, gradient, trees = recorder.steps[0]
    dropped = 0
    masked = []
    for scored in trees:
        tree = scored.tree
        ended = [leaf for leaf in tree.leaves if tree.nodes[leaf].token_ids[-1] in (EOS, PAD)]  # as TRL tells it
        finished = {node for leaf in ended for node in tree.path(leaf)}
        kept = tuple(kept and node in finished for node, kept in enumerate(scored.kept))
        dropped += sum(scored.kept) - sum(kept)
        masked.append(dataclasses.replace(scored, kept=kept))
    assert dropped and any(any(scored.kept) for scored in masked)
    assert_gradients_match(policy, gradient, reference_loss(policy, reference, reference, masked, args))
    nodes = [pair for scored in masked for pair in zip(scored.tree.nodes, scored.kept, strict=True)]
    trained = sum(len(node.token_ids) for node, is_kept in nodes if is_kept)
    sampled = sum(scored.tree.num_sampled_tokens for scored in masked)
    assert recorder.trainer.state.log_history[0]["tree/trained_tokens"] == pytest.approx(trained / sampled)


@pytest.mark.parametrize("loss_type", ["bnpo", "dr_grpo", "cispo"])
def test_other_losses_are_the_reference_up_to_their_normalizer(model, reference, make_args, dataset, loss_type):
    """On policy, with one micro-batch, they all point where the reference does."""
    args = make_args(loss_type=loss_type, max_grad_norm=0.0, max_steps=1, per_device_train_batch_size=32)
    recorder = train(model, args, dataset, make_tokenizer())
    policy, gradient, trees = recorder.steps[0]
    scale = 1.0
    if loss_type == "dr_grpo":  # sums over a constant: rows x max_completion_length
        tokens = sum(
            len(node.token_ids)
            for scored in trees
            for node, kept in zip(scored.tree.nodes, scored.kept, strict=True)
            if kept
        )
        scale = tokens / (32 * args.max_completion_length)
    if loss_type == "cispo":  # its weight is min(ratio, epsilon_high), and TRL's default for that is epsilon
        scale = args.epsilon
    assert_gradients_match(policy, gradient, scale * reference_loss(policy, reference, reference, trees, args))


def test_nothing_kept_gives_a_zero_gradient_and_no_nan(model, make_args, dataset):
    args = make_args(max_grad_norm=0.0, max_steps=1, beta=0.1)
    recorder = train(
        model, args, dataset, make_tokenizer(), reward=lambda completions, **kwargs: [0.5] * len(completions)
    )
    _, gradient, trees = recorder.steps[0]
    assert not any(any(scored.kept) for scored in trees)
    assert all((gradient == 0).all() for gradient in gradient.values())
    logs = recorder.trainer.state.log_history[0]
    assert all(value == value for value in logs.values() if value is not None)


def test_a_policy_loaded_in_float64_matches_closely(model_path, make_args, dataset):
    """In double precision what is left is the rewards' and advantages' float32."""
    policy = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    old = snapshot(policy)
    args = make_args(max_grad_norm=0.0, max_steps=1)
    recorder = train(policy, args, dataset, make_tokenizer())
    policy, gradient, trees = recorder.steps[0]
    reference_loss(policy, old, old, trees, args).backward()
    for name, parameter in policy.named_parameters():
        error = (parameter.grad - gradient[name]).abs().max() / gradient[name].abs().max()
        assert error < 2e-6, f"{name}: relative error {error:.1e}"
