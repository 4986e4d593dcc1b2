r"""The reward for MATH-style answers: golds as they stand in the data, LaTeX as people write it."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from paper_data import find_data
from trl.rewards import accuracy_reward

from treerpo_trl import rewards


def score(content: str, gold: str) -> float | None:
    return rewards.math_accuracy_reward([[{"role": "assistant", "content": content}]], [gold])[0]


def score_boxed(*contents: str, gold: str | list[str]) -> list[float | None]:
    golds = [gold] * len(contents) if isinstance(gold, str) else gold
    return rewards.boxed_math_accuracy_reward([[{"role": "assistant", "content": text}] for text in contents], golds)


def reference_solutions(step: int) -> tuple[list[str], list[str]]:
    """Every so many of MATH's 7,500 worked solutions, and the authors' gold answers of them."""
    rows = Dataset.from_parquet(find_data("math_train"))
    assert len(rows) == 7500
    rows = rows.select(range(0, len(rows), step))
    return [info["ground_truth_cot"] for info in rows["extra_info"]], [
        answer["ground_truth"] for answer in rows["reward_model"]
    ]


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
        (r"\frac{1+\sqrt2", r"\frac{1+\sqrt{2}"),
        (r"\frac{a\\{b}}2", r"\frac{a\\{b}}{2}"),  # a line break, not an escaped brace
        (r"\frac\sqrt2 3", r"\frac\sqrt{2} 3"),
    ],
)
def test_braces_are_where_tex_would_put_them(text, braced):
    assert rewards.add_braces(text) == braced


pieces = st.sampled_from(["\\frac", "\\sqrt", "\\dfrac", "\\pi", "\\{", "\\", *"{}[]$ 12x"])


@given(st.lists(pieces, max_size=12).map("".join))
def test_braces_are_written_once_and_change_nothing_else(text):
    braced = rewards.add_braces(text)
    assert rewards.add_braces(braced) == braced
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
    rewards.math_accuracy_reward([completion], ["7"], log_extra=logged.__setitem__)
    assert logged["solution"] == ["$7$"] and set(logged) == {"solution", "gold_parsed", "answer_parsed"}


@pytest.mark.slow
def test_reference_solutions_of_math_are_correct():
    """All 7,500 training rows: at least 99% by this reward, which loses none that TRL's accepts."""
    solutions, golds = reference_solutions(step=1)
    completions = [[{"role": "assistant", "content": text}] for text in solutions]
    scores = rewards.math_accuracy_reward(completions, golds)
    assert sum(reward == 1 for reward in scores) >= 0.99 * len(golds)
    missed = [index for index, reward in enumerate(scores) if reward != 1]
    theirs = accuracy_reward([completions[i] for i in missed], [f"${golds[i]}$" for i in missed])
    assert not any(reward == 1 for reward in theirs)


def test_deep_nesting_is_no_recursion():
    depth = 600
    text = r"\sqrt{" * depth + r"\frac12" + "}" * depth
    assert rewards.add_braces(text) == text.replace("12", "{1}{2}")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"So $x=\boxed{5}$.", r"\boxed{5}"),
        (r"\boxed{\frac{1}{1+\frac{1}{2}}} and more", r"\boxed{\frac{1}{1+\frac{1}{2}}}"),
        (r"\boxed{\left\{1,2\right\}}", r"\boxed{\left\{1,2\right\}}"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}"),
        (r"First \boxed{1}, no: \boxed{2}.", r"\boxed{2}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        ("\\boxed\n{5}", r"\boxed{5}"),
        (r"So $\boxed 9$.", r"\boxed{9}"),  # as TeX reads it, and as MATH's solutions have it
        (r"So $\boxed 57$.", r"\boxed{5}"),
        # No box, or none that ends.
        ("So it is $5$.", ""),
        (r"So it is \fbox{5}.", ""),
        (r"So it is \boxedtext{5}.", ""),
        (r"First \boxed{5}, and then \boxed{6", ""),
        (r"In the end \boxed", ""),
    ],
)
def test_the_last_box_counts(text, box):
    assert rewards.last_box(text) == box


@given(st.lists(pieces, max_size=12).map("".join), st.lists(pieces, max_size=6).map("".join))
def test_whatever_stands_around_it_the_last_box_is_found(before, after):
    assert rewards.last_box(before + r"\boxed{\frac{1}{\}}}" + after) == r"\boxed{\frac{1}{\}}}"


@pytest.mark.parametrize(
    ("content", "gold", "reward"),
    [
        (r"It is $\boxed{\frac43}$.", r"\frac{4}{3}", 1.0),
        (r"It is $\boxed{\left(\frac{1}{2}, \frac\pi 2\right)}$.", r"(0.5, \frac{\pi}{2})", 1.0),
        (r"It is $\boxed{1}$ or $\boxed{2}$.", "2", 1.0),
        (r"It is $\boxed{1}$ or $\boxed{2}$.", "1", 0.0),
        (r"It is $7$. The final answer is $7$.", "7", 0.0),
        (r"It is $7$, so $\boxed{8}$. The final answer is $7$. I hope it is correct.", "7", 0.0),
        (r"It is $\boxed{7}$, put within \boxed{}.", "7", 0.0),
        (r"It is $\boxed{7", "7", 0.0),
        # Golds: a worked solution, a formula, one that cannot be read.
        (r"It is $\boxed{-3}$.", r"So it is $\boxed{5}$ or $\boxed{-3}$, as $5-3=2$.", 1.0),
        (r"It is $\boxed{20}$.", "$20$", 1.0),
        (r"It is $\boxed{7}$.", "", None),
    ],
)
def test_only_the_answer_in_the_box_counts(content, gold, reward):
    assert score_boxed(content, gold=gold) == [reward]


def test_extra_columns_of_a_boxed_answer():
    logged = {}
    completions = [[{"role": "assistant", "content": text}] for text in (r"$6$, no: $\boxed{7}$", "$7$")]
    rewards.boxed_math_accuracy_reward(completions, ["7", "7"], log_extra=logged.__setitem__)
    assert logged["answer_parsed"] == ["[7, '7']", "[unparseable]"]


def without_box(solutions: list[str], golds: list[str]) -> list[str]:
    """The same solutions, which end in the right answer as a formula."""
    return [
        text.replace(r"\boxed", "") + f" The answer is ${gold}$." for text, gold in zip(solutions, golds, strict=True)
    ]


def test_boxed_reference_solutions_of_math():
    """250 rows: with the box all score; without it none, though nearly all do by the reward that takes any formula."""
    solutions, golds = reference_solutions(step=30)
    assert score_boxed(*solutions, gold=golds) == [1.0] * 250
    boxless = without_box(solutions, golds)
    assert score_boxed(*boxless, gold=golds) == [0.0] * 250
    anywhere = rewards.math_accuracy_reward([[{"role": "assistant", "content": text}] for text in boxless], golds)
    assert sum(reward == 1 for reward in anywhere) >= 240


@pytest.mark.slow
def test_all_boxed_reference_solutions_of_math():
    """Three are missed: two have no gold answer, that of the third is a word. A worked solution serves as gold too."""
    solutions, golds = reference_solutions(step=1)
    assert sum(reward == 1 for reward in score_boxed(*solutions, gold=golds)) == 7497
    some, given = solutions[::5], golds[::5]
    assert score_boxed(*some, gold=some) == [1.0 if gold else None for gold in given]
