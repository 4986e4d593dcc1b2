"""A trial of forked caches: before samples rest on them, their log-probabilities are held against prefilled ones.

Legend: R rows decoded together, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.modules.module import register_module_forward_hook
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from ..shape import TreeShape
from ..waves import grow
from .caches import ROW_STATE, CannotForkError


# Two prompts of these lengths, so that one is padded. Every process tries the same sizes: shards are gathered in step.
PROMPT_LENGTHS = (7, 4)
SHAPE = TreeShape(branching=(2, 2), segment_length=2, max_completion_length=4)
MAX_ROWS = 4  # so that what is left of a block goes on in parts
# Largest difference of log-probabilities, averaged over the next token, that rounding explains.
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-2, 0.25


def find_fault(backend: Any, prompts: Sequence[Sequence[int]]) -> str | None:
    """Why a backend must not fork the caches of its model, or `None` if forks give what prefilled prefixes give.

    A small tree is grown twice, on forks and on prefilled prefixes, by the calls that real sampling makes. Both go
    along given tokens, as a tie would let the best ones part. Processes that share a model decide alike.

    Args:
        backend: A [`~treerpo_trl.growth.backends.TransformersBackend`]; the random state and its model are left as
            found.
        prompts: Token ids of real prompts, of which the trial's are made.
    """
    fault, difference = None, 0.0
    with _undisturbed(backend.model), _precision() as dtypes:
        before = _tensors_of(backend.model)
        try:
            expected, got = (_walk(backend, prompts, fork_caches) for fork_caches in (False, True))
            fault = _find_state(backend.model, before, rows=len(got[-1]))
            difference = max(_difference(*pair) for pair in zip(expected, got, strict=True))
        except CannotForkError as error:
            fault = str(error)
        except Exception as error:  # whatever a model makes of a cache that is not its own
            fault = f"{type(error).__name__}: {error}"
    is_low = any(dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize for dtype in dtypes)
    if fault is None and not difference <= (LOW_PRECISION_TOLERANCE if is_low else TOLERANCE):
        fault = f"log-probabilities after a fork differ by {difference:.2g}"
    if backend.synced_gpus:
        found = torch.tensor(float(fault is not None), device=backend.model.device)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        if found.item() and fault is None:
            fault = "another process found that it cannot"
    return fault


def _walk(backend: Any, prompts: Sequence[Sequence[int]], fork_caches: bool) -> list[Tensor]:
    """The (R, V) log-probabilities of each step of the trial's tree."""
    eos_token_ids = backend.eos_token_ids.tolist()
    guide = _Guide(_ordinary_tokens(backend, prompts), eos_token_ids)
    trial = type(backend)(
        backend.model,
        GenerationConfig(
            do_sample=False, eos_token_id=eos_token_ids, pad_token_id=backend.pad_token_id, disable_compile=True
        ),
        eos_token_ids,
        backend.pad_token_id,
        min(backend.max_rows, MAX_ROWS),
        fork_caches=fork_caches,
        synced_gpus=backend.synced_gpus,
    )
    trial.logits_processors.append(guide)
    pair = zip((prompts[0], prompts[-1]), PROMPT_LENGTHS, strict=True)
    grow([_stretch(prompt, length) for prompt, length in pair], SHAPE, trial)
    return guide.log_probs


class _Guide(LogitsProcessor):
    """Keeps the log-probabilities of each step, and leaves each row one token of its own to go on with."""

    def __init__(self, tokens: Sequence[int], eos_token_ids: Sequence[int]):
        self.tokens = torch.tensor(tokens)
        self.eos_token_ids = list(eos_token_ids)
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log_probs.append(scores.float().log_softmax(dim=-1))
        rows = torch.arange(len(scores))
        chosen = self.tokens[(rows + len(self.log_probs)) % len(self.tokens)]
        if len(self.log_probs) == SHAPE.segment_length and len(rows) > 1 and self.eos_token_ids:
            chosen[0] = self.eos_token_ids[0]  # of the rows drawn with this one, the others must be found again
        return torch.full_like(scores, float("-inf")).index_put(
            (rows.to(scores.device), chosen.to(scores.device)), scores.new_zeros(())
        )


def _difference(expected_RV: Tensor, got_RV: Tensor) -> float:
    """The largest over rows of E|log p - log q|, where p is expected. Where p is not finite, sampling says so itself.

    The average is taken because in low precision, some of many thousand tokens that are never drawn always differ.
    """
    p_RV = expected_RV.exp()
    terms_RV = torch.where(p_RV == 0, 0.0, p_RV * (expected_RV - got_RV).abs())
    means_R = terms_RV.sum(dim=-1).nan_to_num(nan=float("inf"))
    return means_R.masked_fill(expected_RV.isnan().any(dim=-1), 0.0).max().item()


def _ordinary_tokens(backend: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of the prompts, because a model may take others for images; those that end or pad are left out."""
    special = {*backend.eos_token_ids.tolist(), backend.pad_token_id}
    vocabulary = range(backend.model.config.get_text_config(decoder=True).vocab_size)
    for candidates in ([*prompts[0], *prompts[-1]], vocabulary):
        if tokens := [token for token in dict.fromkeys(candidates) if token not in special]:
            break
    return tokens


def _stretch(prompt: Sequence[int], length: int) -> list[int]:
    """The last `length` tokens of the prompt, repeated as often as it takes."""
    return (list(prompt) * -(-length // len(prompt)))[-length:]


def _tensors_of(model: PreTrainedModel) -> dict[tuple[str, str], Tensor]:
    """Tensors that hang on the model's modules, other than parameters, by module and name."""
    return {
        (place, name): value
        for place, module in model.named_modules()
        for name, value in {**vars(module), **module._buffers}.items()
        if isinstance(value, Tensor)
    }


def _find_state(model: PreTrainedModel, before: dict[tuple[str, str], Tensor], rows: int) -> str | None:
    """What the model keeps of the batch on itself, as long as its last one of `rows` rows, and no fork knows of."""
    for (place, name), value in _tensors_of(model).items():
        is_new = value is not before.get((place, name))
        if is_new and name not in ROW_STATE and value.dim() > 0 and len(value) == rows:
            return f"it keeps {name!r} of each batch on itself, in {place or 'the model'}"
    return None


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and a random state of its own; both are put back."""
    modes = [(module, module.training) for module in model.modules()]
    device = model.device
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _precision() -> Iterator[set[torch.dtype]]:
    """The types of what modules return meanwhile, which tell of autocast and of shards in low precision, too."""
    dtypes: set[torch.dtype] = set()

    def note(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            dtypes.add(output.dtype)

    handle = register_module_forward_hook(note)
    try:
        yield dtypes
    finally:
        handle.remove()
