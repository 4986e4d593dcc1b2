"""The additions of the pretrained model: right problems, a strict reward, and splits that do not meet."""

import random
import re

import additions
import pytest


def test_problems_are_additions_after_a_right_example():
    for row in additions.make_dataset(200, seed=1):
        *_, question, example, problem = (message["content"] for message in row["prompt"])
        first, second, third = map(int, re.findall(r"\d+", problem))
        assert first + second + third == int(row["answer"])
        assert problem == additions.format_problem((first, second, third))
        assert question == additions.format_problem(additions.EXAMPLE)
        assert example == additions.solve(additions.EXAMPLE)


def test_solutions_are_right_and_fit():
    rng = random.Random(0)
    for _ in range(100):
        numbers = tuple(rng.randint(1, additions.LARGEST) for _ in range(3))
        solution = additions.solve(numbers)
        for left, right in re.findall(r"([\d+]+)=(\d+)", solution):
            assert sum(map(int, left.split("+"))) == int(right)
        # A character is a token at most, the word "so" with its space is one, and so is EOS.
        assert len(solution) - 2 + 1 <= additions.MAX_SOLUTION_TOKENS
        completion = [{"role": "assistant", "content": solution}]
        assert additions.correctness_reward([completion], [str(sum(numbers))]) == [1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [("7", 1.0), ("3+4=7.", 1.0), ("It is 7 or 8", 0.0), ("17", 0.0), ("77", 0.0), ("3+4=7, so 7+1", 0.0), ("", 0.0)],
)
def test_the_last_number_counts(text, reward):
    assert additions.correctness_reward([[{"role": "assistant", "content": text}]], ["7"]) == [reward]


def test_splits_do_not_meet_and_only_those_to_train_on_repeat():
    train, held_out = (
        [row["prompt"][-1]["content"] for row in additions.make_dataset(count, 0, is_held_out)]
        for count, is_held_out in ((8000, False), (800, True))
    )
    assert not set(train) & set(held_out)
    assert len(set(held_out)) == 800 and len(set(train)) < 8000
    with pytest.raises(ValueError, match="additions: there are no more than"):
        additions.make_dataset(1500, 0, held_out=True)
