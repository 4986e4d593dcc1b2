"""Checkpoints on disk: which of them are complete, and the files that a run needs to go on exactly.

A checkpoint is written in this order: weights, optimizer, random states, and a state file of ours by each process;
then, once all processes have written theirs, the list of these files (`SEAL`), and last `trainer_state.json`. So,
wherever a run was killed, a checkpoint is complete if and only if the last two can be read and every file of the list
is there in full.

Nothing in these files is ever executed: they are JSON, and tensors in plain containers (`weights_only=True`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


SEAL = "treerpo_checkpoint.json"
TRAINER_STATE = "trainer_state.json"
FORMAT = 1  # a newer one is not understood
PLAIN = (str, int, float, bool, type(None))
CHECKPOINT = re.compile(r"(replaced-)?checkpoint-(\d+)")


def save_state(folder: str | Path, name: str, state: Mapping[str, Any]) -> None:
    """Write a state file, all of it or nothing.

    Args:
        folder: The checkpoint.
        name: What the state is of.
        state: Tensors and plain data (see [`make_plain`]).
    """
    path = _state_path(folder, name)
    unfinished = path.with_suffix(".unfinished")
    torch.save(dict(state), unfinished)
    os.replace(unfinished, path)


def has_state(folder: str | Path, name: str) -> bool:
    """Whether the checkpoint has such a state file."""
    return _state_path(folder, name).is_file()


def load_state(folder: str | Path, name: str) -> dict[str, Any]:
    """What [`save_state`] wrote, on the CPU. Nothing but tensors and plain data is loaded."""
    state: dict[str, Any] = torch.load(_state_path(folder, name), map_location="cpu", weights_only=True)
    return state


def drop_unreadable(folder: str | Path, name: str) -> None:
    """Delete a JSON file that was cut short."""
    if not _is_whole_json(Path(folder) / name):
        (Path(folder) / name).unlink(missing_ok=True)


def make_plain(value: Any) -> Any:
    """Tensors as copies on the CPU, containers as lists and dicts, and what else there is as numbers or text."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)  # of a view, the copy holds what is seen only
    if isinstance(value, Mapping):
        return {key if type(key) in PLAIN else str(key): make_plain(item) for key, item in value.items()}
    if type(value) in PLAIN:
        return value
    if hasattr(value, "tolist"):  # numpy's
        return value.tolist()
    if hasattr(value, "__iter__") and not isinstance(value, str):
        return [make_plain(item) for item in value]
    return str(value)


