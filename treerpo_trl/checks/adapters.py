"""Adapters of PEFT and quantized base models: what trees cannot train, and what is put right before they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

from ..reporting.quiet import BITSANDBYTES


NEEDS_CACHE = "its virtual tokens stand in the key-value cache, from which branches cannot continue"
NEEDS_TASK_IDS = "it needs the number of a task with each row, which TRL does not hand over"
NEEDS_OUTPUTS = "it needs hidden states or logits, of which TRL's fused head makes none"
REFUSED = {
    PeftType.PREFIX_TUNING: NEEDS_CACHE,
    PeftType.CARTRIDGE: NEEDS_CACHE,
    PeftType.MULTITASK_PROMPT_TUNING: NEEDS_TASK_IDS,
    PeftType.POLY: NEEDS_TASK_IDS,
    PeftType.CPT: NEEDS_OUTPUTS,
    PeftType.XLORA: NEEDS_OUTPUTS,
}
# These ways to initialise LoRA take something out of the base model's weights, and put it into the adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_quantization(
    model: Any, quantization_config: Any, peft_config: Any, model_init_kwargs: dict[str, Any] | None = None
) -> None:
    """Refuse to load a model in 4 or 8 bits where that cannot be done, or it could not be trained.

    Args:
        model: A path or a name; a model is loaded already.
        quantization_config: How to load it, or `None`.
        peft_config: The adapter to put on it, or `None`.
        model_init_kwargs: Where `quantization_config` may stand instead.

    Raises:
        ImportError: bitsandbytes is missing or too old.
        ValueError: There is no adapter.
    """
    config = quantization_config or (model_init_kwargs or {}).get("quantization_config")
    if not isinstance(model, str) or not isinstance(config, BitsAndBytesConfig):
        return
    bits = 4 if config.load_in_4bit else 8
    if not is_bitsandbytes_available():
        raise ImportError(
            f"load_in_{bits}bit needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer, which is not installed: "
            'pip install "treerpo-trl[quantization]"'
        )
    if peft_config is None:
        raise ValueError(
            f"load_in_{bits}bit is set, but weights of {bits} bits cannot be trained; train an adapter on them: pass "
            "peft_config=LoraConfig(...) (--use_peft), or load the model unquantized"
        )
    BITSANDBYTES.show()


def check_adapter(model: Any, peft_config: Any, beta: float) -> None:
    """Refuse adapters that would not be trained, or not rightly.

    Args:
        model: The model that the trainer was given: a path, a name, a model or a `PeftModel`.
        peft_config: The adapter to put on it, or `None`.
        beta: Coefficient of the KL divergence; with it, there is a reference model.

    Raises:
        ValueError: The adapter is of a kind that trees cannot train, or frozen, or has no right reference model.
    """
    if isinstance(model, str) and (Path(model) / "adapter_config.json").exists():
        raise ValueError(
            f"model={model!r} is an adapter, not a model. To go on training it, pass "
            f"AutoPeftModelForCausalLM.from_pretrained({model!r}, is_trainable=True), of peft"
        )
    if isinstance(model, nn.Module) and peft_config is None and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"no parameter of the {type(model).__name__} can be trained; load its adapter with peft, by "
            "PeftModel.from_pretrained(base_model, adapter, is_trainable=True)"
        )
    config = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if config is None:
        return
    kind = type(config).__name__
    if (reason := REFUSED.get(config.peft_type)) is not None:
        raise ValueError(f"TreeRPOTrainer does not train {kind}: {reason}. Use LoRA (peft.LoraConfig)")
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"alora_invocation_tokens={config.alora_invocation_tokens} is not supported by TreeRPOTrainer: rows that "
            "share a prefix would have to be searched for the tokens one by one. Leave it out"
        )
    if beta == 0:
        return
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={init!r} changes the weights of the base model, so that it is no reference model, but "
            f"beta={beta} needs one. Set beta=0, or leave init_lora_weights out"
        )
    if isinstance(model, PeftModel) and model.active_adapter != "default":
        raise ValueError(
            f"the active adapter is {model.active_adapter!r}, but beta={beta} needs a reference, which TRL makes of "
            "the adapter 'default'. Load the adapter without adapter_name, or set beta=0"
        )


def prepare_adapter(model: nn.Module, beta: float) -> None:
    """Make the reference adapter a full copy, and keep 4-bit weights differentiable through evaluations.

    Args:
        model: The model to be trained, as upstream's trainer has set it up.
        beta: Coefficient of the KL divergence.

    Raises:
        ValueError: 4-bit weights have lost their gradient already.
    """
    if beta != 0 and isinstance(model, PeftModel) and "ref" in model.peft_config:
        _copy_reference(model)
    _keep_differentiable(model)


def _copy_reference(model: PeftModel) -> None:
    """Copy the adapter to the reference adapter, of which TRL copies parameters of modules only.

    Those in a dictionary (LoRA on embeddings, IA3, VeRA) it leaves as they are initialised, and it rounds the adapter
    of a quantized model after it has copied it. In both cases the KL divergence would not begin at 0.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "default" in parts:
            reference = parameters[".".join("ref" if part == "default" else part for part in parts)]
            reference.data = parameter.detach().clone()


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first forward pass for inference, as it does on some CPUs.

    On processors with AVX512-BF16 such a layer is then computed by a kernel without a gradient, in training as well,
    so that the layers below learn nothing through it; and what it unpacks again are other weights (bitsandbytes 0.50:
    `Linear4bit.forward`, `matmul_4bit`, `_convert_weight_packed_for_cpu_inverse`).
    """
    for name, layer in model.named_modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        layer.support_avx512bf16_for_cpu = False
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} has 4-bit weights that bitsandbytes has packed for inference on this CPU, where they have no "
                "gradient: the model has run in evaluation mode. Load it again, or give the trainer its name"
            )
