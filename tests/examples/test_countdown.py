"""The second example task: shortest routes, a fair verifier, disjoint splits, demonstrations of varying length."""

import itertools
import random

import countdown as task
import pytest
from tiny_llama import make_tokenizer


PROBLEM = task.Problem(65, (4, 9, 17))
ROUTE = "65-17=48\n48-17=31\n31-9=22\n22+4=26\n26-17=9\n9-9=0"


def test_a_prompt_is_the_whole_problem():
    assert PROBLEM.prompt == "65:4,9,17\n"
    assert task.Problem.parse(PROBLEM.prompt) == PROBLEM


def test_distances_agree_with_trying_all_routes():
    problem = task.Problem(31, (3, 8, 15))

    def reaches(length):
        signed = [sign * number for number in problem.numbers for sign in (1, -1)]
        for steps in itertools.product(signed, repeat=length):
            values = list(itertools.accumulate(steps, initial=problem.start))
            if values[-1] == 0 and all(0 <= value <= task.LARGEST_VALUE for value in values):
                return True
        return False

    shortest = next(length for length in range(8) if reaches(length))
    assert task.distances(problem.numbers)[problem.start] == shortest


def test_routes_without_detours_are_shortest_and_right():
    for prompt in task.make_dataset(100, seed=1)["prompt"]:
        problem = task.Problem.parse(prompt)
        route = task.solve(problem, random.Random(0), detour_rate=0.0)
        assert task.is_route(problem, route)
        distance = task.distances(problem.numbers)[problem.start]
        assert len(route.split("\n")) == distance
        assert task.MIN_DISTANCE <= distance <= task.MAX_DISTANCE


def test_demonstrations_are_right_and_vary_in_length():
    rows = task.make_demonstrations([0.0] * 300, seed=0)
    assert sum(task.correctness_reward(rows["prompt"], rows["completion"])) == 300
    lengths = {text.count("\n") + 1 for text in rows["completion"]}
    assert min(lengths) <= 3 and max(lengths) == task.MAX_STEPS


def test_slips_make_routes_wrong():
    rows = task.make_demonstrations([1.0] * 200, seed=0)
    assert sum(task.correctness_reward(rows["prompt"], rows["completion"])) < 20


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (ROUTE, 1.0),
        (ROUTE + "\n", 0.0),  # an empty line
        (ROUTE.replace("9-9=0", "9-9=1"), 0.0),  # another result
        (ROUTE.removesuffix("\n9-9=0"), 0.0),  # short of 0
        (ROUTE.removeprefix("65-17=48\n"), 0.0),  # not from the start
        ("65-65=0", 0.0),  # not a given number
        ("65-17=48\n48+17=65\n" + ROUTE, 1.0),  # a detour
        ("0", 0.0),
        ("", 0.0),
    ],
)
def test_verifier_checks_every_line(completion, reward):
    assert task.correctness_reward([PROBLEM.prompt], [completion], completion_ids=[[]]) == [reward]


def test_verifier_keeps_to_the_range():
    assert not task.is_route(task.Problem(95, (9, 13)), "95+9=104\n" + "104-13=91\n" + "\n".join(
        f"{value}-13={value - 13}" for value in range(91, 0, -13)
    ))  # fmt: skip
    assert not task.is_route(task.Problem(5, (8, 3)), "5-8=-3\n-3+3=0")


def test_splits_are_disjoint_whatever_the_seed():
    train = set(task.make_dataset(2000, seed=0)["prompt"]) | set(task.make_demonstrations([0.0] * 2000, 1)["prompt"])
    held_out = set(task.make_dataset(3072, seed=0, held_out=True)["prompt"])
    assert len(held_out) == 3072
    assert not train & held_out


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"countdown: there are no more than \d{4} problems in this split"):
        task.make_dataset(10_000, seed=0, held_out=True)


def test_longest_solution_fits_and_every_character_is_known():
    tokenizer = make_tokenizer(task.CHARACTERS)
    rows = task.make_demonstrations([0.2] * 1000, seed=2)
    for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
        assert tokenizer.decode(tokenizer(prompt + completion)["input_ids"]) == prompt + completion
        assert len(completion) + 1 <= task.MAX_SOLUTION_TOKENS
