"""Weights that come back from a checkpoint: every one of them, or an error that names those that do not.

transformers saves a model in the format of the Hub. For some families that is not the format of the model in memory:
experts are separate tensors, names differ. Upstream's trainer looks the tensors of a file up by their names and passes
over those that it does not find, so such a parameter would keep its initial value. PEFT renames the tensors of an
adapter as it loads them, with the same effect where the adapter was saved under the model's own names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


MOST_NAMED = 5
# PEFT saves what these make, not their parameters.
VIRTUAL_TOKENS = "prompt_encoder."


def restore_weights(model: nn.Module, folder: str | Path, load: Callable[[], None]) -> None:
    """Give a model the weights of a checkpoint.

    Args:
        model: A model of transformers, or one with adapters of PEFT; not wrapped, and whole on this process.
        folder: The checkpoint.
        load: Upstream's way, which is right for most models.

    Raises:
        ValueError: A parameter is not in the checkpoint, or did not come back; the message names it.
    """
    if isinstance(model, PeftModel):
        load()
        if _lost_from_adapters(model, folder):
            _copy_adapters(model, folder)
        lost = _lost_from_adapters(model, folder)
    else:
        if is_converted_when_saved(model):
            _load_converted(model, folder)
        else:
            load()
        lost = _lost_from_files(model, folder)
    if lost:
        more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
        raise ValueError(
            f"{folder} does not restore every parameter of the {type(model).__name__}: "
            f"{', '.join(lost[:MOST_NAMED])}{more}. Either the checkpoint does not hold them, because save_pretrained "
            "leaves them out, or it is of another model. Train only what is saved with the model, or start a new run"
        )


def is_converted_when_saved(model: Any) -> bool:
    """Whether the files of a model hold other names than the model itself, or tensors that were cut or joined."""
    own = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    saved = revert_weight_conversion(model, dict(own))
    return saved.keys() != own.keys() or any(saved[name] is not tensor for name, tensor in own.items())


def _load_converted(model: Any, folder: str | Path) -> None:
    """Have transformers convert the files, into a second model on the CPU that is dropped afterwards."""
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    dtype = torch.float64 if is_double else torch.float32  # holds what any lower precision does, exactly
    with torch.random.fork_rng():  # a new model draws its first weights
        restored = type(model).from_pretrained(folder, dtype=dtype)
    model.load_state_dict(restored.state_dict())


def _lost_from_files(model: Any, folder: str | Path) -> list[str]:
    """Tensors, by their names in the files, that would not be saved as they were."""
    saved = revert_weight_conversion(model, model.state_dict())
    lost, found, restored = [], set(), set()
    for name, tensor in _read_files(Path(folder)):
        found.add(name)
        if name in saved and _is_same(saved[name], tensor):
            restored.add(saved[name].data_ptr())  # and with it what is tied to it, which is saved once
        else:
            lost.append(name)
    buffers = {buffer.data_ptr() for buffer in model.buffers()}
    ignored = {*(model._keys_to_ignore_on_save or ())}
    lost += [
        name
        for name, tensor in saved.items()
        if name not in found and name not in ignored and tensor.data_ptr() not in restored | buffers
    ]
    return lost


def _lost_from_adapters(model: PeftModel, folder: str | Path) -> list[str]:
    """Tensors of the adapters that would not be saved as they were, and trained parameters that are in none."""
    lost, saved_places = [], set()
    for adapter, files in _adapter_folders(model, folder):
        saved = get_peft_model_state_dict(model, adapter_name=adapter)
        saved_places |= {tensor.data_ptr() for tensor in saved.values()}
        read = load_peft_weights(str(files), device="cpu")
        lost += [name for name in {**saved, **read} if not (name in saved and name in read)]
        lost += [name for name in read if name in saved and not _is_same(saved[name], read[name])]
    lost += [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in saved_places and VIRTUAL_TOKENS not in name
    ]
    return lost


def _copy_adapters(model: PeftModel, folder: str | Path) -> None:
    """Copy the tensors of the files to those that PEFT would save under the same names, which are the model's own."""
    for adapter, files in _adapter_folders(model, folder):
        saved = get_peft_model_state_dict(model, adapter_name=adapter)
        for name, tensor in load_peft_weights(str(files), device="cpu").items():
            if name in saved and saved[name].shape == tensor.shape:
                saved[name].data.copy_(tensor)


def _adapter_folders(model: PeftModel, folder: str | Path) -> Iterator[tuple[str, Path]]:
    """Each adapter of a model, and where PEFT saves it."""
    for adapter in model.peft_config:
        yield adapter, Path(folder) if adapter == "default" else Path(folder) / adapter


def _read_files(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a saved model, one at a time, on the CPU."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    for file_name in sorted(names):
        with safe_open(folder / file_name, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it cannot be iterated over)
                yield name, file.get_tensor(name)


def _is_same(tensor: Tensor, saved: Tensor) -> bool:
    """Whether a tensor is what a file holds, in its own precision."""
    if tensor.shape != saved.shape:
        return False
    saved = saved.to(tensor.device, tensor.dtype)
    return bool(((tensor == saved) | ((tensor != tensor) & (saved != saved))).all())  # NaN is NaN
