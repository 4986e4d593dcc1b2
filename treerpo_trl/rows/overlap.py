"""Reward functions that are called on the trees that have ended, in a thread, while others still grow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import nn
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational
from trl.trainer.utils import is_async_callable

from ..tree import Tree
from .scoring import DistinctRows, score_once


# What TRL does not hand on as a column.
KEPT_COLUMNS = ("prompt", "completion", "completion_ids")


@dataclass
class _Answer:
    """What a reward function said to some rows of the batch.

    Args:
        rows: Their indices.
        num_distinct: How many trajectories they hold.
        rewards: Of each row.
        columns: (name, value of each row) of each column that it logged.
        metrics: Name -> values that it logged.
    """

    rows: Sequence[int]
    num_distinct: int
    rewards: list[float | None] = field(default_factory=list)
    columns: list[tuple[str, list[Any]]] = field(default_factory=list)
    metrics: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))


class RewardOverlap:
    """Calls the reward functions of one batch while it is sampled, and has TRL's own call find what they said.

    One thread calls one function at a time, on trees in the order in which they end. Each call has the rows of the
    trees that ended together, and all that TRL would pass with them. Async functions and reward models are left to
    TRL: the former run side by side, the latter need the accelerator that samples.

    After a first exception no function is called any more, and it is raised where TRL would have called the function.
    If the batch fails elsewhere, the thread ends after the call that it is in. Nobody waits for that: it may hang.

    Args:
        trainer: Whose functions are called.
        inputs: [B] rows of the dataset that the batch is made of, `num_generations` of each prompt.
    """

    def __init__(self, trainer: Any, inputs: Sequence[dict[str, Any]]):
        self._trainer = trainer
        self._inputs = inputs
        self._functions = {
            index: function
            for index, function in enumerate(trainer.reward_funcs)
            if not isinstance(function, nn.Module) and not is_async_callable(function)
        }
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._answers: list[Future[dict[int, _Answer]]] = []
        self._is_over = False
        # Of each thread its own: which accelerator is meant where none is named.
        on_cpu = trainer.accelerator.device.type == "cpu"
        self._device = None if on_cpu else torch.accelerator.current_device_index()

    def __enter__(self) -> RewardOverlap:
        Thread(target=copy_context().run, args=(self._work,), name="treerpo-rewards", daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._is_over = True
        self._jobs.put(None)

    def add(self, trees: Sequence[Tree], ended: Sequence[int]) -> None:
        """Have the rows of trees that will not grow any more scored.

        Args:
            trees: All of the batch, as far as they have grown.
            ended: Indices of those that have ended since the last call.
        """
        if not self._functions:
            return
        trainer = self._trainer
        leaves = [(trees[index], leaf) for index in ended for leaf in trainer.tree_shape.slots(trees[index])]
        size = trainer.num_generations
        rows = [row for index in ended for row in range(index * size, (index + 1) * size)]
        inputs = [self._inputs[row] for row in rows]
        prompts, ids = [one["prompt"] for one in inputs], [tree.completion_ids(leaf) for tree, leaf in leaves]
        arguments = {
            "prompts": prompts,
            "completions": completions_of(trainer, prompts, [list(tree.prompt_ids) for tree, _ in leaves], ids),
            "completion_ids": ids,
            **{name: [one[name] for one in inputs] for name in self._inputs[0] if name not in KEPT_COLUMNS},
            "trainer_state": trainer.state,
        }
        answers: Future[dict[int, _Answer]] = Future()
        self._answers.append(answers)
        self._jobs.put(lambda: self._score(rows, arguments, answers))

    def in_place_of(self, functions: Sequence[Callable[..., Any]]) -> list[Callable[..., Any]]:
        """The trainer's reward functions, where those that were called already only say again what they said."""
        return [
            self._repeater(index, len(self._inputs)) if index in self._functions else function
            for index, function in enumerate(functions)
        ]

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._is_over:
                job()

    def _score(self, rows: list[int], arguments: dict[str, Any], answers: Future[dict[int, _Answer]]) -> None:
        said: dict[int, _Answer] = {}
        try:
            if self._device is not None:
                torch.accelerator.set_device_index(self._device)
            distinct = DistinctRows.of(arguments["completion_ids"], self._trainer.num_generations)
            for index, function in self._functions.items():
                if self._is_over:
                    return
                answer = said[index] = _Answer(rows, len(distinct.first))
                answer.rewards = score_once(function, distinct)(
                    **arguments,
                    log_extra=lambda column, values, to=answer.columns: to.append((column, values)),
                    log_metric=lambda name, value, to=answer.metrics: to[name].append(value),
                )
        except BaseException as error:
            self._is_over = True
            answers.set_exception(error)
        else:
            answers.set_result(said)

    def _repeater(self, index: int, num_rows: int) -> Callable[..., list[float | None]]:
        def repeat(*, log_extra: Any, log_metric: Any, **arguments: Any) -> list[float | None]:
            answers = [future.result()[index] for future in self._answers]
            for column, values in joined_columns(answers, num_rows):
                log_extra(column, values)
            for name in dict.fromkeys(name for answer in answers for name in answer.metrics):
                for value in joined_metric([answer.metrics[name] for answer in answers], answers):
                    log_metric(name, value)
            return _by_row([(answer.rows, answer.rewards) for answer in answers], num_rows)

        return repeat


def completions_of(
    trainer: Any, prompts: Sequence[Any], prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]
) -> list[Any]:
    """Completions as reward functions get them: texts, or messages of the model, as TRL's `_generate` makes them."""
    tokenizer = trainer._tokenizer
    if is_conversational({"prompt": prompts[0]}) and any(
        getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")
    ):
        return [
            [parse_response(tokenizer, ids, prefix=prefix, tools=trainer.tools)]
            for prefix, ids in zip(prompt_ids, completion_ids, strict=True)
        ]
    texts: list[str] = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational({"prompt": prompts[0]}):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return texts


def joined_columns(answers: Sequence[_Answer], num_rows: int) -> list[tuple[str, list[Any]]]:
    """The columns that a function logged, each over all rows; `None` where it logged nothing."""
    parts: dict[tuple[str, int], list[tuple[Sequence[int], list[Any]]]] = defaultdict(list)
    for answer in answers:
        times: dict[str, int] = defaultdict(int)
        for column, values in answer.columns:
            parts[column, times[column]].append((answer.rows, values))
            times[column] += 1
    return [(column, _by_row(values, num_rows)) for (column, _), values in parts.items()]


def joined_metric(values: Sequence[list[Any]], answers: Sequence[_Answer]) -> list[Any]:
    """What one call on the whole batch would have logged of a metric.

    One value a call is taken to be a mean over its completions, so they are averaged, weighted by these. Otherwise it
    is as many values as there are.
    """
    if len(answers) > 1 and all(len(each) == 1 for each in values):
        weights = [answer.num_distinct for answer in answers]
        return [sum(weight * value for weight, (value,) in zip(weights, values, strict=True)) / sum(weights)]
    return [value for each in values for value in each]


def _by_row(parts: Sequence[tuple[Sequence[int], list[Any]]], num_rows: int) -> list[Any]:
    """Values of some rows each, put in the order of the rows."""
    values: list[Any] = [None] * num_rows
    for rows, part in parts:
        for row, value in zip(rows, part, strict=True):
            values[row] = value
    return values
