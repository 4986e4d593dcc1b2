"""Tokens of small advantages are left out of the forward pass, and the gradient is that of the others."""

import pytest
import torch
from test_config import make
from tiny import make_tokenizer, spread_reward

from treerpo_trl import TreeRPOTrainer


def gradient_of(model, args, dataset, limit: float | None = None):
    """The gradient of the first update; with a limit, advantages below it are set to 0 instead of left out."""
    found = {}

    class Trainer(TreeRPOTrainer):
        def _compute_loss(self, model, inputs):
            found.setdefault("inputs", inputs)
            if limit is not None:
                small = inputs["advantages"].abs() < limit
                inputs = {**inputs, "advantages": inputs["advantages"].masked_fill(small, 0.0)}
            return super()._compute_loss(model, inputs)

        def _get_grad_norm(self, *args, **kwargs):
            found["gradient"] = {
                name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None
            }
            return super()._get_grad_norm(*args, **kwargs)

    torch.manual_seed(0)
    trainer = Trainer(model, spread_reward, args, train_dataset=dataset, processing_class=make_tokenizer())
    trainer.train()
    found["log"] = trainer.state.log_history[0]
    return found


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_the_gradient_is_that_of_the_others_divided_by_the_number_of_all(
    loss_type, prefix_sharing, model_path, make_args, dataset
):
    options = {"max_steps": 1, "advantage_estimator": "centered", "prune_threshold": None, "loss_type": loss_type}
    options["prefix_sharing"] = prefix_sharing
    left_out = gradient_of(model_path, make_args(min_advantage=0.1, **options), dataset)
    zeroed = gradient_of(model_path, make_args(**options), dataset, limit=0.1)
    for name, expected in zeroed["gradient"].items():
        torch.testing.assert_close(left_out["gradient"][name], expected, rtol=1e-4, atol=1e-7)
    mask, advantages = left_out["inputs"]["tool_mask"], left_out["inputs"]["advantages"]
    assert 0 < (mask > 0).sum() < (zeroed["inputs"]["tool_mask"] > 0).sum()
    assert (advantages[mask > 0].abs() >= 0.1).all()
    assert left_out["log"]["tree/trained_tokens"] < zeroed["log"]["tree/trained_tokens"]


def test_zero_leaves_out_nothing(model_path, make_args, dataset):
    found = gradient_of(model_path, make_args(max_steps=1, prune_threshold=None), dataset)
    assert found["log"]["tree/trained_tokens"] == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_advantage": -0.1}, ValueError, "min_advantage is -0.1; use 0 to train every token"),
        ({"min_advantage": float("nan")}, ValueError, "min_advantage is nan"),
        ({"min_advantage": float("inf")}, ValueError, "min_advantage is inf"),
        ({"min_advantage": "0.3"}, TypeError, "min_advantage is '0.3', of type str; use min_advantage=0.3"),
        ({"min_advantage": 0.3, "loss_type": "bnpo"}, ValueError, "does not work with loss_type='bnpo'"),
    ],
)
def test_what_is_no_size_of_advantages_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
