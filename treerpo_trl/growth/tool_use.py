"""TRL's tools and environments on trees: its own loop runs the calls, and each branch has its own environment."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from trl import GRPOTrainer
from trl.chat_template_utils import parse_response

from ..tree import Tree
from .environments import Rollout, check_copies, close, tool_names
from .tools import Answer, Dialogue, Dialogues, Message
from .waves import Shape


class Seat:
    """Stands for the environment of a row that has none of its own before its tree has grown."""

    def reset(self, **kwargs: Any) -> None:
        """Nothing is to be reset."""


class ToolUse:
    """Runs the tools of a trainer's trees, and has their environments.

    Of the newest batch, `calls_made` are the calls that were made, and `calls_on_rows` those on the paths of its rows:
    what flat samples would have called.

    Args:
        trainer: A trainer with tools.
        by_replay: Whether environments are copied by a replay of their calls.

    Raises:
        TypeError: An environment cannot be copied.
    """

    def __init__(self, trainer: Any, by_replay: bool):
        self._trainer = trainer
        self._by_replay = by_replay
        self._inputs: Sequence[dict[str, Any]] = []
        self._num_lent: dict[Any, int] = {}
        self.dialogues: Dialogues | None = None
        self.is_asking = False  # TRL's loop is running a turn's calls
        self.calls_made = self.calls_on_rows = 0
        if trainer.environment_factories is None:
            return
        hidden = []
        for name, (instance,) in trainer._environment_pool.items():
            check_copies(instance, by_replay)
            names = tool_names(type(instance))
            own = [tool for tool in trainer._env_tools[name] if getattr(tool, "__self__", None) is instance]
            hidden += [tool for tool in own if tool.__func__ not in [getattr(type(instance), name) for name in names]]
            trainer._env_tools[name] = [tool for tool in trainer._env_tools[name] if tool not in hidden]
        trainer.tools = [tool for tool in trainer.tools if tool not in hidden]

    @property
    def has_tools(self) -> bool:
        """Whether there is anything to call: an environment may have no tools."""
        return bool(self._trainer.tools)

    @property
    def has_environments(self) -> bool:
        """Whether each row has an environment."""
        return self._trainer.environment_factories is not None

    @contextmanager
    def batch(self, inputs: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Have TRL reset one environment a tree while it makes a batch of these rows; copies are closed at the end."""
        trainer = self._trainer
        if not self.has_environments:
            yield
            return
        self._inputs = copy.deepcopy(list(inputs)) if self._by_replay else list(inputs)
        pool, trainer._environment_pool, trainer.environments = trainer._environment_pool, {}, None
        self._pool, self._num_lent = pool, dict.fromkeys(pool, 0)
        try:
            for row, one in enumerate(inputs):
                name = self._name(one)
                if name not in pool:  # TRL says so
                    trainer._environment_pool = pool
                    break
                instance = Seat() if row % trainer.num_generations else self._lend(name)
                trainer._environment_pool.setdefault(name, []).append(instance)
            yield
        finally:
            trainer._environment_pool, trainer.environments = pool, None
            pooled = {id(instance) for instances in pool.values() for instance in instances}
            for environment in self.dialogues.copies if self.dialogues is not None else ():
                if id(environment) not in pooled:  # as the fresh ones that calls were replayed on
                    close(environment)
            self.dialogues, self._inputs = None, []

    def _name(self, one: Mapping[str, Any]) -> Any:
        return one.get("environment") if self._trainer._multi_environment else None

    def _lend(self, name: Any) -> Any:
        """An instance that no other tree has in this batch."""
        index, pool = self._num_lent[name], self._pool[name]
        self._num_lent[name] += 1
        if index == len(pool):
            pool.append(self._trainer.environment_factories[name]())
        return pool[index]

    def _restart(self, row: int) -> Any:
        """Another instance, reset as that of a row was."""
        one = copy.deepcopy(self._inputs[row])
        environment = self._lend(self._name(one))
        if self._trainer._multi_environment:
            del one["environment"]
        environment.reset(**one)
        return environment

    def of_trees(self, prompts: Sequence[Any]) -> list[Any]:
        """Of each row, the prompt of its tree: what the environment said when it was reset is in the first row's."""
        if not self.has_environments:
            return list(prompts)
        size = self._trainer.num_generations
        return [copy.deepcopy(prompts[row - row % size]) for row in range(len(prompts))]

    def start(self, num_trees: int) -> Dialogues:
        """The dialogues of a batch of trees that are to be grown."""
        trainer, size = self._trainer, self._trainer.num_generations
        rollouts: list[Rollout | None] = [None] * num_trees
        if self.has_environments:
            rollouts = [
                Rollout(trainer.environments[row], partial(self._restart, row))
                for row in range(0, num_trees * size, size)
            ]
        limits = trainer.max_tool_calling_iterations, trainer.max_completion_length
        self.dialogues = Dialogues(self, rollouts, *limits, by_replay=self._by_replay)
        return self.dialogues

    def parse(self, tree: int, turn_ids: list[int], prefix: list[int]) -> Message:
        """See [`~treerpo_trl.growth.tools.ToolRunner`]."""
        trainer = self._trainer
        row = tree * trainer.num_generations
        tools = trainer._env_tools[trainer._batch_environments[row]] if self.has_environments else trainer.tools
        message: Message = parse_response(trainer._tokenizer, turn_ids, prefix=prefix, tools=tools)
        return message

    def run(self, dialogue: Dialogue, message: Message, prompt_ids: list[int], path_ids: list[int]) -> Answer:
        """See [`~treerpo_trl.growth.tools.ToolRunner`]: TRL's loop, for one row and one turn."""
        trainer = self._trainer
        methods = dialogue.rollout.tools() if dialogue.rollout else []
        by_name = {tool.__name__: tool for tool in [*trainer._standalone_tools, *methods]}
        is_async = {name: inspect.iscoroutinefunction(tool) for name, tool in by_name.items()}
        row = {
            "_sync_tool_dicts": [{name: tool for name, tool in by_name.items() if not is_async[name]}],
            "_async_tool_dicts": [{name: tool for name, tool in by_name.items() if is_async[name]}],
            "max_tool_calling_iterations": 1,
        }
        if self.has_environments:
            row["_batch_environments"] = [trainer._batch_environments[dialogue.tree * trainer.num_generations]]
        with _set(trainer, row), self._asking():
            _, completions, completion_ids, _, num_calls, num_failures, images = GRPOTrainer._tool_call_loop(
                trainer, [[]], [prompt_ids], [list(path_ids)], [[message]], None, None, {}
            )
        if any(images):
            raise ValueError(
                f"a tool answered with an image to {message.get('tool_calls')}, but TreeRPOTrainer does not support "
                "images yet; let it answer with text"
            )
        return Answer(completions[0][1:], completion_ids[0][len(path_ids) :], num_calls, num_failures)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self.is_asking = True
        try:
            yield
        finally:
            self.is_asking = False

    def first_turns(self, trees: Sequence[Tree], shape: Shape) -> list[list[int]]:
        """[B] tokens of the first turn of each row, which TRL reads before it asks for the others."""
        turns = []
        for tree in trees:
            for leaf in shape.slots(tree):
                ids, sampled = tree.completion_ids(leaf), tree.sampled_mask(leaf)
                turns.append(ids[: sampled.index(False)] if False in sampled else ids)
        return turns

    def seat_leaves(self, trees: Sequence[Tree], shape: Shape) -> None:
        """Without tools, each leaf gets an environment as it was reset, and each row its leaf's."""
        dialogues = self.start(len(trees))
        for index, tree in enumerate(trees):
            dialogues.spread(index, tree.leaves)
        self._seat([dialogues.at(index, leaf) for index, tree in enumerate(trees) for leaf in shape.slots(tree)])

    def _seat(self, ends: Sequence[Dialogue]) -> None:
        """Each row's environment is that of the dialogue it ends with."""
        if self.has_environments:
            self._trainer.environments = [end.rollout.environment for end in ends if end.rollout]

    def rows(self, trees: Sequence[Tree], shape: Shape, has_logprobs: bool) -> tuple[Any, ...]:
        """What TRL's loop returns, from the trees: (mask of sampled tokens, messages, token ids, log-probabilities,
        calls, failed calls, images) of the rows. Each row gets its leaf's environment.
        """
        dialogues = self.dialogues
        assert dialogues is not None
        paths = [(index, tree, leaf) for index, tree in enumerate(trees) for leaf in shape.slots(tree)]
        ends = [dialogues.at(index, leaf) for index, _, leaf in paths]
        num_calls = sum(end.num_calls for end in ends)
        self.calls_made, self.calls_on_rows = dialogues.num_calls, num_calls
        self._seat(ends)
        return (
            [[int(drawn) for drawn in tree.sampled_mask(leaf)] for _, tree, leaf in paths],
            [copy.deepcopy(dialogues.completion(trees, index, leaf)) for index, _, leaf in paths],
            [tree.completion_ids(leaf) for _, tree, leaf in paths],
            [tree.completion_logprobs(leaf) for _, tree, leaf in paths] if has_logprobs else None,
            num_calls,
            sum(end.num_failures for end in ends),
            [[] for _ in paths],
        )


@contextmanager
def _set(target: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Attributes set for a while."""
    before = {name: getattr(target, name) for name in values}
    vars(target).update(values)
    try:
        yield
    finally:
        vars(target).update(before)
