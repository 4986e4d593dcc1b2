"""Each distinct trajectory is scored once, whatever kind of reward function scores it."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from trl.trainer.utils import is_async_callable

from treerpo_trl.rows import DistinctRows, score_once


IDS = [[1], [2], [1], [1], [1], [3]]  # two prompts of three rows
ROWS = DistinctRows.of(IDS, num_generations=3)
ARGUMENTS = {"prompts": list("pppqqq"), "completions": list("abaaac"), "completion_ids": IDS, "answer": list(range(6))}


def call(function, **kwargs):
    return function(**{**ARGUMENTS, "log_extra": lambda *args: None, "trainer_state": "state", **kwargs})


def test_rows_are_told_apart_by_prompt_position_and_tokens():
    assert ROWS.first == (0, 1, 3, 5)
    assert ROWS.inverse == (0, 1, 0, 2, 2, 3)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=2), min_size=1, max_size=12), st.integers(1, 4))
def test_expanding_a_selection_restores_equal_rows(ids, num_generations):
    rows = DistinctRows.of(ids, num_generations)
    assert rows.expand(rows.select(ids)) == ids
    assert len({(row // num_generations, tuple(ids[row])) for row in rows.first}) == len(rows.first)


def test_a_function_sees_each_trajectory_once_with_its_columns():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [10.0, 20.0, None, 40.0]

    assert call(score_once(reward, ROWS)) == [10.0, 20.0, 10.0, None, None, 40.0]
    assert seen["completions"] == ["a", "b", "a", "c"]
    assert seen["completion_ids"] == [[1], [2], [1], [3]]
    assert seen["answer"] == [0, 1, 3, 5]
    assert seen["trainer_state"] == "state"


def test_logged_columns_line_up_with_all_rows():
    logged = {}

    def reward(answer, log_extra, **kwargs):
        log_extra("doubled", [2 * value for value in answer])
        return [0.0] * len(answer)

    call(score_once(reward, ROWS), log_extra=lambda column, values: logged.update({column: values}))
    assert logged == {"doubled": [0, 2, 0, 6, 6, 10]}


def test_async_functions_stay_async():
    async def reward(completions, **kwargs):
        return [float(ord(text)) for text in completions]

    scored = score_once(reward, ROWS)
    assert is_async_callable(scored)
    assert asyncio.run(call(scored)) == [97.0, 98.0, 97.0, 97.0, 97.0, 99.0]


def test_callable_objects_and_tensors():
    class Reward:
        def __call__(self, completions, **kwargs):
            return torch.arange(len(completions))

    assert call(score_once(Reward(), ROWS)) == [0, 1, 0, 2, 2, 3]


def test_reward_models_run_on_distinct_rows():
    class Model(nn.Module):
        def forward(self, input_ids, attention_mask):
            self.batch = len(input_ids)
            return SimpleNamespace(logits=input_ids[:, :1].float() * attention_mask[:, :1])

    model = Model()
    inputs = {"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(6, 1)}
    assert score_once(model, ROWS)(**inputs).logits[:, 0].tolist() == [1, 2, 1, 1, 1, 3]
    assert model.batch == 4


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        ([1.0], ValueError, "'reward' returned 1 rewards, but 4 were expected"),
        ([1.0] * 6, ValueError, "'reward' returned 6 rewards, but 4 were expected"),
        ([1.0, "good", 0.0, 0.0], TypeError, "'reward' returned 'good' for completion 1; return a number"),
        ([1.0, 0.0, float("inf"), 0.0], ValueError, "'reward' returned inf for completion 2; return a finite number"),
    ],
)
def test_bad_rewards_name_the_function_the_value_and_the_fix(rewards, error, message):
    def reward(**kwargs):
        return rewards

    with pytest.raises(error, match=message):
        call(score_once(reward, ROWS))


def test_bad_logged_columns_are_refused():
    def reward(log_extra, **kwargs):
        log_extra("column", [1])
        return [0.0] * 4

    with pytest.raises(ValueError, match="logged 1 values in the column 'column', but it was given 4 completions"):
        call(score_once(reward, ROWS))
