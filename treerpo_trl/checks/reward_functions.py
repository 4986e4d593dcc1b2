"""Reward functions, checked before training: TRL can call them with what it gives, and their packages are there."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from trl.import_utils import is_math_verify_available
from trl.trainer.utils import get_callable_name, is_async_callable


# What TRL calls a reward function with, by keyword, besides the columns of the dataset.
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# The columns that it does not hand on.
KEPT_COLUMNS = ("prompt", "completion", "completion_ids")
# The rewards of TRL that call math-verify, which it imports only where it is installed.
MATH_REWARDS = "trl.rewards.accuracy_rewards"


def check_reward_funcs(reward_funcs: Any) -> None:
    """Refuse what is no reward function, or could not run here.

    Args:
        reward_funcs: As the trainer takes them: functions, models, paths of models; one, or a list.

    Raises:
        TypeError: One is no function, or a class in place of its instance.
        ImportError: One needs math-verify, which is not installed.
    """
    if isinstance(reward_funcs, tuple | set | Mapping):
        raise TypeError(
            f"reward_funcs is of type {type(reward_funcs).__name__}; give one reward function, or a list of them"
        )
    for reward_func in _as_list(reward_funcs):
        if isinstance(reward_func, str | nn.Module):
            continue  # TRL loads it
        if not callable(reward_func):
            raise TypeError(
                f"the reward function {repr(reward_func)[:80]} is of type {type(reward_func).__name__}, which cannot "
                "be called; give a function, a reward model or the path of one"
            )
        if isinstance(reward_func, type) and "__call__" in vars(reward_func):
            name = reward_func.__name__
            raise TypeError(f"the reward function {name} is a class, so a call would make one; give {name}(...)")
        source = getattr(_unwrap(reward_func)[0], "__module__", None)  # an object has its class's
        if source == MATH_REWARDS and not is_math_verify_available():
            raise ImportError(
                f"the reward function '{get_callable_name(reward_func)}' of TRL needs the package math-verify, which "
                'is not installed; pip install "treerpo-trl[math]"'
            )


def check_overlap(args: Any, has_tools: bool, reward_funcs: Any) -> None:
    """Refuse to call reward functions while trees call tools, and warn where no call would overlap with sampling.

    Raises:
        ValueError: Both are asked for.
    """
    if not args.overlap_rewards:
        return
    if has_tools:
        raise ValueError(
            "overlap_rewards=True does not work with tools or environment_factory: reward functions would run while "
            "the branches of other trees call their tools. Remove the option"
        )
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if all(isinstance(each, str | nn.Module) or is_async_callable(each) for each in _as_list(reward_funcs)):
        _warn_of_no_overlap("TRL calls async functions and reward models after sampling")
    elif args.use_vllm:
        _warn_of_no_overlap("with vLLM, all trees end together")
    elif rows <= args.max_frontier_rows:
        _warn_of_no_overlap(f"all {rows} rows of a process fit into max_frontier_rows={args.max_frontier_rows}")


def _warn_of_no_overlap(reason: str) -> None:
    warnings.warn(f"overlap_rewards=True hardly saves time here: {reason}. Leave it out", stacklevel=5)


def check_reward_columns(
    reward_funcs: Any, dataset: str, columns: Sequence[str], has_environments: bool = False
) -> None:
    """Refuse reward functions that TRL's call would not fit: with keywords only, every column among them.

    Args:
        reward_funcs: As the trainer takes them.
        dataset: What to call the dataset in an error.
        columns: Its columns, as far as TRL keeps them.
        has_environments: Whether each row has an environment, which reward functions are given.

    Raises:
        ValueError: A function lacks a parameter, or has one too many, or a column has the name of an argument.
    """
    called = [func for func in _as_list(reward_funcs) if callable(func) and not isinstance(func, nn.Module)]
    own = (*REWARD_ARGUMENTS, "environments") if has_environments else REWARD_ARGUMENTS
    clashing = [name for name in columns if name in own and name not in KEPT_COLUMNS]
    if called and clashing:
        raise ValueError(
            f"{dataset} has the column '{clashing[0]}', which is the name of an argument that TRL calls reward "
            "functions with; rename the column"
        )
    given = [*own, *(name for name in columns if name not in KEPT_COLUMNS)]
    for reward_func in called:
        _check_call(reward_func, given, dataset, columns)


def _check_call(reward_func: Callable[..., Any], given: Sequence[str], dataset: str, columns: Sequence[str]) -> None:
    name = get_callable_name(reward_func)
    function, args, keywords = _unwrap(reward_func)
    try:
        # A decorator that picks arguments is what TRL calls, not the function in it.
        signature = inspect.signature(function, follow_wrapped=False)
    except (ValueError, TypeError):  # it is written in C
        return
    parameters = list(signature.parameters.values())[len(args) :]
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in required if p.name not in given and p.name not in keywords]
    if missing:
        raise ValueError(
            f"the reward function '{name}' needs '{missing[0]}', but {dataset} has the columns {list(columns)}; "
            "rename the column that holds it, or give the argument a default"
        )
    unknown = [key for key in given if key not in by_keyword]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if unknown and not takes_any:
        raise ValueError(
            f"the reward function '{name}' does not take {', '.join(unknown)}, which TRL calls it with ({dataset} has "
            f"the columns {list(columns)}); add **kwargs to its parameters, as in def {name}(completions, **kwargs)"
        )
    try:
        signature.bind(*args, **{**keywords, **dict.fromkeys(given)})
    except TypeError as error:
        raise ValueError(
            f"the reward function '{name}' cannot be called as TRL does, with keywords ({error}); its parameters are "
            f"{signature}: make them keywords, as in def {name}(completions, **kwargs)"
        ) from error


def _unwrap(reward_func: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The function inside a `functools.partial`, with the arguments that it is given already."""
    args: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    while isinstance(reward_func, functools.partial):
        args, keywords = (*reward_func.args, *args), {**reward_func.keywords, **keywords}
        reward_func = reward_func.func
    return reward_func, args, keywords


def _as_list(reward_funcs: Any) -> list[Any]:
    """As TRL reads the argument; without reward functions it raises an error of its own."""
    if reward_funcs is None:
        return []
    return reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
