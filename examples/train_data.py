"""What `train.py` does to a dataset: load a split, find the prompt and the right answer, drop long prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import is_conversational

from treerpo_trl.rewards import to_solution


FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
# Rewards that compare with a column `solution`, and those that read chat messages.
NEED_SOLUTION = (
    "accuracy_reward",
    "math_accuracy_reward",
    "boxed_math_accuracy_reward",
    "reasoning_accuracy_reward",
)
NEED_MESSAGES = (*NEED_SOLUTION, "think_format_reward")
# What math-verify finds an answer in. After a backslash a dollar is an amount of money, and a bracket a line's height.


def load_split(name: str | None, config: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    """One split of a dataset of the Hub, a local folder or a local file.

    Raises:
        FileNotFoundError: The name is that of a file or folder that does not exist.
        ValueError: The dataset has no name, or no such split.
    """
    if not name:
        raise ValueError("dataset_name is not set; give a dataset of the Hub, a local folder or a local file")
    path = Path(name).expanduser()
    file_format = FILE_FORMATS.get(path.suffix)
    if not path.exists() and (file_format is not None or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"dataset_name is '{name}', but there is no file or folder {path.absolute()}")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(path)  # a folder that save_to_disk wrote, which load_dataset refuses
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        if split not in splits:
            raise ValueError(f"dataset '{name}' has no split '{split}'; it has {', '.join(splits)}")
        return splits[split]
    if file_format is not None and path.is_file():
        return load_dataset(file_format, data_files=str(path), split=split, streaming=streaming)
    return load_dataset(str(path) if path.is_dir() else name, name=config, split=split, streaming=streaming)


def look_up(row: Mapping[str, Any], column: str, option: str) -> Any:
    """The value of a column, or of a field of a struct by its dotted path.

    Raises:
        ValueError: There is no such column or field; the message lists those there are.
    """
    if column in row:
        return row[column]
    value: Any = row
    for depth, key in enumerate(column.split(".")):
        if not isinstance(value, Mapping) or key not in value:
            owner = ".".join(column.split(".")[:depth])
            found = f"has {', '.join(value)}" if isinstance(value, Mapping) else f"is a {type(value).__name__}"
            raise ValueError(
                f"{option} is '{column}', but {f'its column {owner!r}' if owner else 'the dataset'} {found}; set "
                f"{option} to one of the dataset's columns, with dots for the fields of a struct"
            )
        value = value[key]
    return value


def to_messages(prompt: str | list[dict[str, str]], system_prompt: str) -> list[dict[str, str]]:
    """Chat messages with this system message, or with none if it is empty."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system_prompt}, *messages] if system_prompt else messages


def set_columns(
    dataset: Any,
    prompt_column: str | None,
    solution_column: str | None,
    system_prompt: str | None,
    reward_names: Sequence[str],
) -> Any:
    """Put the prompt and the right answer where TRL looks for them: the columns `prompt` and `solution`.

    Raises:
        ValueError: The dataset has no rows, or lacks a column that is asked for or that a reward function reads.
    """

    def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
        prompt = look_up(row, prompt_column or "prompt", "dataset_prompt_column")
        columns = {"prompt": prompt if system_prompt is None else to_messages(prompt, system_prompt)}
        if solution_column is not None:
            columns["solution"] = to_solution(look_up(row, solution_column, "dataset_solution_column"))
        return columns

    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("the dataset has no rows")
    check_rewards_served({**first_row, **columns_of(first_row)}, reward_names)
    is_changed = any(option is not None for option in (prompt_column, solution_column, system_prompt))
    return dataset.map(columns_of) if is_changed else dataset


def check_rewards_served(row: Mapping[str, Any], reward_names: Sequence[str]) -> None:
    """Refuse now what TRL's reward functions would fail on after the first completions are sampled."""
    for name in reward_names:
        if name in NEED_SOLUTION and "solution" not in row:
            raise ValueError(
                f"{name} needs the right answers, but the dataset has {', '.join(row)}; set dataset_solution_column "
                "to the column that holds them"
            )
        if name in NEED_MESSAGES and not is_conversational({"prompt": row["prompt"]}):
            raise ValueError(
                f"{name} reads chat messages, but the prompts are strings; set system_prompt (it may be empty) to "
                "make messages of them"
            )


def drop_long_prompts(dataset: Any, max_prompt_length: int, processor: Any, template_kwargs: dict[str, Any]) -> Any:
    """Leave out rows whose prompt has more tokens, and say how many they are."""

    def fits(row: Mapping[str, Any]) -> bool:
        if not is_conversational({"prompt": row["prompt"]}):
            return len(processor(text=row["prompt"])["input_ids"]) <= max_prompt_length
        tokenized = processor.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
        )
        return len(tokenized["input_ids"]) <= max_prompt_length

    kept = dataset.filter(fits)
    if isinstance(dataset, Dataset):
        PartialState().print(
            f"Left out {len(dataset) - len(kept)} of {len(dataset)} rows, whose prompts have more than "
            f"{max_prompt_length} tokens."
        )
        if len(kept) == 0:
            raise ValueError(
                f"max_prompt_length={max_prompt_length} leaves out all {len(dataset)} rows of the dataset; raise it"
            )
    return kept
