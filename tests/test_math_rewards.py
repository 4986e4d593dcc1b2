r"""The reward for MATH-style answers: golds as they stand in the data, LaTeX as people write it."""

import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from paper_data import find_data
from trl.rewards import accuracy_reward


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import math_rewards


def score(content: str, gold: str) -> float | None:
    return math_rewards.math_accuracy_reward([[{"role": "assistant", "content": content}]], [gold])[0]


@pytest.mark.parametrize(
    ("text", "braced"),
    [
        (r"\frac43", r"\frac{4}{3}"),
        (r"\frac 43", r"\frac{4}{3}"),
        (r"\frac4{16}", r"\frac{4}{16}"),
        (r"\dfrac{16}3", r"\dfrac{16}{3}"),
        (r"\tfrac\pi 2", r"\tfrac{\pi}{2}"),
        (r"\frac12345", r"\frac{1}{2}345"),
        (r"2\sqrt5+\sqrt 2", r"2\sqrt{5}+\sqrt{2}"),
        (r"\sqrt[3]2", r"\sqrt[3]{2}"),
        (r"\frac{\sqrt6}2", r"\frac{\sqrt{6}}{2}"),
        (r"\frac{-1+\sqrt7}{2}", r"\frac{-1+\sqrt{7}}{2}"),
        (r"\frac{a\}b}2", r"\frac{a\}b}{2}"),
        # Nothing to do, or nothing that TeX could read.
        (r"\frac{4}{3}", r"\frac{4}{3}"),
        (r"\sqrtsign 2 and \fraction", r"\sqrtsign 2 and \fraction"),
        (r"$\frac$ and \frac{1", r"$\frac$ and \frac{1"),
        (r"\frac\sqrt2 3", r"\frac\sqrt{2} 3"),
    ],
)
def test_braces_are_where_tex_would_put_them(text, braced):
    assert math_rewards.add_braces(text) == braced


pieces = st.sampled_from(["\\frac", "\\sqrt", "\\dfrac", "\\pi", "\\{", "\\", *"{}[]$ 12x"])


@given(st.lists(pieces, max_size=12).map("".join))
def test_braces_are_written_once_and_change_nothing_else(text):
    braced = math_rewards.add_braces(text)
    assert math_rewards.add_braces(braced) == braced
    bare = str.maketrans("", "", "{} ")
    assert braced.translate(bare) == text.translate(bare)


@pytest.mark.parametrize(
    ("content", "gold", "reward"),
    [
        (r"So it is $\boxed{\frac43}$.", r"\frac{4}{3}", 1.0),
        (r"So it is $\boxed{\frac{4}{3}}$.", r"\frac43", 1.0),
        (r"So it is $\boxed{\frac34}$.", r"\frac43", 0.0),
        (r"So it is $\boxed{\frac{\pi}{2}}$.", r"\frac\pi 2", 1.0),
        (r"So it is $\boxed{2\sqrt5}$.", r"$\sqrt{20}$", 1.0),
        (r"So it is 7.", "7", 0.0),  # no formula, as with TRL's reward
        (r"So it is $\boxed{7}$.", "", None),
    ],
)
def test_answers_are_compared_by_what_they_are_worth(content, gold, reward):
    assert score(content, gold) == reward


def test_extra_columns_reach_the_completions_table():
    logged = {}
    completion = [{"role": "assistant", "content": r"$\boxed{\frac43}$"}]
    math_rewards.math_accuracy_reward([completion], ["7"], log_extra=logged.__setitem__)
    assert logged["solution"] == ["$7$"] and set(logged) == {"solution", "gold_parsed", "answer_parsed"}


@pytest.mark.slow
def test_reference_solutions_of_math_are_correct():
    """All 7,500 training rows: at least 99% by this reward, which loses none that TRL's accepts."""
    rows = Dataset.from_parquet(find_data("math_train"))
    assert len(rows) == 7500
    completions = [[{"role": "assistant", "content": info["ground_truth_cot"]}] for info in rows["extra_info"]]
    golds = [answer["ground_truth"] for answer in rows["reward_model"]]
    rewards = math_rewards.math_accuracy_reward(completions, golds)
    assert sum(reward == 1 for reward in rewards) >= 0.99 * len(rows)
    missed = [index for index, reward in enumerate(rewards) if reward != 1]
    theirs = accuracy_reward([completions[i] for i in missed], [f"${golds[i]}$" for i in missed])
    assert not any(reward == 1 for reward in theirs)
