"""What examples/train.py does to a dataset: it finds columns, marks answers, and drops long prompts."""

from pathlib import Path

import datasets
import pytest
import train_data
from datasets import Dataset
from math_verify import parse


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with a dataset cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("name", ["missing.parquet", "./missing", "/no/such/folder", "~/no-such-file.jsonl"])
def test_missing_dataset_is_named(folder, name):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder /.*"):
        train_data.load_split(name, None, "train", False)


ROWS = [
    {"question": "1 + 1?", "gold": {"answer": "2"}, "number": 2, "several": ["2"]},
    {"question": "1 / 2?", "gold": {"answer": r"\frac12"}, "number": 5, "several": [r"$\frac12$"]},
]


@pytest.mark.parametrize("saved_as", ["rows.parquet", "rows.json", "rows.jsonl", "folder", "saved", "saved_splits"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_datasets_load(folder, saved_as, streaming):
    rows = Dataset.from_list(ROWS)
    if saved_as == "folder":
        rows.to_parquet("folder/train.parquet")
    elif saved_as.startswith("saved"):
        (datasets.DatasetDict({"train": rows}) if saved_as == "saved_splits" else rows).save_to_disk(saved_as)
    else:
        rows.to_parquet(saved_as) if saved_as.endswith("parquet") else rows.to_json(saved_as)
    loaded = train_data.load_split(saved_as, None, "train", streaming)
    assert [row["question"] for row in loaded] == ["1 + 1?", "1 / 2?"]
    with pytest.raises(ValueError, match="test"):
        train_data.load_split(saved_as, None, "test", streaming)


@pytest.mark.parametrize("column", ["gold.answer", "number", "several"])
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_become_messages_and_marked_answers(column, streaming):
    rows = Dataset.from_list(ROWS)
    rows = rows.to_iterable_dataset() if streaming else rows
    first = next(iter(train_data.set_columns(rows, "question", column, "Think.", ["accuracy_reward"])))
    assert first["solution"] == "$2$"
    assert first["prompt"] == [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    assert first["question"] == "1 + 1?"


def test_dataset_is_left_alone_by_default():
    rows = Dataset.from_list([{"prompt": "1 + 1?", "solution": "2"}])
    assert train_data.set_columns(rows, None, None, None, ["my_rewards.parity_reward"]) is rows


@pytest.mark.parametrize(
    ("prompt_column", "solution_column", "system_prompt", "message"),
    [
        (None, None, "", "dataset_prompt_column is 'prompt', but the dataset has question, gold, number, several"),
        ("question", "solution", "", "dataset_solution_column is 'solution', but the dataset has question, gold"),
        (
            "question",
            "gold.solution",
            "",
            "dataset_solution_column is 'gold.solution', but its column 'gold' has answer",
        ),
        ("question", "number.answer", "", "its column 'number' is a int"),
        ("question", None, "", "accuracy_reward needs the right answers, but the dataset has question, gold"),
        ("question", "number", None, "accuracy_reward reads chat messages, but the prompts are strings"),
    ],
)
def test_missing_column_lists_those_there_are(prompt_column, solution_column, system_prompt, message):
    with pytest.raises(ValueError, match=message):
        train_data.set_columns(
            Dataset.from_list(ROWS), prompt_column, solution_column, system_prompt, ["accuracy_reward"]
        )


def test_system_prompt_replaces_that_of_the_dataset():
    messages = [{"role": "system", "content": "Old."}, {"role": "user", "content": "1 + 1?"}]
    assert train_data.to_messages(messages, "New.") == [{"role": "system", "content": "New."}, messages[1]]
    assert train_data.to_messages(messages, "") == messages[1:]


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        (r"\frac12", r"$\frac12$"),
        (r"\$3.50", r"$\$3.50$"),  # money, not a formula
        (r"\begin{pmatrix} 1 \\[1ex] 2 \end{pmatrix}", r"$\begin{pmatrix} 1 \\[1ex] 2 \end{pmatrix}$"),
        ("  7\n", "$7$"),
        (204, "$204$"),
        (["0.5"], "$0.5$"),
        ("$7$", "$7$"),
        (r"\(7\)", r"\(7\)"),
        (r"So it is \boxed{7}.", r"So it is \boxed{7}."),
        ("", ""),
        (None, ""),
    ],
)
def test_bare_answers_are_marked_and_readable(answer, solution):
    assert train_data.to_solution(answer) == solution
    assert bool(parse(solution)) == bool(solution)


def test_several_answers_are_refused():
    with pytest.raises(ValueError, match=r"2 answers in a row \(\['1', '2'\]\)"):
        train_data.to_solution(["1", "2"])


def test_long_prompts_are_dropped_by_their_tokens(tokenizer):
    rows = Dataset.from_dict({"prompt": ["12345", "123456"]})
    assert train_data.drop_long_prompts(rows, 5, tokenizer, {})["prompt"] == ["12345"]
    messages = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1"}], [{"role": "user", "content": "12"}]]})
    num_tokens = len("u1\na")  # by the template: the role's first letter, the content, a newline; then "a"
    assert train_data.drop_long_prompts(messages, num_tokens, tokenizer, {})["prompt"] == messages[:1]["prompt"]
    with pytest.raises(ValueError, match="max_prompt_length=4 leaves out all 2 rows"):
        train_data.drop_long_prompts(rows, 4, tokenizer, {})
