"""What `evaluate.py` reads and writes: the problems of benchmarks, their right answers, and the file of responses."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train_data import FILE_FORMATS, check_rewards_served, load_split, look_up, to_messages

from treerpo_trl.evaluation import Response
from treerpo_trl.rewards import to_solution


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where problems and right answers are: a dataset, its split, and the columns of it."""

    dataset_name: str
    split: str
    prompt_column: str | None = None
    solution_column: str | None = None
    system_prompt: str | None = None


# The prompt of the paper's authors, whose data have the braces twice.
BOXED = "Please reason step by step, and put your final answer within \\boxed{{}}."
# The four of the paper's table. The answers of the first three are strings (numbers or LaTeX); those of OlympiadBench
# are lists of one string, in which several values that are all asked for stand side by side ("$69$,$84$").
BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", BOXED),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", BOXED),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer", BOXED),
    "olympiadbench": Benchmark("math-ai/olympiadbench", "test", "question", "final_answer", BOXED),
}


def name_of(dataset_name: str) -> str:
    """The name of a dataset in tables and of its file of responses: `math500` of `data/math500.parquet`."""
    name = Path(dataset_name).name
    return name.removesuffix(Path(name).suffix) if Path(name).suffix in FILE_FORMATS else name


def find_benchmark(
    dataset_name: str,
    split: str | None,
    prompt_column: str | None,
    solution_column: str | None,
    system_prompt: str | None,
) -> Benchmark:
    """A benchmark by its name, or any dataset with the columns given, which do not concern the named ones.

    Raises:
        ValueError: The name is neither that of a benchmark nor one of the Hub's, nor is there such a file or folder.
    """
    if dataset_name in BENCHMARKS and not Path(dataset_name).exists():
        named = BENCHMARKS[dataset_name]
        prompt = named.system_prompt if system_prompt is None else system_prompt
        return Benchmark(named.dataset_name, named.split, named.prompt_column, named.solution_column, prompt)
    path = Path(dataset_name).expanduser()
    if not path.exists() and "/" not in dataset_name and path.suffix not in FILE_FORMATS:
        raise ValueError(
            f"There is no benchmark '{dataset_name}'. Use one of {', '.join(BENCHMARKS)}, a dataset of the Hub "
            "(owner/name), a local folder or a local .parquet, .json, .jsonl or .csv file"
        )
    is_file = path.suffix in FILE_FORMATS  # which has one split, `train`
    return Benchmark(
        dataset_name, split or ("train" if is_file else "test"), prompt_column, solution_column, system_prompt
    )


def to_solutions(answers: Any) -> list[str]:
    """The answers of a row that count as right, each as the verifier reads it.

    A string or number is one answer. A list holds alternatives, any of which is right: in Minerva they are two or
    three ways to write one answer, or to round it. Those that differ by white space only are one.
    """
    listed = answers if isinstance(answers, list | tuple) else [answers]
    solutions = list(dict.fromkeys(to_solution(answer) for answer in listed))
    if not any(solutions):
        raise ValueError(f"dataset_solution_column has {answers!r} in a row; each row needs a right answer")
    return [solution for solution in solutions if solution]


