"""Reward functions called once per distinct trajectory, while TRL sees a reward for every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_callable_name, is_async_callable


LARGEST_REWARD = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class DistinctRows:
    """Which of B rows hold distinct trajectories.

    Args:
        first: Index of the first row of each distinct trajectory.
        inverse: [B] for each row, the position in `first` of its trajectory.
    """

    first: tuple[int, ...]
    inverse: tuple[int, ...]

    @classmethod
    def of(cls, completion_ids: Sequence[Sequence[int]], num_generations: int) -> DistinctRows:
        """Rows with equal tokens are one trajectory if they belong to the same prompt, by position: the dataset may
        hold the same prompt twice, with other columns.

        Args:
            completion_ids: [B] token ids of each row.
            num_generations: Rows of each prompt.
        """
        position: dict[tuple[int, tuple[int, ...]], int] = {}
        first: list[int] = []
        inverse: list[int] = []
        for row, ids in enumerate(completion_ids):
            key = (row // num_generations, tuple(ids))
            if key not in position:
                position[key] = len(first)
                first.append(row)
            inverse.append(position[key])
        return cls(tuple(first), tuple(inverse))

    def select(self, values: Sequence[Any]) -> list[Any]:
        """[B] one value a row -> one a trajectory."""
        return [values[row] for row in self.first]

    def expand(self, values: Sequence[Any]) -> list[Any]:
        """One value a trajectory -> [B] one a row."""
        return [values[position] for position in self.inverse]


@dataclass(frozen=True)
class RowRewards:
    """What a process's B rows are worth, which hold U distinct trajectories.

    Args:
        total: [B] weighted sum over the reward functions, `None` if each of them returned `None`.
        distinct: [U] the same of each distinct trajectory.
        by_func: Name of a reward function -> [U] its rewards of the distinct trajectories, NaN where it returned
            `None`.
    """

    total: list[float | None]
    distinct: list[float | None]
    by_func: dict[str, list[float]]

    @classmethod
    def of(
        cls, rewards_per_func: Tensor, weights: Tensor, names: Sequence[str], distinct_rows: DistinctRows
    ) -> RowRewards:
        """Weigh the rewards as TRL does.

        Args:
            rewards_per_func: (B, F) rewards by reward function, NaN where it returned `None`.
            weights: (F,) weights of the reward functions.
            names: [F] their names.
            distinct_rows: Which of the rows hold distinct trajectories.
        """
        sums = (rewards_per_func * weights.to(rewards_per_func.device)).nansum(dim=1).tolist()
        is_unscorable = rewards_per_func.isnan().all(dim=1).tolist()
        total = [None if skip else value for value, skip in zip(sums, is_unscorable, strict=True)]
        columns = zip(names, rewards_per_func.T.tolist(), strict=True)
        by_func = {name: distinct_rows.select(column) for name, column in columns}
        return cls(total, distinct_rows.select(total), by_func)


def score_once(reward_func: Callable[..., Any], rows: DistinctRows) -> Callable[..., Any]:
    """A reward function over all rows that calls `reward_func` with each distinct trajectory once.

    Functions, async functions and reward models stay what they are to TRL. What `reward_func` logs with `log_extra`
    is expanded to all rows as well.

    Raises (when called):
        ValueError: The rewards, or the values of a logged column, are not as many as the trajectories.
        TypeError: The rewards are no list, or one of them is not a number.
    """
    if isinstance(reward_func, nn.Module):
        return _ScoreOnceModel(reward_func, rows)
    name = get_callable_name(reward_func)
    if is_async_callable(reward_func):

        async def score_async(**kwargs: Any) -> list[float | None]:
            return rows.expand(_checked(name, await reward_func(**_select_kwargs(rows, name, kwargs)), rows))

        return score_async

    def score(**kwargs: Any) -> list[float | None]:
        return rows.expand(_checked(name, reward_func(**_select_kwargs(rows, name, kwargs)), rows))

    return score


def _select_kwargs(rows: DistinctRows, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    selected = {key: rows.select(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    log_extra = kwargs["log_extra"]

    def log_extra_of_rows(column: str, values: Sequence[Any]) -> None:
        if len(values) != len(rows.first):
            raise ValueError(
                f"The reward function '{name}' logged {len(values)} values in the column '{column}', but it was given "
                f"{len(rows.first)} completions; log one value per completion"
            )
        log_extra(column, rows.expand(values))

    return {**selected, "log_extra": log_extra_of_rows}


def _checked(name: str, rewards: Any, rows: DistinctRows) -> list[float | None]:
    rewards = rewards.tolist() if isinstance(rewards, Tensor) else rewards
    if not isinstance(rewards, Iterable) or isinstance(rewards, str | Mapping | Set):
        raise TypeError(
            f"The reward function '{name}' returned a {type(rewards).__name__}; return a list with one number, or "
            "None to skip the completion, for each completion"
        )
    rewards = list(rewards)
    if len(rewards) != len(rows.first):
        raise ValueError(
            f"The reward function '{name}' returned {len(rewards)} rewards, but {len(rows.first)} were expected (one "
            "per distinct completion). Make sure the reward function returns exactly one reward per completion."
        )
    for index, reward in enumerate(rewards):
        _check_reward(name, reward, index)
    return rewards


def _check_reward(name: str, reward: Any, index: int) -> None:
    """Refuse what is no number, and what is none in the single precision that rewards are kept in."""
    try:
        is_too_large = reward is not None and math.fabs(reward) > LARGEST_REWARD  # NaN, as in TRL, stands for None
    except TypeError as error:
        raise TypeError(
            f"The reward function '{name}' returned {reward!r} for completion {index}; return a number, or None to "
            "skip the completion"
        ) from error
    except OverflowError:
        is_too_large = True
    if is_too_large:
        raise ValueError(
            f"The reward function '{name}' returned {str(reward)[:40]} for completion {index}; return a finite number "
            f"(of single precision, up to {LARGEST_REWARD:.2g}), or None to skip the completion"
        )


class _ScoreOnceModel(nn.Module):
    """A reward model over all rows that runs its inner model on each distinct trajectory once."""

    def __init__(self, reward_model: nn.Module, rows: DistinctRows):
        super().__init__()
        self.reward_model = reward_model
        self.rows = rows

    def forward(self, **inputs: Tensor) -> Any:
        first = torch.tensor(self.rows.first, device=next(iter(inputs.values())).device)
        outputs = self.reward_model(**{key: value[first] for key, value in inputs.items()})
        outputs.logits = outputs.logits[torch.tensor(self.rows.inverse, device=outputs.logits.device)]
        return outputs
