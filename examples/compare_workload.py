"""What a comparison trains: a base model, its problems in three splits, and the verifier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from make_base_model import train_base_model
from make_smollm2 import make_smollm2
from tasks import BASE_MODELS, TASKS
from train import TreeRPOScriptArguments, load_reward_funcs
from train_data import load_split, set_columns
from transformers import AutoModelForCausalLM, AutoTokenizer


# Base models that are not trained from nothing: name -> what makes its folder.
PRETRAINED: dict[str, Callable[[Path], None]] = {
    "smollm2": partial(make_smollm2, num_steps=0),
    "smollm2_sums": make_smollm2,
}


@dataclass(frozen=True)
class Workload:
    """A built-in task, or any model, dataset and reward functions.

    The held-out problems are cut in two: the first `num_validation` serve to choose learning rates and options, the
    next `num_test` for the result.

    Args:
        task: Name in `TASKS`; if it is given, model, dataset and rewards are the task's own.
        model: Folder or Hub id of the base model.
        dataset: Name of a dataset for `train.py`'s loader.
        reward_names: Rewards as in `train.py`.
        max_completion_length: Most tokens of a response.
        max_rows_per_micro_batch: Most rows of a forward pass in training.
        lora_rank: Rank of LoRA adapters on all linear layers; 0 trains all weights.
        dtype: Of the base model. With "bfloat16", training computes in it, too.
    """

    task: str | None = None
    model: str = ""
    dataset: str = ""
    train_split: str = "train"
    held_out_split: str = "test"
    prompt_column: str | None = None
    solution_column: str | None = None
    system_prompt: str | None = None
    reward_names: tuple[str, ...] = ()
    max_completion_length: int = 256
    temperature: float = 1.0
    num_validation: int = 1024
    num_test: int = 2048
    eval_batch_size: int = 512
    max_rows_per_micro_batch: int = 1024
    lora_rank: int = 0
    dtype: str = "float32"

    def load(self) -> tuple[Any, Any]:
        """The base model and its tokenizer."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype)
        return model, AutoTokenizer.from_pretrained(self.model)

    def reward_funcs(self) -> list[Any]:
        """The verifier, the same in training and in evaluation."""
        if self.task is not None:
            return [TASKS[self.task].reward_func]
        return load_reward_funcs(TreeRPOScriptArguments(reward_funcs=list(self.reward_names)))

    def train(self, num_problems: int, seed: int) -> Dataset:
        """Training problems, `num_problems` of them if there are as many; another seed gives others."""
        if self.task is not None:
            return TASKS[self.task].make_dataset(num_problems, seed, False)
        dataset = self._load(self.train_split).shuffle(seed=seed)
        return dataset.select(range(min(num_problems, len(dataset))))

    @lru_cache(maxsize=4)  # noqa: B019  a run asks for one split at every measurement
    def held_out(self, split: str) -> Dataset:
        """The problems of "validation" or "test"."""
        count = self.num_validation + self.num_test
        if self.task is not None:
            dataset = TASKS[self.task].make_dataset(count, 0, True)
        else:
            dataset = self._load(self.held_out_split)
            if len(dataset) < count:
                raise ValueError(
                    f"num_validation {self.num_validation} and num_test {self.num_test} need {count} problems, but "
                    f"the split '{self.held_out_split}' of {self.dataset} has {len(dataset)}; lower them"
                )
        start, stop = {"validation": (0, self.num_validation), "test": (self.num_validation, count)}[split]
        return dataset.select(range(start, stop))

    def _load(self, split: str) -> Dataset:
        dataset = load_split(self.dataset, None, split, streaming=False)
        return set_columns(dataset, self.prompt_column, self.solution_column, self.system_prompt, self.reward_names)


def built_in(name: str, models_dir: Path, **options: Any) -> Workload:
    """The workload of a built-in task; a base model that is not shipped is made in `models_dir` first."""
    task = TASKS[name]
    shipped = BASE_MODELS[task.base].shipped if task.base in BASE_MODELS else None
    model = shipped or models_dir / task.base
    if not (model / "config.json").exists():
        print(f"Making the base model '{task.base}' in {model}, once")
        if task.base in PRETRAINED:
            PRETRAINED[task.base](model)
        else:
            train_base_model(task.base, model, seed=0)
    return Workload(task=name, model=str(model), max_completion_length=task.max_solution_tokens, **options)
