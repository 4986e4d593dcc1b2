"""The example task: right problems, a fair verifier, disjoint splits, a lossless tokenizer, a usable base model."""

import random

import chain_arithmetic as task
import pytest
from problems import is_held_out
from tiny_llama import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from treerpo_trl.evaluation import evaluate


def answer_by_plain_python(prompt: str) -> int:
    """The answer by Python's own arithmetic: the chain with a bracket and a modulo around every step."""
    expression, pending = "", ""
    for character in prompt.removesuffix("?\n"):
        if character in "+-*":
            expression, pending = f"(({expression}{pending})%100){character}", ""
        else:
            pending += character
    return eval(f"({expression}{pending})%100")


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_agree_with_python(held_out):
    for row in task.make_dataset(300, seed=3, held_out=held_out):
        assert int(row["answer"]) == answer_by_plain_python(row["prompt"])


def test_known_solution():
    solution, answer = task.solve(3, [("*", 9), ("-", 5), ("+", 6)], random.Random(0))
    assert solution == "3*9=27\n27-5=22\n22+6=28\n#28"
    assert answer == 28


def test_negative_results_wrap_around():
    assert task.apply_operation(3, ("-", 5)) == 98


def test_unknown_operation_is_named():
    with pytest.raises(ValueError, match="'/'"):
        task.apply_operation(8, ("/", 2))


def test_splits_are_disjoint_whatever_the_seed():
    train = set(task.make_dataset(3000, seed=0)["prompt"]) | set(task.make_demonstrations([0.0] * 3000, 1)["prompt"])
    held_out = set(task.make_dataset(1000, seed=0, held_out=True)["prompt"])
    assert len(held_out) == 1000
    assert not train & held_out


def test_worked_examples_make_the_prompt_long_and_are_right():
    for row in task.make_dataset(50, seed=0, held_out=True, num_examples=4):
        *examples, problem = [part + "?\n" for part in row["prompt"].removesuffix("?\n").split("?\n")]
        assert len(row["prompt"]) > 2 * task.MAX_SOLUTION_TOKENS
        answers = [int(text.split("\n#")[1].split("\n")[0]) for text in [*examples[1:], problem]]
        problems = [examples[0], *(text.split("\n", maxsplit=text.count("\n") - 1)[-1] for text in examples[1:])]
        assert answers == [answer_by_plain_python(text) for text in problems]
        own = problem.split("\n", maxsplit=problem.count("\n") - 1)[-1]
        assert int(row["answer"]) == answer_by_plain_python(own)
        assert is_held_out(own) and not any(map(is_held_out, problems))


def test_same_seed_same_problems():
    assert task.make_dataset(20, seed=5)[:] == task.make_dataset(20, seed=5)[:]
    assert task.make_dataset(20, seed=5)[:] != task.make_dataset(20, seed=6)[:]


def test_clean_demonstrations_are_right_and_slips_are_mostly_wrong():
    demonstrations = task.make_demonstrations([0.0] * 200 + [1.0] * 200, seed=0)
    answers = [str(answer_by_plain_python(prompt)) for prompt in demonstrations["prompt"]]
    rewards = task.correctness_reward(demonstrations["completion"], answers)
    assert sum(rewards[:200]) == 200
    assert sum(rewards[200:]) < 20


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("3*9=27\n#27", 1.0),
        ("#27", 1.0),
        ("3*9=28\n#28", 0.0),
        ("3*9=27\n#27\n", 0.0),
        ("3*9=27\n#27#27", 0.0),
        ("3*9=27\n#2", 0.0),
        ("3*9=27", 0.0),
        ("", 0.0),
    ],
)
def test_verifier_wants_exactly_the_final_answer(completion, reward):
    assert task.correctness_reward([completion], ["27"], prompts=["3*9?\n"]) == [reward]


@pytest.mark.parametrize("num_operations", [(2, 4), (8, 8)])
def test_longest_solution_fits(num_operations):
    tokenizer = make_tokenizer(task.CHARACTERS)
    longest = task.max_solution_tokens(num_operations[1])
    for seed in range(3):
        for row in task.make_demonstrations([0.0] * 300, seed, num_operations):
            assert len(tokenizer(row["completion"])["input_ids"]) + 1 <= longest


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="chains of 1 to 1 operations: there are no more than 3"):
        task.make_dataset(1000, seed=0, held_out=True, num_operations=(1, 1))


def test_number_of_operations_is_as_asked():
    for row in task.make_dataset(50, seed=0, num_operations=(8, 8)):
        assert sum(row["prompt"].count(symbol) for symbol in "+-*") == 8


def test_tokenizer_round_trip_through_save_and_load(tmp_path):
    tokenizer = make_tokenizer(task.CHARACTERS)
    make_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "3*9-5?\n3*9=27\n27-5=22\n#22" + task.CHARACTERS
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    # With the model's config beside it, as AutoTokenizer may choose a class by model type.
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), type(tokenizer).from_pretrained(tmp_path)):
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
        assert loaded.decode([*ids, loaded.eos_token_id], skip_special_tokens=True) == text
        assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_unknown_character_is_an_error_and_not_lost():
    with pytest.raises(Exception, match="UNK"):
        make_tokenizer(task.CHARACTERS)("3 * 9")


def test_shipped_base_model_is_small():
    assert sum(file.stat().st_size for file in task.BASE_MODEL_DIR.rglob("*")) < 4_000_000


def test_shipped_base_model_knows_the_task_but_slips():
    tokenizer = AutoTokenizer.from_pretrained(task.BASE_MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(task.BASE_MODEL_DIR)
    problems = task.make_dataset(64, seed=2, held_out=True)
    options = {"max_new_tokens": task.MAX_SOLUTION_TOKENS, "batch_size": 256, "progress_bar": False}
    greedy = evaluate(model, tokenizer, problems, task.correctness_reward, temperature=0, **options)
    sampled = evaluate(model, tokenizer, problems, task.correctness_reward, num_samples=4, **options)
    assert greedy.pass_at_1 > 0.7
    assert 0.15 < sampled.pass_at_1 < 0.45
    assert greedy.truncated < 0.1


def test_the_graded_reward_counts_right_lines_and_forgives_what_goes_on_from_a_slip():
    prompt = "3*9-5+6?\n"
    assert task.parse_prompt(prompt) == (3, [("*", 9), ("-", 5), ("+", 6)])
    solutions = {
        "3*9=27\n27-5=22\n22+6=28\n#28": 1,
        "3*9=28\n28-5=23\n23+6=29\n#29": 2 / 3,  # one slip
        "3*9=27\n27-5=22\n23+6=29\n#29": 2 / 3,  # does not go on from the line above
        "3*9=27\n27-4=23\n23+6=29\n#29": 2 / 3,  # another operation than the problem's
        "3*9=27\n27-5=22": 2 / 3,
        "3*9=\n": 0,
        "3*9=127\n127-5=22": 0,
        "": 0,
    }
    rewards = task.right_lines_reward([prompt] * len(solutions), list(solutions))
    assert rewards == pytest.approx(list(solutions.values()))


@pytest.mark.parametrize("error_rate", [0.0, 0.5])
def test_the_graded_reward_is_one_for_solutions_without_a_slip_alone(error_rate):
    rows = task.make_demonstrations([error_rate] * 50, seed=1)
    rewards = task.right_lines_reward(rows["prompt"], rows["completion"])
    assert all(0 <= reward <= 1 for reward in rewards)
    assert all(reward == 1 for reward in rewards) == (error_rate == 0)
