"""Rewards that are wrong, missing or out of range: a clear error, or no value; never a ruined model."""

import numpy as np
import pytest
import torch
from test_trainer import train
from tiny import coin_reward, make_tokenizer, spread, spread_reward

from treerpo_trl import TreeRPOTrainer


class Recorder:
    """A reward function that gives 1.0 to every completion, but at some calls what it was told."""

    __name__ = "recorder"

    def __init__(self, answers):
        self.answers = answers
        self.calls = 0

    def __call__(self, completions, **kwargs):
        self.calls += 1
        return self.answers.get(self.calls, spread_reward)(completions)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda texts: [1.0], ValueError, "'recorder' returned 1 rewards, but"),
        (lambda texts: [0.5] * 99, ValueError, "'recorder' returned 99 rewards, but"),
        (lambda texts: None, TypeError, "'recorder' returned .* of type NoneType; return a list"),
        (lambda texts: 0.5, TypeError, "'recorder' returned .* of type float; return a list"),
        (lambda texts: dict.fromkeys(texts, 0.5), TypeError, "'recorder' returned .* of type dict; return a list"),
        (lambda texts: "1" * len(texts), TypeError, "'recorder' returned .* of type str; return a list"),
        (lambda texts: ["good"] * len(texts), TypeError, "'recorder' returned 'good' for completion 0"),
        (lambda texts: [[0.5]] * len(texts), TypeError, r"'recorder' returned \[0.5\] for completion 0"),
        (lambda texts: [float("inf")] * len(texts), ValueError, "'recorder' returned inf for completion 0"),
        (lambda texts: [-float("inf")] * len(texts), ValueError, "'recorder' returned -inf for completion 0"),
        (lambda texts: [1e39] * len(texts), ValueError, r"'recorder' returned 1e\+39 for completion 0.*up to 3.4e"),
        (lambda texts: [10**400] * len(texts), ValueError, "'recorder' returned 10000.*up to 3.4e"),
        (lambda texts: [-0.5] * len(texts), ValueError, "'recorder' returned -0.5 .*'treerpo'.*'group_std'"),
        (lambda texts: [2.0] * len(texts), ValueError, "'recorder' returned 2 .*'treerpo'.*reward_weights"),
        (lambda texts: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
)  # fmt: skip
def test_a_bad_reward_stops_the_run_with_its_name_and_leaves_the_trainer_whole(
    model, make_args, dataset, answer, error, message
):
    """It comes in the second step; afterwards the trainer trains on, in the same folder."""
    reward = Recorder({2: answer})
    trainer = TreeRPOTrainer(
        model, reward, make_args(max_steps=3), train_dataset=dataset, processing_class=make_tokenizer()
    )
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.reward_funcs == [reward]
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("unknown", [None, float("nan"), np.float32("nan"), torch.tensor(float("nan"))])
def test_none_and_nan_leave_a_leaf_without_a_value(model, make_args, dataset, unknown):
    def sometimes(completions, **kwargs):
        return [unknown if spread("skip" + text) < 0.4 else spread(text) for text in completions]

    trainer = train(model, make_args(), dataset, sometimes)
    rewards = [reward for scored in trainer.last_trees for reward in scored.rewards.values()]
    assert None in rewards and any(reward is not None for reward in rewards)
    for scored in trainer.last_trees:
        assert not any(scored.kept[node] for node, value in enumerate(scored.values) if value is None)


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_no_reward_at_all_trains_nothing_and_says_so(model, make_args, dataset, caplog, unknown):
    def reward(completions, **kwargs):
        return [unknown] * len(completions)

    trainer = TreeRPOTrainer(model, reward, make_args(), train_dataset=dataset, processing_class=make_tokenizer())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert trainer.state.log_history[0]["tree/kept_groups"] == 0
    assert "All reward functions returned None" in caplog.text


@pytest.mark.parametrize(
    "container", [list, tuple, np.array, torch.tensor, iter], ids=["list", "tuple", "numpy", "tensor", "iterator"]
)
def test_rewards_may_come_in_any_sequence(model, make_args, dataset, container):
    def reward(completions, **kwargs):
        return container(spread_reward(completions))

    trainer = train(model, make_args(), dataset, reward)
    for scored in trainer.last_trees:
        for leaf, given in scored.rewards.items():
            ids = scored.tree.completion_ids(leaf)
            assert given == pytest.approx(spread(trainer.processing_class.decode(ids, skip_special_tokens=True)))


def test_rewards_of_any_size_are_fine_for_other_estimators(model, make_args, dataset):
    def reward(completions, **kwargs):
        return [1e20 * (spread(text) - 0.5) for text in completions]

    train(model, make_args(advantage_estimator="group_std"), dataset, reward)


def test_a_column_that_a_reward_needs_and_the_data_lack_is_named_at_construction(model, make_args, dataset):
    def graded(completions, solution, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"'graded' needs 'solution', but train_dataset has the columns \['prompt', "):
        TreeRPOTrainer(
            model, [coin_reward, graded], make_args(), train_dataset=dataset, processing_class=make_tokenizer()
        )
