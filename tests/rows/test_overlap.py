"""What a reward function says about parts of a batch is put together to what it would say about the whole batch."""

import random
from statistics import fmean
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treerpo_trl.growth import TreeShape
from treerpo_trl.rows import DistinctRows, RewardOverlap, score_once
from treerpo_trl.tree import ROOT, Segment, Tree


SHAPE = TreeShape((2,), 2, 2)


class Tokenizer:
    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, ids)) for ids in rows]


def make_trainer(*reward_funcs):
    return SimpleNamespace(
        reward_funcs=list(reward_funcs), num_generations=2, tree_shape=SHAPE, state="state", tools=[],
        accelerator=SimpleNamespace(device=SimpleNamespace(type="cpu")), processing_class=Tokenizer(), _tokenizer=None,
    )  # fmt: skip


def forest(draw: random.Random, num_trees: int) -> list[Tree]:
    """Trees of two leaves, which are often equal."""
    segments = [[Segment((draw.randint(0, 1),), True) for _ in range(2)] for _ in range(num_trees)]
    return [Tree.from_prompt([index]).grow({ROOT: pair}) for index, pair in enumerate(segments)]


def judge(prompts, completions, completion_ids, mark, trainer_state, log_extra, log_metric):
    """Judges completions by themselves."""
    assert trainer_state == "state" and [" ".join(map(str, ids)) for ids in completion_ids] == completions
    rewards = [float(text) + 10 * place for text, place in zip(completions, mark, strict=True)]
    log_extra("prompt", prompts)
    log_extra("twice", rewards)
    log_extra("twice", mark)
    if any(text == "1" for text in completions):
        log_extra("sparse", completions)
    log_metric("mean", sum(rewards) / len(rewards))
    for reward in rewards:
        log_metric("each", reward)
    return rewards


@given(st.integers(0, 1000), st.integers(1, 6))
def test_parts_are_as_the_whole(seed, num_trees):
    """Trees end in any order and in any company."""
    draw, rows = random.Random(seed), range(2 * num_trees)
    trees = forest(draw, num_trees)
    inputs = [{"prompt": f"p{row // 2}", "mark": row // 2} for row in rows]
    ids = [list(trees[row // 2].nodes[1 + row % 2].token_ids) for row in rows]
    arguments = {
        "prompts": [one["prompt"] for one in inputs], "completions": [str(token) for (token,) in ids],
        "completion_ids": ids, "mark": [one["mark"] for one in inputs], "trainer_state": "state",
    }  # fmt: skip
    with RewardOverlap(make_trainer(judge), inputs) as overlap:
        for part in split(draw, draw.sample(range(num_trees), num_trees)):
            overlap.add(trees, sorted(part))
        said = []
        for function in (score_once(judge, DistinctRows.of(ids, 2)), *overlap.in_place_of([None])):
            columns, metrics = [], []
            rewards = function(
                **arguments,
                log_extra=lambda *column, to=columns: to.append(column),
                log_metric=lambda *metric, to=metrics: to.append(metric),
            )
            said.append((rewards, columns, metrics))
    (rewards, columns, metrics), (others, other_columns, other_metrics) = said
    assert rewards == others == [token + 10 * (row // 2) for row, (token,) in enumerate(ids)]
    sparse, less = (dict(each).get("sparse", []) for each in (columns, other_columns))
    assert sorted(each for each in columns if each[0] != "sparse") == sorted(
        each for each in other_columns if each[0] != "sparse"
    )
    assert all(value in (None, full) for value, full in zip(less, sparse, strict=True))
    assert [text for text in sparse if text == "1"] == [text for text in less if text == "1"]
    for name in ("mean", "each"):  # TRL takes the mean of what is logged
        mean, other = (fmean(value for key, value in each if key == name) for each in (metrics, other_metrics))
        assert mean == pytest.approx(other)


def split(draw: random.Random, values: list[int]) -> list[list[int]]:
    parts = [[values[0]]]
    for value in values[1:]:
        if draw.random() < 0.5:
            parts.append([])
        parts[-1].append(value)
    return parts


def test_a_number_that_comes_once_a_call_is_averaged_by_completions():
    pairs = [[Segment((token,), True) for token in pair] for pair in ((0, 1), (1, 1))]
    trees = [Tree.from_prompt([0]).grow({ROOT: pair}) for pair in pairs]
    logged = []

    def reward(completions, log_metric, **kwargs):
        log_metric("share", completions.count("1") / len(completions))
        return [0.0] * len(completions)

    with RewardOverlap(make_trainer(reward), [{"prompt": "p"}] * 4) as overlap:
        for index in range(2):
            overlap.add(trees, [index])
        overlap.in_place_of([None])[0](log_extra=None, log_metric=lambda *metric: logged.append(metric))
    assert logged == [("share", pytest.approx(2 / 3))]


def test_other_functions_stay_as_they_are():
    async def gentle(**kwargs):
        raise AssertionError("it is TRL that calls it")

    with RewardOverlap(make_trainer(judge, gentle), [{"prompt": "p", "mark": 0}] * 2) as overlap:
        overlap.add(forest(random.Random(0), 1), [0])
        first, second = overlap.in_place_of(["scored once", "too"])
    assert callable(first) and second == "too"