class Secret(str):
    """A text that is left out wherever it is pickled: upstream pickles all arguments beside the weights it pushes."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> Secret:
        return self

    __copy__ = __deepcopy__


def seal(folder: str | Path, settings: Mapping[str, Any], is_mid_generation: bool) -> None:
    """List every file of a checkpoint, once all processes have written theirs.

    Args:
        folder: The checkpoint.
        settings: What the run must not change to go on exactly.
        is_mid_generation: Whether trees that were sampled already are still to be trained on.
    """
    folder = Path(folder)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files = {name: files[name] for name in sorted(files) if name not in (SEAL, TRAINER_STATE)}
    content = {
        "format": FORMAT, "settings": dict(settings), "is_mid_generation": is_mid_generation, "files": files,
    }  # fmt: skip
    unfinished = folder / f"{SEAL}.unfinished"
    unfinished.write_text(json.dumps(content, indent=2))
    os.replace(unfinished, folder / SEAL)


def read_seal(folder: str | Path) -> dict[str, Any]:
    """What [`seal`] wrote into a complete checkpoint."""
    content: dict[str, Any] = json.loads((Path(folder) / SEAL).read_text())
    return content


def read_progress(folder: str | Path) -> dict[str, Any]:
    """What upstream wrote into a complete checkpoint about the run: `global_step`, `epoch`, `log_history`, ..."""
    state: dict[str, Any] = json.loads((Path(folder) / TRAINER_STATE).read_text())
    return state


def find_fault(folder: str | Path) -> str | None:
    """What keeps a run from going on from a folder; `None` if it is a complete checkpoint of ours."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if not _is_whole_json(folder / TRAINER_STATE):
        return f"it was never finished: {TRAINER_STATE}, which is written last, is missing or cut short"
    if not _is_whole_json(folder / SEAL):
        return (
            f"it has no {SEAL}, so it was written by another trainer or with save_only_model=True and lacks what a "
            f"run needs to go on. To start a new run from its weights, pass model='{folder}'"
        )
    content = read_seal(folder)
    if content["format"] > FORMAT:
        return f"it was written by a newer treerpo_trl (format {content['format']}, not {FORMAT}); install that"
    for name, size in content["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, but was written with {size}"
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, newest first."""
    folders = Path(output_dir).iterdir() if Path(output_dir).is_dir() else ()
    found = [(match, path) for path in folders if path.is_dir() and (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda item: (int(item[0][2]), not item[0][1]), reverse=True)]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint in a folder; a warning names newer ones that are not complete.

    Every process must call it. All get the same answer, also where each machine has a disk of its own.

    Args:
        output_dir: The run's output folder; it need not exist.

    Returns:
        Its path, `None` if there is none.
    """
    last, faults = _find_last(output_dir)
    if faults and PartialState().is_main_process:
        skipped = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        taken = "and there is no complete one" if last is None else f"and the run goes on from {last} instead"
        warnings.warn(f"Checkpoints in {output_dir} are skipped, {taken}. {skipped}", stacklevel=2)
    return last


def choose_checkpoint(given: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint to go on from. Every process must call it.

    Args:
        given: `resume_from_checkpoint`: `True` for the newest complete checkpoint in `output_dir`, or a path.
        output_dir: The run's output folder.

    Raises:
        ValueError: There is no complete checkpoint, or the one given is not complete.
    """
    if given is None or given is False:
        return None
    if given is True:
        if (last := last_complete_checkpoint(output_dir)) is None:
            newest = [f". {name}: {fault}" for name, fault in _find_last(output_dir)[1].items()][:1]
            raise ValueError(
                f"No valid checkpoint found in output directory ({output_dir}){''.join(newest)}. Leave "
                "resume_from_checkpoint out to start from the beginning, or pass the path of a checkpoint"
            )
        return last
    check_checkpoint(given)
    return str(given)


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a folder that a run cannot go on from. Every process must call it.

    Raises:
        ValueError: It is not a complete checkpoint; the message says what is missing and names one that is.
    """
    faults = [fault for fault in gather_object([find_fault(folder)]) if fault is not None]
    if faults:
        last, _ = _find_last(Path(folder).parent)
        advice = "there is no complete one beside it" if last is None else f"the newest complete one is {last}"
        raise ValueError(f"resume_from_checkpoint='{folder}' cannot be resumed from: {faults[0]}; {advice}")


def check_settings(folder: str | Path, settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings goes on exactly from a checkpoint; a warning says so if not.

    Raises:
        ValueError: It cannot go on at all, because trees made with other settings are still to be trained on.
    """
    content = read_seal(folder)
    saved = content["settings"]
    changed = [
        f"{name} was {saved.get(name)} and is now {value}"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if changed and content["is_mid_generation"]:
        raise ValueError(
            f"{folder} was saved between two updates on the same trees, which fit its own settings only, but "
            f"{', '.join(changed)}. Set them back, take a checkpoint at a multiple of steps_per_generation * "
            f"num_iterations / gradient_accumulation_steps steps, or start from its weights: model='{folder}'"
        )
    if changed and PartialState().is_main_process:
        warnings.warn(
            f"The run goes on from {folder} with its weights, its step and, where its files fit, its optimizer, but "
            f"not as an unbroken one would: {', '.join(changed)}",
            stacklevel=2,
        )
    return not changed


def make_room(folder: str | Path, delete_unfinished: bool) -> None:
    """Before a checkpoint is written: nothing of an older one of the same name may pass for a part of it.

    A complete one is moved aside, where [`last_complete_checkpoint`] still finds it, until the new one is complete.

    Args:
        folder: Where it will be written.
        delete_unfinished: Whether to delete unfinished checkpoints beside it, too: among those that
            `save_total_limit` counts, one could be taken for the newest and kept instead of a complete one.
    """
    folder = Path(folder)
    for path in list_checkpoints(folder.parent):
        if (path == folder or delete_unfinished) and not _is_whole_json(path / TRAINER_STATE):
            shutil.rmtree(path, ignore_errors=True)
    if folder.exists():
        aside = folder.with_name(f"replaced-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def discard_replaced(output_dir: str | Path) -> None:
    """Delete what [`make_room`] moved aside, once the new checkpoint is complete."""
    for path in list_checkpoints(output_dir):
        if path.name.startswith("replaced-"):
            shutil.rmtree(path, ignore_errors=True)


def describe_failure(folder: str | Path) -> str:
    """What to say beside the error that ended the writing of a checkpoint: the writers seldom name disk or file."""
    folder = Path(folder)
    complete = [str(path) for path in list_checkpoints(folder.parent) if find_fault(path) is None]
    fault = find_fault(folder)
    return (
        f"This happened while {folder} was written, which is {f'not complete ({fault})' if fault else 'complete'}. "
        f"{shutil.disk_usage(folder.parent).free / 1e6:,.1f} MB are free on its disk. The newest complete checkpoint "
        f"is {complete[0] if complete else 'none'}"
    )


def _find_last(output_dir: str | Path) -> tuple[str | None, dict[str, str]]:
    """The newest checkpoint that is complete for every process, and what is wrong with each newer one."""
    checkpoints = list_checkpoints(output_dir)
    everyone = gather_object([{path.name: find_fault(path) for path in checkpoints}])
    skipped: dict[str, str] = {}
    for path in checkpoints:
        faults = [found.get(path.name, "it is not on every machine") for found in everyone]
        if not any(faults):
            return str(path), skipped
        skipped[path.name] = next(fault for fault in faults if fault)
    return None, skipped


def _state_path(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"treerpo_{name}.pt"


def _is_whole_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
