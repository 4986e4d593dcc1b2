"""Log-probabilities of rows from one forward pass over their distinct tokens, and the check that it is exact.

Legend: B rows, L columns of a row, T completion columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import NO_MASK_SHAPE, without_masks
from .packing import pack_rows


class RowOutputs(NamedTuple):
    """What a forward pass says of rows: (B, T) log-probabilities and entropies, and the load-balancing loss; and how
    many tokens it computed for that."""

    log_probs: Tensor
    entropy: Tensor | None
    aux_loss: Tensor | None
    num_computed: int


def forward_shared(
    model: nn.Module,
    input_ids_BL: Tensor,
    attention_mask_BL: Tensor,
    needed_BT: Tensor,
    missing: Tensor | float = 0.0,
    is_moe: bool = False,
    with_aux_loss: bool = False,
) -> RowOutputs:
    """Run rows through a model with TRL's fused head, each shared prefix once.

    Args:
        model: A model prepared by [`install`], wrapped or not.
        input_ids_BL: (B, L) prompts, left-padded, and completions, right-padded.
        attention_mask_BL: (B, L) 1 on tokens.
        needed_BT: (B, T) completion tokens that are asked for.
        missing: (B, T), or one number: log-probabilities to give to the others.
        is_moe: Whether the model is a mixture of experts that can return router logits.
        with_aux_loss: Whether to ask a mixture of experts for its load-balancing loss. All tokens are computed then,
            each counted as often as it stands in the rows.
    """
    packed = pack_rows(input_ids_BL, attention_mask_BL, needed_BT, every_token=with_aux_loss)
    arguments: dict[str, Any] = {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "shift_labels": packed.labels,
        "fused_lm_head": True,
        "tree_layout": packed.layout,
    }
    if is_moe:
        arguments["output_router_logits"] = with_aux_loss
    if not with_aux_loss:
        outputs = model(**arguments, attention_mask=torch.zeros(NO_MASK_SHAPE, device=packed.input_ids.device))
    else:
        # The loss weighs tokens with the attention mask, so the mask must reach it, but no layer.
        with without_masks():
            outputs = model(**arguments, attention_mask=packed.counts.float())
    entropy = None if outputs.entropy is None else packed.unpack(outputs.entropy)
    return RowOutputs(packed.unpack(outputs.log_probs, missing), entropy, outputs.aux_loss, packed.input_ids.numel())


def forward_dense(model: nn.Module, input_ids_BL: Tensor, attention_mask_BL: Tensor, width: int) -> Tensor:
    """(B, T) log-probabilities of the last `width` columns, row by row."""
    labels = input_ids_BL.masked_fill(attention_mask_BL == 0, -100)
    labels[:, :-width] = -100
    outputs = model(input_ids=input_ids_BL, attention_mask=attention_mask_BL, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -width:]


def find_difference(model: nn.Module, vocabulary_size: int, device: torch.device) -> float:
    """Largest difference between log-probabilities of shared and dense rows, on a small tree of various tokens.

    A model that ignores the layout, or mixes positions outside its attention, gives itself away here.

    Args:
        model: A model prepared by [`install`], in evaluation mode: dropout would differ.
        vocabulary_size: Tokens the model knows.
        device: Where the model is.
    """
    # Strides without a common divisor: rows of many different tokens in any order.
    prompt, trunk, *branches = (
        torch.arange(start, start + stride * length, stride) % vocabulary_size
        for start, stride, length in [(11, 7, 7), (3, 5, 4), (2, 11, 7), (5, 13, 7), (8, 17, 7)]
    )
    rows = [[trunk, branches[0]], [trunk, branches[1]], [branches[2], trunk]]
    input_ids = torch.stack([torch.cat([prompt, *pieces]) for pieces in rows]).to(device)
    mask = torch.ones_like(input_ids)
    mask[:, 0] = 0  # one column of left padding
    with torch.no_grad():
        dense = forward_dense(model, input_ids, mask, width=input_ids.size(1) - len(prompt))
        shared = forward_shared(model, input_ids, mask, torch.ones_like(dense, dtype=torch.bool)).log_probs
    return (dense - shared).abs().max().item()
