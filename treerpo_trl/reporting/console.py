"""The log in the terminal: one line of what to watch, in place of every metric. Trackers get everything either way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback


HEADER_EVERY = 20  # lines


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _count(number: float) -> str:
    """12345 -> "12.3k"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


# Title, metric, and how it is written. `change` is that of the reward since the line above.
COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", _plain(4)),
    ("reward", "reward", _plain(3)),
    ("change", "change", lambda value: f"{value:+.3f}"),
    ("kept", "tree/kept_groups", _plain(2)),
    ("|A|", "tree/advantage_abs", _plain(2)),
    ("length", "completions/mean_length", _plain(1)),
    ("tokens", "num_tokens", _count),
    ("s/step", "step_time", _plain(2)),
)
WIDTH = 7


class CompactLog:
    """Turns the metrics of a log into lines of a table.

    `loss`; `reward`, and its `change` since the line above; `kept`, the share of groups that were not pruned; `|A|`,
    the mean size of an advantage, which is 0 where a batch teaches nothing; `length`, tokens of a completion;
    `tokens`, processed since the start; and seconds per step.
    """

    def __init__(self) -> None:
        self._num_lines = 0
        self._last_reward = math.nan

    def lines(self, logs: Mapping[str, Any], step: int) -> list[str]:
        """What to print of a log: a line of training, under a header now and then; of evaluation; or of the end.

        A log of another kind is printed whole.
        """
        if "train_runtime" in logs:
            seconds, loss = logs["train_runtime"], logs.get("train_loss", math.nan)
            return [f"trained to step {step} in {seconds:.0f} s, mean loss {loss:.4g}"]
        if any(key.startswith("eval_") for key in logs):
            return [self._evaluation(logs, step)]
        if "loss" not in logs:
            return [str(dict(logs))]
        header = ["".join(["   step", *(f"{title:>{WIDTH + 1}}" for title, _, _ in COLUMNS)])]
        line = self._training(logs, step)
        self._num_lines += 1
        return [*header, line] if self._num_lines % HEADER_EVERY == 1 else [line]

    def _training(self, logs: Mapping[str, Any], step: int) -> str:
        reward = math.nan if logs.get("reward") is None else float(logs["reward"])
        known = {**logs, "change": reward - self._last_reward}
        self._last_reward = reward
        cells = (self._cell(known.get(metric), write) for _, metric, write in COLUMNS)
        return f"{step:>7}" + "".join(f"{cell:>{WIDTH + 1}}" for cell in cells)

    @staticmethod
    def _cell(value: Any, write: Callable[[float], str]) -> str:
        return "-" if value is None or math.isnan(float(value)) else write(float(value))

    @staticmethod
    def _evaluation(logs: Mapping[str, Any], step: int) -> str:
        """Rewards and losses, of each evaluation dataset."""
        shown = ("_reward", "_loss", "_completions/mean_length")
        parts = [f"{key} {logs[key]:.4g}" for key in logs if key.startswith("eval_") and key.endswith(shown)]
        return f"{step:>7} {', '.join(parts)}"


class CompactProgressCallback(ProgressCallback):
    """The progress bar, with a line a log above it."""

    def __init__(self) -> None:
        super().__init__()
        self._log = CompactLog()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the lines, on the main process."""
        if state.is_world_process_zero and self.training_bar is not None:
            for line in self._log.lines(logs or {}, state.global_step):
                self.training_bar.write(line)


class CompactPrinterCallback(PrinterCallback):
    """A line a log, without a progress bar (`disable_tqdm=True`)."""

    def __init__(self) -> None:
        super().__init__()
        self._log = CompactLog()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the lines, on each machine's main process."""
        if state.is_local_process_zero:
            for line in self._log.lines(logs or {}, state.global_step):
                print(line, flush=True)


COMPACT = {ProgressCallback: CompactProgressCallback, PrinterCallback: CompactPrinterCallback}


def print_compactly(trainer: Any) -> None:
    """Put compact logs in the place of transformers' own. A notebook's table is left as it is: it has few columns."""
    for plain, compact in COMPACT.items():
        if any(type(callback) is plain for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(plain)
            trainer.add_callback(compact())
