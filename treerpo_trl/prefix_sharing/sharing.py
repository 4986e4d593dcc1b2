"""Prefix sharing for the models of a trainer: whether they can, the check that they do, and the forward in chunks.

Legend: B rows, L columns of a row, T completion columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import install
from .forward import find_difference, forward_shared
from .support import has_low_precision, unsupported_reason


# Largest difference of a log-probability from that of dense rows that rounding explains.
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.25


class PrefixSharing:
    """Shares prefixes in the forward passes of a trainer's models.

    Args:
        mode: `"auto"` shares if all models can and warns with the reason if not; `True` makes that an error; `False`
            never shares.
        models: The policy and, if there is one, the reference model.
        accelerator: The trainer's accelerator.

    Raises:
        ValueError: `mode` is `True` and a model cannot share prefixes.
    """

    def __init__(self, mode: bool | str, models: Sequence[PreTrainedModel], accelerator: Any):
        self.mode = mode
        self.accelerator = accelerator
        self.is_active = mode is not False
        self._is_checked = False
        self._row_tokens: Any = 0  # a tensor once it has counted: to read it would wait for the device
        self._computed_tokens = 0
        for model in models if self.is_active else ():
            if (reason := unsupported_reason(model)) is not None:
                self._fall_back(reason)
                return
        if self.is_active:
            for model in models:
                install(model)
            text_config = models[0].config.get_text_config()
            self.is_moe = hasattr(text_config, "output_router_logits")
            self._vocabulary_size = text_config.vocab_size
            self._is_low_precision = accelerator.mixed_precision in ("bf16", "fp16") or has_low_precision(models[0])

    def can_share(self, model: Any, input_ids: Tensor) -> bool:
        """Whether to share prefixes. The first call measures on the model as it is, wrapped and all, that it is exact.

        Raises:
            ValueError: The mode is `True`, and it is not exact.
        """
        if self.is_active and not self._is_checked:
            self._is_checked = True
            difference, failure = self._measure(model, input_ids.device)
            tolerance = LOW_PRECISION_TOLERANCE if self._is_low_precision else TOLERANCE
            if not difference <= tolerance:
                name = type(self.accelerator.unwrap_model(model)).__name__
                failure = failure or f"they differ by up to {difference:.2g}"
                self._fall_back(f"{name} gives no or other log-probabilities for packed rows ({failure})")
        return self.is_active

    def _measure(self, model: Any, device: torch.device) -> tuple[float, str]:
        """The largest difference on any process, and what went wrong on this one."""
        was_training, failure = model.training, ""
        model.eval()  # without dropout, and without gradient checkpointing
        try:
            with self.accelerator.autocast():
                difference = find_difference(model, self._vocabulary_size, device)
        except Exception as error:  # whatever a model makes of a layout it does not know
            difference, failure = float("inf"), f"{type(error).__name__}: {error}"
        finally:
            model.train(was_training)
        local = torch.tensor([difference], device=device)
        return self.accelerator.gather(local).max().item(), failure  # all processes must decide the same

    def take_token_counts(self) -> tuple[int, int]:
        """(tokens of the rows, tokens computed of them) in the forward passes with a gradient since the last call.

        They are (1, 1) if nothing is shared.
        """
        counts = int(self._row_tokens), self._computed_tokens
        self._row_tokens = self._computed_tokens = 0
        return counts if self.is_active else (1, 1)

    def _fall_back(self, reason: str) -> None:
        if self.mode is True:
            raise ValueError(f"prefix_sharing=True cannot be had: {reason}. Set prefix_sharing='auto' or False")
        self.is_active = False
        if self.accelerator.is_main_process:
            warnings.warn(f"Training computes dense rows, which is slower, because {reason}.", stacklevel=3)

    def forward(
        self,
        model: Any,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        needed_BT: Tensor,
        missing_BT: Tensor | None,
        batch_size: int,
        compute_entropy: bool,
        compute_aux_loss: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `GRPOTrainer._get_per_token_logps_and_entropies` returns, computed `batch_size` rows at a time.

        Args:
            model: One of the models, wrapped or not.
            input_ids_BL: (B, L) prompts, left-padded, and completions, right-padded.
            attention_mask_BL: (B, L) 1 on tokens.
            needed_BT: (B, T) completion tokens that are asked for.
            missing_BT: (B, T) log-probabilities to give to the others; 0 by default.
            batch_size: Rows of a chunk.
            compute_entropy: Whether to return entropies.
            compute_aux_loss: Whether to return a mixture of experts' load-balancing loss.
        """
        chunks = []
        for start in range(0, len(input_ids_BL), batch_size):
            rows = slice(start, start + batch_size)
            missing = 0.0 if missing_BT is None else missing_BT[rows]
            with self.accelerator.autocast():
                chunks.append(
                    forward_shared(
                        model,
                        input_ids_BL[rows],
                        attention_mask_BL[rows],
                        needed_BT[rows],
                        missing,
                        self.is_moe,
                        compute_aux_loss,
                    )
                )
        if torch.is_grad_enabled():
            self._row_tokens = self._row_tokens + attention_mask_BL.sum()
            self._computed_tokens += sum(chunk.num_computed for chunk in chunks)
        logps = torch.cat([chunk.log_probs for chunk in chunks])
        entropies = [chunk.entropy for chunk in chunks if chunk.entropy is not None]
        aux_losses = [chunk.aux_loss for chunk in chunks if chunk.aux_loss is not None]
        return (
            logps,
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )
