"""Reward functions that could not be called, or not run, are refused at construction; all others are taken."""

import functools
import importlib.util
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from test_trainer import train
from tiny import coin_reward, make_tokenizer, spread_reward
from torch import nn
from trl import rewards as trl_rewards

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.checks.reward_functions import REWARD_ARGUMENTS, check_reward_columns, check_reward_funcs
from treerpo_trl.rows import DistinctRows, score_once


COLUMNS = ["prompt", "answer"]


def bare(completions):
    return [0.5] * len(completions)


def open_ended(completions, **kwargs):
    return [0.5] * len(completions)


def complete(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):
    return [0.5] * len(completions)


def without_answer(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
    return [0.5] * len(completions)


def scaled(scale, completions, **kwargs):
    return [scale] * len(completions)


def scaled_second(completions, scale, **kwargs):
    return [scale] * len(completions)


def positional(completions, /, **kwargs):
    return [0.5] * len(completions)


def starred(*args):
    return [0.5]


def solved(completions, solution, **kwargs):
    return [0.5] * len(completions)


def keyword_only(*, completions, answer="", **kwargs):
    return [0.5] * len(completions)


@functools.wraps(bare)
def picking(**kwargs):
    return bare(kwargs["completions"])


async def bare_async(completions):
    return [0.5] * len(completions)


async def open_async(completions, **kwargs):
    return [0.5] * len(completions)


class Bare:
    def __call__(self, completions):
        return [0.5] * len(completions)

    def method(self, completions):
        return [0.5] * len(completions)


class Open:
    def __call__(self, completions, **kwargs):
        return [0.5] * len(completions)

    def method(self, completions, **kwargs):
        return [0.5] * len(completions)

    @classmethod
    def of_class(cls, completions, **kwargs):
        return [0.5] * len(completions)

    @staticmethod
    def of_nothing(completions):
        return [0.5] * len(completions)


FUNCTIONS = {
    "bare": bare,
    "open": open_ended,
    "complete": complete,
    "complete but for a column": without_answer,
    "positional only": positional,
    "starred": starred,
    "needs a column": solved,
    "keyword only": keyword_only,
    "a decorator that picks": picking,
    "lambda": lambda completions: [0.5],
    "open lambda": lambda completions, **kwargs: [0.5],
    "async": bare_async,
    "open async": open_async,
    "object": Bare(),
    "open object": Open(),
    "method": Bare().method,
    "open method": Open().method,
    "class method": Open.of_class,
    "static method": Open.of_nothing,
    "unbound method": Open.method,
    "partial": functools.partial(scaled, 0.5),
    "partial by name": functools.partial(scaled, scale=0.5),
    "partial that fills what TRL gives": functools.partial(scaled_second, 0.5),
    "partial of a partial": functools.partial(functools.partial(scaled), 0.5),
    "partial of an object": functools.partial(Open()),
    "partial of a bare function": functools.partial(bare),
    "partial with a needed column": functools.partial(solved, solution=["1"]),
    "C": len,
    "C without a signature": dict,
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_check_refuses_what_trls_call_refuses_and_nothing_else(kind):
    function = FUNCTIONS[kind]
    given = {name: ["x"] for name in [*REWARD_ARGUMENTS, "answer"]}
    try:
        result = function(**given)
        if hasattr(result, "close"):
            result.close()  # a coroutine
        is_callable = True
    except TypeError:
        is_callable = False
    if is_callable:
        check_reward_columns(function, "train_dataset", COLUMNS)
    else:
        with pytest.raises(ValueError, match=r"the reward function '.*' (does not take|needs|cannot be called)"):
            check_reward_columns(function, "train_dataset", COLUMNS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (bare, r"'bare' does not take prompts, completion_ids, trainer_state, log_extra, log_metric, answer, which.*"
               r"train_dataset has the columns \['prompt', 'answer'\].*add \*\*kwargs.*def bare\(completions, \*\*kw"),
        (without_answer, r"'without_answer' does not take answer, which TRL"),
        (positional, r"'positional' needs 'completions'|'positional' cannot be called as TRL does, with keywords"),
        (solved, r"'solved' needs 'solution', but train_dataset has the columns \['prompt', 'answer'\]"),
        (Bare(), "'Bare' does not take prompts"),
        (functools.partial(scaled_second, 0.5), "'scaled_second' .*'scale'"),
    ],
)  # fmt: skip
def test_a_signature_that_cannot_take_all_is_refused_with_what_it_lacks(function, message):
    with pytest.raises(ValueError, match=message):
        check_reward_columns([open_ended, function], "train_dataset", COLUMNS)


@pytest.mark.parametrize("name", ["train", "eval", "dict", "eval stream"])
def test_a_function_without_kwargs_is_refused_at_construction(model, make_args, dataset, name):
    """Its parameters may be all there are in the training data, but not in the evaluation data."""
    more = dataset.add_column("level", ["easy"] * len(dataset))
    stream = IterableDataset.from_generator(lambda: iter(more))
    datasets = {
        "train": {"train_dataset": more},
        "eval": {"train_dataset": dataset, "eval_dataset": more},
        "dict": {"train_dataset": dataset, "eval_dataset": {"easy": dataset, "hard": more}},
        "eval stream": {"train_dataset": dataset, "eval_dataset": stream},
    }[name]
    place = {"train": "train_dataset", "dict": r"eval_dataset\['hard'\]"}.get(name, "eval_dataset")
    with pytest.raises(ValueError, match=rf"'complete' does not take level, which TRL calls it with \({place} has"):
        TreeRPOTrainer(model, complete, make_args(), processing_class=make_tokenizer(), **datasets)


def test_columns_that_are_removed_are_not_given(model, make_args, dataset):
    def answered(completions, answer, **kwargs):
        return [0.5] * len(completions)

    with pytest.raises(ValueError, match=r"needs 'answer', but train_dataset, by remove_unused_columns=True, has the"):
        TreeRPOTrainer(
            model, answered, make_args(remove_unused_columns=True), train_dataset=dataset,
            processing_class=make_tokenizer(),
        )  # fmt: skip
    check_reward_columns(without_answer, "train_dataset", ["prompt"])


@pytest.mark.parametrize("column", ["prompts", "completions", "log_extra"])
def test_a_column_with_the_name_of_an_argument_is_refused(model, make_args, dataset, column):
    with pytest.raises(ValueError, match=f"train_dataset has the column '{column}', which is the name of an argument"):
        TreeRPOTrainer(
            model, coin_reward, make_args(), train_dataset=dataset.rename_column("answer", column),
            processing_class=make_tokenizer(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((coin_reward, bare), "reward_funcs is of type tuple; give one reward function, or a list of them"),
        ({"coin": coin_reward}, "reward_funcs is of type dict; give"),
        ([0.5], "the reward function 0.5 is of type float, which cannot be called"),
        ([coin_reward, [coin_reward]], "is of type list, which cannot be called"),
        (Open, r"the reward function Open is a class, so a call would make one; give Open\(...\)"),
    ],
)
def test_what_is_no_reward_function_is_refused(model, make_args, dataset, given, message):
    with pytest.raises(TypeError, match=message):
        TreeRPOTrainer(model, given, make_args(), train_dataset=dataset, processing_class=make_tokenizer())


def test_models_paths_and_nothing_are_left_to_trl():
    for given in (None, [], "a/model", nn.Linear(1, 1), [nn.Linear(1, 1), "a/model"]):
        check_reward_funcs(given)
        check_reward_columns(given, "train_dataset", COLUMNS)


MATH_REWARDS = {
    "accuracy_reward": trl_rewards.accuracy_reward,
    "reasoning_accuracy_reward": trl_rewards.reasoning_accuracy_reward,
    "cosine_scaled_reward": trl_rewards.get_cosine_scaled_reward(max_len=8),
}
OTHER_REWARDS = [
    trl_rewards.think_format_reward,
    trl_rewards.get_repetition_penalty_reward(2, -1.0),
    trl_rewards.get_soft_overlong_punishment(8, 4),
]


def hide_package(monkeypatch, name):
    """As if a package were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda key, *args: None if key == name else find_spec(key, *args))


@pytest.mark.parametrize("name", MATH_REWARDS)
@pytest.mark.parametrize("wrap", [lambda function: function, functools.partial], ids=["plain", "partial"])
def test_a_reward_of_trl_whose_package_is_missing_is_refused_at_construction(
    model, make_args, dataset, monkeypatch, name, wrap
):
    rows = dataset.rename_column("answer", "solution")
    reward = wrap(MATH_REWARDS[name])
    TreeRPOTrainer(model, reward, make_args(), train_dataset=rows, processing_class=make_tokenizer())
    hide_package(monkeypatch, "math_verify")
    message = rf'\'{name}\' of TRL needs the package math-verify, .* pip install "treerpo-trl\[math\]"'
    with pytest.raises(ImportError, match=message):
        TreeRPOTrainer(model, reward, make_args(), train_dataset=rows, processing_class=make_tokenizer())


def test_the_rewards_of_trl_that_need_nothing_are_taken_without_it(monkeypatch):
    """Every reward of TRL is in one of the two lists: a new one that needs a package would not go unseen."""
    hide_package(monkeypatch, "math_verify")
    check_reward_funcs(OTHER_REWARDS)
    assert len(MATH_REWARDS) + len(OTHER_REWARDS) == sum(map(len, trl_rewards._import_structure.values()))


def test_vllm_that_is_missing_is_told_at_construction(model, make_args, dataset, monkeypatch):
    hide_package(monkeypatch, "vllm")
    with pytest.raises(ImportError, match=r'use_vllm=True needs vLLM.*pip install "treerpo-trl\[vllm\]"'):
        TreeRPOTrainer(
            model, coin_reward, make_args(use_vllm=True), train_dataset=dataset, processing_class=make_tokenizer()
        )


# What a reward function returns


ONE_NUMBER = [torch.tensor([0.25]), torch.tensor(0.5), torch.tensor([[0.75]]), None]
CONTAINERS = {
    "(B, 1)": torch.rand(4, 1),
    "(B, 1, 1)": torch.rand(4, 1, 1),
    "(B, 2)": torch.rand(4, 2),
    "bfloat16": torch.rand(4, 1).bfloat16(),
    "booleans": torch.tensor([True, False, True, True]),
    "NaN": torch.tensor([[float("nan")], [0.0], [1.0], [0.5]]),
    "tensors of one number": ONE_NUMBER,
    "tensors and numbers": [0.5, torch.tensor([0.25]), None, True],
    "a gradient": torch.rand(4, 1, requires_grad=True),
    "empty tensors": [torch.rand(0)] * 4,
    "numpy (B,)": np.random.rand(4),
    "numpy (B, 1)": np.random.rand(4, 1),
    "numpy of one number": [np.array([0.5])] * 4,
    "numpy without dimensions": [np.array(0.5)] * 4,
    "numpy scalars": [np.float16(0.5), np.int64(1), np.bool_(True), np.float64(0.25)],
    "lists of one number": [[0.5]] * 4,
    "exact numbers": [Decimal("0.5"), Fraction(1, 2), 1, 0],
    "complex": [0.5j] * 4,
    "texts": ["0.5"] * 4,
    "bytes": [b"1"] * 4,
    "values of a dict": {"a": 0.5, "b": 1.0, "c": 0.0, "d": 0.25}.values(),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_a_reward_is_taken_where_trl_takes_it(kind):
    rewards, rows = CONTAINERS[kind], DistinctRows.of([[1], [2], [3], [4]], num_generations=4)
    column = torch.zeros(4, 2)
    try:  # as TRL makes a column of them
        given = [torch.nan if reward is None else reward for reward in rewards]
        column[:, 0] = torch.tensor(given, dtype=torch.float32)
        is_taken = True
    except (TypeError, ValueError, RuntimeError):
        is_taken = False
    score = score_once(lambda **kwargs: rewards, rows)
    if is_taken:
        scored = [torch.nan if reward is None else reward for reward in score(log_extra=None)]
        assert torch.equal(torch.tensor(scored, dtype=torch.float32).nan_to_num(9), column[:, 0].nan_to_num(9))
    else:
        with pytest.raises(TypeError, match=r"'<lambda>' returned .* for completion 0; return a number, or None"):
            score(log_extra=None)


def test_a_column_of_rewards_trains_and_evaluates(model, make_args, dataset):
    """Evaluation, which is TRL's, takes the same."""

    def reward(completions, **kwargs):
        return torch.tensor(spread_reward(completions)).view(-1, 1)

    args = make_args(max_steps=1, per_device_eval_batch_size=8, eval_strategy="steps", eval_steps=1)
    trainer = train(model, args, dataset, reward, eval_dataset=dataset.select([0]))
    given = {reward for scored in trainer.last_trees for reward in scored.rewards.values()}
    assert len(given) > 4 and all(0 <= reward <= 1 for reward in given)


def half(completions, **kwargs):
    return [0.75] * len(completions)


def test_a_sum_out_of_range_names_every_function_with_its_reward_and_weight(model, make_args, dataset):
    def sometimes(completions, **kwargs):
        return [None] * len(completions)

    args = make_args(reward_weights=[1.0, 0.5, 2.0])
    trainer = TreeRPOTrainer(
        model, [half, spread_reward, sometimes], args, train_dataset=dataset, processing_class=make_tokenizer()
    )
    message = (
        r"'half' returned 0.75 \(with weight 1\), 'spread_reward' returned [\d.]+ \(with weight 0.5\), 'sometimes' "
        r"returned None \(with weight 2\) for completion \d+, whose reward is 1[\d.]+, but .*='treerpo' "
        r"needs rewards in \[0, 1\].* Here reward_weights=\[0.285, 0.142, 0.571\] would do"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    args = make_args(reward_weights=[0.285, 0.142, 0.571], prune_threshold=None, max_steps=1)
    train(model, args, dataset, [half, spread_reward, sometimes])


def test_a_sum_that_overflows_names_its_functions(model, make_args, dataset):
    args = make_args(reward_weights=[1e38, 1e38], advantage_estimator="centered")

    def large(completions, **kwargs):
        return [3.0] * len(completions)

    trainer = TreeRPOTrainer(
        model, [large, coin_reward], args, train_dataset=dataset, processing_class=make_tokenizer()
    )
    with pytest.raises(
        ValueError, match=r"^'large' returned 3 \(with weight 1e\+38\), 'coin_.*is inf; return a finite"
    ):
        trainer.train()


# Chat messages


@pytest.mark.parametrize("name", ["train", "eval", "dict", "stream"])
def test_chat_messages_without_a_chat_template_are_refused(model, make_args, dataset, name):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1="}]] * 4})
    datasets = {
        "train": {"train_dataset": chats},
        "eval": {"train_dataset": dataset, "eval_dataset": chats},
        "dict": {"train_dataset": dataset, "eval_dataset": {"easy": dataset, "hard": chats}},
        "stream": {"train_dataset": IterableDataset.from_generator(lambda: iter(chats))},
    }[name]
    message = "chat messages, such as .*1=.*, but the TokenizersBackend has no chat template. Use an"
    with pytest.raises(ValueError, match=message):
        TreeRPOTrainer(model, coin_reward, make_args(), processing_class=tokenizer, **datasets)
    TreeRPOTrainer(model, coin_reward, make_args(), train_dataset=dataset, processing_class=tokenizer)
