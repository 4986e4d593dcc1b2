"""Copies of an environment as it stands, for the branches of a tree."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any


NO_TOOLS = ("reset", "get_reward")  # as in TRL
OURS = ("fork", "close")  # without arguments, these are for trees, and no tools


@dataclass
class Rollout:
    """An environment and what was done to it since it was reset.

    Args:
        environment: The instance.
        restart: Makes another instance, reset as this one was.
        calls: (name of a tool, arguments) of what it was asked, in order.
    """

    environment: Any
    restart: Callable[[], Any]
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def fork(self, by_replay: bool) -> Rollout:
        """Another environment in the same state: by its own `fork()`, else by a replay if asked for, else a deep copy.

        Raises:
            TypeError: It cannot be copied, or what came of it is no other environment of its kind.
        """
        own = self.environment
        if has_method(own, "fork"):
            way, environment = "fork()", own.fork()
        elif by_replay:
            way, environment = "replay", self.restart()
            for name, arguments in self.calls:
                _replay(environment, name, arguments)
        else:
            way, environment = "deep copy", _deep_copy(own)
        if environment is own or type(environment) is not type(own):
            what = "itself" if environment is own else f"a {type(environment).__name__}"
            raise TypeError(
                f"the {way} of a {type(own).__name__} gave {what}; it must give another {type(own).__name__} in the "
                "same state"
            )
        return Rollout(environment, self.restart, list(self.calls))

    def tools(self) -> list[Callable[..., Any]]:
        """Its methods that a model may call, as TRL finds them; they note their calls."""
        return [self._noting(name, getattr(self.environment, name)) for name in tool_names(type(self.environment))]

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(method):

            @wraps(method)
            async def run_async(*args: Any, **arguments: Any) -> Any:
                self.calls.append((name, copy.deepcopy(arguments)))
                return await method(*args, **arguments)

            return run_async

        @wraps(method)
        def run(*args: Any, **arguments: Any) -> Any:
            self.calls.append((name, copy.deepcopy(arguments)))
            return method(*args, **arguments)

        return run


def tool_names(kind: type) -> list[str]:
    """The methods of a kind of environment that a model may call: those that TRL finds, without `fork` and `close`."""
    return [
        name
        for name, _ in inspect.getmembers(kind, predicate=inspect.isfunction)
        if name not in NO_TOOLS and not name.startswith("_") and not (name in OURS and has_method(kind, name))
    ]


def has_method(environment: Any, name: str) -> bool:
    """Whether an environment, or a kind of one, has a method of that name that is called without arguments. With
    arguments, it is a tool.
    """
    kind = environment if isinstance(environment, type) else type(environment)
    method = getattr(kind, name, None)
    if not callable(method) or inspect.iscoroutinefunction(method):
        return False
    parameters = list(inspect.signature(method).parameters.values())[1:]  # without self
    return all(one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters)


def _replay(environment: Any, name: str, arguments: dict[str, Any]) -> None:
    """Call a tool again; one that failed fails again, which its caller was told then."""
    with suppress(Exception):  # whatever a tool raises is told to the model, and no more
        getattr(environment, name)(**copy.deepcopy(arguments))


def _deep_copy(environment: Any) -> Any:
    try:
        return copy.deepcopy(environment)
    except Exception as error:
        raise TypeError(
            f"a tree copies its environment at every branch, but copy.deepcopy of {type(environment).__name__} fails "
            f"({type(error).__name__}: {error}). Define fork(), which returns an environment in the same state; or "
            "make it deep-copyable (__deepcopy__); or, if it always answers the same to the same, set "
            "replay_environments=True, which makes a copy by a fresh reset() and the same calls"
        ) from error


def check_copies(environment: Any, by_replay: bool) -> None:
    """Refuse an environment that no branch could have a copy of. A `__deepcopy__` of its own is trusted: it may need
    the environment to be reset.

    Raises:
        TypeError: It has no `fork`, and a deep copy fails or, if it is to be replayed, a tool is async.
    """
    kind = type(environment)
    if has_method(environment, "fork"):
        return
    if inspect.iscoroutinefunction(getattr(kind, "fork", None)):
        raise TypeError(f"{kind.__name__}.fork is async, which a tree cannot wait for; make it a plain method")
    if not by_replay:
        if not hasattr(kind, "__deepcopy__"):
            _deep_copy(environment)
        return
    for name in tool_names(kind):
        if inspect.iscoroutinefunction(getattr(kind, name)):
            raise TypeError(
                f"replay_environments=True cannot repeat {kind.__name__}.{name}, which is async; define fork(), which "
                "returns an environment in the same state"
            )


def close(environment: Any) -> None:
    """Close a copy that is no longer needed, if it has a `close` without arguments; one that fails is warned of."""
    if not has_method(environment, "close"):
        return
    try:
        environment.close()
    except Exception as error:
        warnings.warn(f"closing a copy of {type(environment).__name__} failed: {error!r}", stacklevel=2)