def load_problems(benchmark: Benchmark, config: str | None, reward_names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a benchmark, with `prompt` and, if it has right answers, the list `solutions`.

    Raises:
        ValueError: There are no rows, or a column is missing that is named or that a reward function reads.
    """
    try:
        rows = list(load_split(benchmark.dataset_name, config, benchmark.split, streaming=False))
    except ValueError as error:
        if "corresponds to no data" not in str(error):  # what datasets says of a split without rows
            raise
        rows = []
    if not rows:
        raise ValueError(f"the split '{benchmark.split}' of '{benchmark.dataset_name}' has no rows; choose another")
    problems = []
    for row in rows:
        prompt = look_up(row, benchmark.prompt_column or "prompt", "dataset_prompt_column")
        problem = {**row, "prompt": prompt}
        if benchmark.system_prompt is not None:
            problem["prompt"] = to_messages(prompt, benchmark.system_prompt)
        if benchmark.solution_column is not None:
            answers = look_up(row, benchmark.solution_column, "dataset_solution_column")
            problem["solution"] = problem["solutions"] = to_solutions(answers)
        problems.append(problem)
    check_rewards_served(problems[0], reward_names)
    return problems


def any_of_solutions(reward_func: Callable[..., list[float | None]]) -> Callable[..., list[float | None]]:
    """A reward function that scores each completion against each of its row's `solutions`, and keeps the best."""

    def best(solutions: list[list[str]], **columns: Any) -> list[float | None]:
        owners = [row for row, several in enumerate(solutions) for _ in several]
        spread = {
            key: [values[row] for row in owners] if isinstance(values, list) else values
            for key, values in columns.items()
        }
        spread["solution"] = [solution for several in solutions for solution in several]
        scores: list[list[float]] = [[] for _ in solutions]
        for row, reward in zip(owners, reward_func(**spread), strict=True):
            if reward is not None:
                scores[row].append(reward)
        return [max(values) if values else None for values in scores]

    best.__name__ = getattr(reward_func, "__name__", repr(reward_func))
    return best


def extract_answer(text: str) -> str | None:
    """The answer of a response in one way of writing, for majority votes; None if math-verify finds none or is absent.

    It is looked for as `accuracy_reward` does. Answers that are equal but parse differently (1/2, 0.5) stay apart.
    """
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse
    except ImportError:
        return None
    normalization = NormalizationConfig(units=True)
    config = LatexExtractionConfig(
        normalization_config=normalization, boxed_match_priority=0, try_extract_without_anchor=False
    )
    parsed = parse(text, extraction_config=[config], extraction_mode="first_match")
    return str(parsed[0]) if parsed else None


def fingerprint_problems(problems: Sequence[Mapping[str, Any]]) -> str:
    """A short hash of problems and their answers, whatever the system message."""
    plain = [{**problem, "prompt": to_messages(problem["prompt"], "")} for problem in problems]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_folder(folder: Path) -> str:
    """A short hash of the files of a local model: their names and sizes, and both ends of each."""
    digest = hashlib.sha256()
    kinds = (".safetensors", ".bin", ".json", ".jinja")
    for path in sorted(path for path in folder.iterdir() if path.suffix in kinds):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


class ResponseFile:
    """A JSONL file of responses: its first line holds the settings of the run, each other line a response, in order.

    A run that was killed, also within a line, goes on after the last batch that is whole.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.batch_size = path, settings["batch_size"]
        found, records = read_responses(path) if path.exists() else ({}, [])
        if records:
            check_settings(path, found, settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps({"settings": settings}) + "\n")
            unfinished.replace(path)  # at once, so that a file always has its settings
        whole = len(records) == settings["num_responses"]
        num_kept = len(records) if whole else len(records) // self.batch_size * self.batch_size
        lines = path.read_bytes().split(b"\n")[: 1 + num_kept]
        with path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
        self.records = records[:num_kept]

    @property
    def num_batches(self) -> int:
        """Batches in the file; only the last of a run may be a smaller one."""
        return -(-len(self.records) // self.batch_size)

    def append(self, batch: Sequence[Response]) -> None:
        """Write a batch, with the answers found in its responses."""
        records = [{**asdict(response), "answer": extract_answer(response.text)} for response in batch]
        with self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        self.records += records


def read_responses(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and the responses of a file, without a last line that was cut off.

    Raises:
        ValueError: It is no file of responses.
    """
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break was cut off
    try:
        header, *records = [json.loads(line) for line in lines]
        settings = header["settings"]
        order = [(record["problem"], record["sample"]) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of responses that evaluate.py wrote; choose another") from error
    if order != [divmod(index, settings["num_samples"]) for index in range(len(order))]:
        raise ValueError(f"{path} has lines missing or out of order; delete it and run the evaluation again")
    return settings, records


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The settings that differ, as `key: value / value`."""
    keys = sorted({*first, *second})
    pairs = [(key, first.get(key, "unset"), second.get(key, "unset")) for key in keys]
    return [f"{key}: {one!r} / {other!r}" for key, one, other in pairs if one != other]


def check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a file that other settings made."""
    if differing := differences(found, wanted):
        raise ValueError(
            f"{path} was made with other settings (there / now): {'; '.join(differing)}. Use the same settings, set "
            "another output_dir, or delete the file"
        )
