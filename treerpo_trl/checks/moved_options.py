"""Options that a configuration does not have: where those of earlier versions of TRL and transformers went."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


# Options that GRPOConfig once had: TRL 0.15 to 0.27.
FROM_TRL = {
    "max_prompt_length": "filter out the rows whose prompt is too long (examples/train.py has --max_prompt_length)",
    "token_entropy_percentile_threshold": "use top_entropy_quantile, which is 1 minus it",
    "use_liger_loss": "remove it; log-probabilities are computed without holding the logits in any case",
    "vllm_device": "use vllm_mode='colocate' for an engine on each training device, or 'server' for one elsewhere",
    "vllm_dtype": "remove it for a colocated engine, and give a server its --dtype",
    "vllm_enable_prefix_caching": "remove it; vLLM caches prefixes unless a server is told otherwise",
    "vllm_guided_decoding_regex": "remove it; each segment of a tree would have to match it anew",
    "vllm_max_model_len": "use vllm_max_model_length, or a server's --max_model_len",
    "wandb_log_unique_prompts": "use log_unique_prompts",
}
# Options that transformers' TrainingArguments once had, up to version 4.
FROM_TRANSFORMERS = {
    "adafactor": "use optim='adafactor'",
    "dispatch_batches": "use accelerator_config={'dispatch_batches': ...}",
    "evaluation_strategy": "use eval_strategy",
    "fp16_backend": "remove it",
    "fp16_opt_level": "remove it",
    "group_by_length": "remove it; prompts are not padded to each other",
    "half_precision_backend": "remove it",
    "include_tokens_per_second": "use include_num_input_tokens_seen",
    "jit_mode_eval": "remove it",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "no_cuda": "use use_cpu",
    "overwrite_output_dir": "remove it; nothing in output_dir is deleted but old checkpoints (save_total_limit)",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "push_to_hub_model_id": "use hub_model_id",
    "push_to_hub_token": "use hub_token",
    "save_safetensors": "remove it; weights are saved as safetensors only",
    "split_batches": "use accelerator_config={'split_batches': ...}",
    "tokenizer": "give it to the trainer as processing_class",
    "use_ipex": "remove it",
    "use_mps_device": "remove it; the device is found by itself",
    "warmup_ratio": "use warmup_steps, of which a number below 1 is a share of all steps",
}
MOVED = {**FROM_TRL, **FROM_TRANSFORMERS}


def explain_unknown(names: Iterable[str], known: Iterable[str]) -> str:
    """What to write instead of options that there are not; empty where there is nothing to say.

    Args:
        names: Options that were given.
        known: Options that there are.
    """
    known = sorted(known)
    hints = []
    for name in names:
        if name in MOVED:
            hints.append(f"{name} is an option of earlier versions: {MOVED[name]}")
        elif near := get_close_matches(name, known, n=1, cutoff=0.75):
            hints.append(f"{name}, did you mean {near[0]}?")
    return "; ".join(hints)


def explains_unknown_options(config_class: type) -> type:
    """Let the error of a dataclass about an argument that it does not have say what to write instead."""
    init: Any = config_class.__init__  # type: ignore[misc]
    names = {field.name for field in dataclasses.fields(config_class)}

    @functools.wraps(init)
    def explaining_init(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name not in names]
        if hints := explain_unknown(unknown, names):
            given = ", ".join(map(repr, unknown))
            raise TypeError(f"{config_class.__name__}.__init__() got an unexpected keyword argument {given}: {hints}")
        init(self, *args, **kwargs)

    config_class.__init__ = explaining_init  # type: ignore[misc]
    return config_class
