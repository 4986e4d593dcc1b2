"""Reward functions called once per distinct trajectory, while TRL sees a reward for every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_callable_name, is_async_callable

from ..credit import find_reward_fault


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
    def of(
        cls, completion_ids: Sequence[Sequence[int]], num_generations: int, environments: Sequence[Any] | None = None
    ) -> DistinctRows:
        """Rows with equal tokens are one trajectory if they belong to the same prompt, by position: the dataset may
        hold the same prompt twice, with other columns.

        Args:
            completion_ids: [B] token ids of each row.
            num_generations: Rows of each prompt.
            environments: [B] the environment of each row, if they have some: rows of one trajectory have the same.
        """
        position: dict[tuple[int, tuple[int, ...], int], int] = {}
        first: list[int] = []
        inverse: list[int] = []
        for row, ids in enumerate(completion_ids):
            key = (row // num_generations, tuple(ids), id(environments[row]) if environments else 0)
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


def check_rewards(rewards_per_func: Tensor, weights: Tensor, names: Sequence[str], estimator: str) -> None:
    """Refuse rewards that an estimator cannot work with, by the reward functions that gave them.

    Args:
        rewards_per_func: (B, F) rewards by reward function, NaN where it returned `None`.
        weights: (F,) weights of the reward functions.
        names: [F] their names.
        estimator: A name in `credit.ESTIMATORS`.

    Raises:
        ValueError: A weighted sum is not finite, or not in [0, 1] with an estimator made for that interval. The
            message has each function's reward and weight.
    """
    weights = weights.to(rewards_per_func.device)
    for row, total in enumerate((rewards_per_func * weights).nansum(dim=1).tolist()):
        if (fault := find_reward_fault(total, estimator)) is None:
            continue
        rewards = rewards_per_func[row].tolist()
        parts = [
            f"'{name}' returned {'None' if math.isnan(reward) else f'{reward:g}'} (with weight {weight:g})"
            for name, reward, weight in zip(names, rewards, weights.tolist(), strict=True)
        ]
        text = f"{', '.join(parts)} for completion {row}, whose reward is {total:g}{fault}"
        raise ValueError(f"{text}{_fitting_weights(rewards, weights.tolist())}")


def _fitting_weights(rewards: Sequence[float], weights: Sequence[float]) -> str:
    """Weights in the same proportions that keep the sum in [0, 1], where each reward is already."""
    if min(weights) < 0 or sum(weights) <= 1 or not all(math.isnan(r) or 0 <= r <= 1 for r in rewards):
        return ""
    fitting = [math.floor(1000 * weight / sum(weights)) / 1000 for weight in weights]
    return f" Here reward_weights={fitting} would do."


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
    if isinstance(rewards, Tensor) and rewards.dim() > 0:
        rewards = list(rewards)  # of a (B, 1) tensor, as in TRL, tensors of one number
    if isinstance(rewards, Tensor) or not isinstance(rewards, Iterable) or isinstance(rewards, str | Mapping | Set):
        raise TypeError(
            f"The reward function '{name}' returned an object of type {type(rewards).__name__}; return a list with "
            "one number, or None to skip the completion, for each completion"
        )
    rewards = list(rewards)
    if len(rewards) != len(rows.first):
        raise ValueError(
            f"The reward function '{name}' returned {len(rewards)} rewards, but {len(rows.first)} were expected (one "
            "per distinct completion). Make sure the reward function returns exactly one reward per completion."
        )
    return [_checked_reward(name, reward, index) for index, reward in enumerate(rewards)]


def _checked_reward(name: str, reward: Any, index: int) -> Any:
    """A reward as a number. Refused is what is none, and what is none in the single precision that it is kept in."""
    try:
        if hasattr(reward, "__len__") and not isinstance(reward, Tensor):
            raise TypeError  # an array of one number, too: TRL refuses it
        reward = reward.item() if isinstance(reward, Tensor) else reward
        is_too_large = reward is not None and math.fabs(reward) > LARGEST_REWARD  # NaN, as in TRL, stands for None
    except (TypeError, RuntimeError) as error:  # what is no number; a tensor of several
        raise TypeError(
            f"The reward function '{name}' returned {repr(reward)[:80]} for completion {index}; return a "
            "number, or None to skip the completion"
        ) from error
    except OverflowError:
        is_too_large = True
    if is_too_large:
        raise ValueError(
            f"The reward function '{name}' returned {str(reward)[:40]} for completion {index}; return a finite number "
            f"(of single precision, up to {LARGEST_REWARD:.2g}), or None to skip the completion"
        )
    return reward


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
