"""Where the time of a step goes: phases that add up to it, and the decorator that makes a method one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch


# Phase -> the phase that it interrupts. Training is a step itself, so that no phase runs outside of one: what
# evaluation calls is not counted.
PHASES = {"sampling": "batch", "rewards": "batch", "log_probs": "batch", "batch": "training", "training": None}

Method = TypeVar("Method", bound=Callable[..., Any])


class PhaseTimer:
    """Splits the seconds of a step into phases. One runs at a time: a phase inside another interrupts it.

    Args:
        device: Where kernels run. At the bounds of a phase it is waited for: they run after the call that starts them.
        clock: The time now, in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device = device
        self._clock = clock
        self._since = 0.0
        self._running: list[str] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def run(self, phase: str) -> Iterator[None]:
        """Count what happens inside as `phase`, if the phase that it interrupts is running."""
        if PHASES[phase] != (self._running[-1] if self._running else None):
            yield
            return
        self._close()
        self._running.append(phase)
        try:
            yield
        finally:
            self._close()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """Phase -> seconds since the last call."""
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def _close(self) -> None:
        """Give the time since the last bound to the phase that is running."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


def timed(phase: str) -> Callable[[Method], Method]:
    """Make a method of an object that has a `_phase_timer` a phase."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self._phase_timer.run(phase):
                return method(self, *args, **kwargs)

        return cast(Method, run)

    return decorate
