"""The dialogue of every branch of a tree: what the model wrote, what tools answered, and with which environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..tree import ROOT, Segment, Tree
from .environments import Rollout
from .waves import Wave, drawn_nodes


Message = dict[str, Any]


@dataclass
class Dialogue:
    """What was said on the way to a node.

    Args:
        tree: Index of the tree.
        messages: Of the model and of its tools, after those of the prompt.
        turn_ids: Tokens of the turn that is not over.
        rollout: The environment as it is there; `None` without one.
        num_answers: How often tools answered on the way.
        num_calls, num_failures: Calls of tools on the way, and those that failed.
    """

    tree: int
    messages: list[Message] = field(default_factory=list)
    turn_ids: list[int] = field(default_factory=list)
    rollout: Rollout | None = None
    num_answers: int = 0
    num_calls: int = 0
    num_failures: int = 0

    def fork(self, rollout: Rollout | None) -> Dialogue:
        """The same dialogue with another environment, to go on in another way."""
        return replace(self, messages=list(self.messages), turn_ids=list(self.turn_ids), rollout=rollout)


@dataclass(frozen=True)
class Answer:
    """What tools said to a turn.

    Args:
        messages: Those of the tools; none if they had no room on the path.
        token_ids: The same as the path goes on with them.
        num_calls, num_failures: Calls that were made, and those that failed.
    """

    messages: list[Message]
    token_ids: list[int]
    num_calls: int
    num_failures: int


class ToolRunner(Protocol):
    """What reads turns and runs tools."""

    def parse(self, tree: int, turn_ids: list[int], prefix: list[int]) -> Message:
        """The model's message, with its calls of tools.

        Args:
            tree: Index of the tree, by whose tools it is read.
            turn_ids: Tokens of the turn.
            prefix: Those before it, prompt included.
        """
        ...

    def run(self, dialogue: Dialogue, message: Message, prompt_ids: list[int], path_ids: list[int]) -> Answer:
        """Run the calls of a message, which the path ends with."""
        ...


class Dialogues:
    """The [`~treerpo_trl.growth.Responder`] of trees that use tools.

    Args:
        runner: Reads turns and runs tools.
        rollouts: The environment of each tree as it was reset; `None` each without environments.
        max_answers: Most times that tools answer on a path.
        max_length: Most tokens of a path.
        by_replay: Whether environments are copied by a replay of their calls.
    """

    def __init__(
        self,
        runner: ToolRunner,
        rollouts: Sequence[Rollout | None],
        max_answers: int,
        max_length: int,
        by_replay: bool = False,
    ):
        self.runner = runner
        self.max_answers = max_answers
        self.max_length = max_length
        self.by_replay = by_replay
        self.copies: list[Any] = []  # of environments
        self.num_calls = 0  # that were made, whoever shares them
        self._at = {(tree, ROOT): Dialogue(tree, rollout=rollout) for tree, rollout in enumerate(rollouts)}

    def answer(self, trees: Sequence[Tree], wave: Wave, segments: Sequence[Sequence[Segment]]) -> list[list[Segment]]:
        """See [`~treerpo_trl.growth.Responder`]."""
        answered = []
        for branch, nodes, group in zip(wave.branches, drawn_nodes(trees, wave), segments, strict=True):
            dialogues = self._split(branch, len(group))
            self._at.update(zip(nodes, dialogues, strict=True))
            tree = trees[branch[0]]
            path = tree.completion_ids(branch[1])
            answered.append([self._answer(tree, path, *pair) for pair in zip(dialogues, group, strict=True)])
        return answered

    def _split(self, branch: tuple[int, int], count: int) -> list[Dialogue]:
        """A dialogue for each child, with an environment of its own; the first goes on with the parent's."""
        parent = self._at.pop(branch)
        return [parent.fork(self._fork(parent.rollout) if index else parent.rollout) for index in range(count)]

    def _fork(self, rollout: Rollout | None) -> Rollout | None:
        if rollout is None:
            return None
        copied = rollout.fork(self.by_replay)
        self.copies.append(copied.environment)
        return copied

    def _answer(self, tree: Tree, path: list[int], dialogue: Dialogue, segment: Segment) -> Segment:
        """The segment, which continues the path, with what tools answered to the turn that ends with it."""
        dialogue.turn_ids += segment.token_ids
        is_full = len(path) + len(segment.token_ids) >= self.max_length  # TRL makes the calls of such a turn, too
        if not (segment.ended or is_full):
            return segment
        message = self._read(tree, [*path, *segment.token_ids], dialogue)
        dialogue.messages.append(message)
        dialogue.turn_ids = []
        if not message.get("tool_calls") or dialogue.num_answers >= self.max_answers:
            return segment
        answer = self.runner.run(dialogue, message, list(tree.prompt_ids), [*path, *segment.token_ids])
        self.num_calls += answer.num_calls
        dialogue.num_calls += answer.num_calls
        dialogue.num_failures += answer.num_failures
        if not answer.token_ids:
            return segment
        dialogue.messages += answer.messages
        dialogue.num_answers += 1
        return segment.answered(answer.token_ids)

    def _read(self, tree: Tree, path: list[int], dialogue: Dialogue) -> Message:
        """The message of the turn that a path ends with."""
        prefix = [*tree.prompt_ids, *path[: len(path) - len(dialogue.turn_ids)]]
        return self.runner.parse(dialogue.tree, dialogue.turn_ids, prefix)

    def spread(self, tree: int, leaves: Sequence[int]) -> None:
        """Give the leaves of a tree that called no tools an environment each."""
        root = self._at.pop((tree, ROOT))
        for index, leaf in enumerate(leaves):
            self._at[tree, leaf] = root.fork(self._fork(root.rollout) if index else root.rollout)

    def at(self, tree: int, leaf: int) -> Dialogue:
        """What was said on the way to a leaf."""
        return self._at[tree, leaf]

    def completion(self, trees: Sequence[Tree], tree: int, leaf: int) -> list[Message]:
        """The messages of a row. Of a turn that was cut short there is what can be read."""
        dialogue = self._at[tree, leaf]
        if not dialogue.turn_ids:
            return dialogue.messages
        return [*dialogue.messages, self._read(trees[tree], trees[tree].completion_ids(leaf), dialogue)]
