"""Generation options on trees: which are right, which the tree sets, and which are refused, with the reason.

Each segment of a tree is a `generate` call, or a request to vLLM, of its own. An option that looks at single tokens,
or at the whole path so far, does on trees what it does in GRPO. One that counts from the start of a call would not.

Every option of transformers' `GenerationConfig` and of vLLM's `SamplingParams` is in one of the tables of
`generation_tables`, which a test holds complete. What a configuration asks for and trees cannot do is an error. What
merely comes with a model, in its own generation config, is left out when trees are grown, with a warning if it would
have changed the samples.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, SynthIDTextWatermarkingConfig

from .generation_tables import (
    ANEW,
    REFUSED,
    SERVER_REFUSED,
    SERVER_RIGHT,
    TREE_SETS,
    UNEVEN_REFUSED,
    VLLM_REFUSED,
    VLLM_RIGHT,
    VLLM_TREE_SETS,
    Reason,
)


def check_generation_kwargs(config: Any, has_tools: bool = False) -> None:
    """Check the generation options of a configuration.

    Args:
        config: A TreeRPOConfig, whose generation_kwargs is a dict or None.
        has_tools: Whether turns end segments.

    Raises:
        ValueError: One of them is the tree's to set, or does not work on trees; the message says what to do instead.

    Warns:
        UserWarning: GenerationConfig does not know one of them, so it is without effect.
    """
    kwargs = config.generation_kwargs or {}
    refused = TREE_SETS | _refused("turn" if has_tools else config.split_rule)
    if config.use_vllm:
        is_server = config.vllm_mode == "server"
        refused = VLLM_TREE_SETS | VLLM_REFUSED | (SERVER_REFUSED if is_server else {})
        _refuse_unknown(kwargs, VLLM_RIGHT | (SERVER_RIGHT if is_server else set()) | set(refused))
    else:
        _warn_of_unknown(kwargs)
    for name, value in kwargs.items():
        why = _why_not(name, value, refused)
        if why is not None:
            verb = "the tree decides" if name in TREE_SETS | VLLM_TREE_SETS else "does not work on trees"
            raise ValueError(f"generation_kwargs has {name}={value!r}, which {verb}: {why.reason}; {why.fix}")
    temperature = kwargs.get("temperature", config.temperature)
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature is {temperature}, so all siblings would be the same; use a positive value")


def check_generation_options(
    config: Any, own: GenerationConfig, eos_token_ids: Sequence[int], has_tools: bool = False
) -> None:
    """Check the options that come with a model, and those of a configuration that must fit the model.

    Args:
        config: A TreeRPOConfig.
        own: The model's own generation config, from which come the options that a configuration leaves open.
        eos_token_ids: Every token that ends a completion.
        has_tools: Whether turns end segments.

    Raises:
        ValueError: A call would end at tokens that end no completion, or evaluation would fail.

    Warns:
        UserWarning: The model has an option that does not work on trees, which are therefore grown without it.
    """
    kwargs = config.generation_kwargs or {}
    if config.use_vllm:  # which takes nothing of it but end tokens and, in a server, penalties
        penalties = ("presence_penalty", "frequency_penalty") if config.vllm_mode == "server" else ()
        _warn_of_own({name: getattr(own, name, None) for name in penalties if name not in kwargs}, VLLM_REFUSED)
        return
    open_options = {name: value for name, value in vars(own).items() if kwargs.get(name) is None}
    _warn_of_own(open_options, _refused("turn" if has_tools else config.split_rule))
    ends = kwargs.get("eos_token_id") or []
    unknown = set([ends] if isinstance(ends, int) else ends) - set(eos_token_ids)
    if unknown:
        raise ValueError(
            f"generation_kwargs has eos_token_id={ends!r}, but {sorted(unknown)} end no completion: the trainer knows "
            f"{list(eos_token_ids)}. Set model.generation_config.eos_token_id instead"
        )
    stop_strings = kwargs.get("stop_strings") or own.stop_strings
    if stop_strings and config.eval_strategy != "no":
        raise ValueError(
            f"trees can stop at stop_strings={stop_strings!r}, but evaluation cannot, as TRL gives `generate` no "
            f"tokenizer to find them with. Use eval_strategy='no' instead of {config.eval_strategy.value!r}, or "
            "use_vllm=True with the option 'stop'"
        )


@contextmanager
def options_on_trees(
    model: Any, generation_config: GenerationConfig, split_rule: str = "length"
) -> Iterator[GenerationConfig]:
    """The options to grow trees with: those given, then those of the model's own that are right on trees.

    Within the context the model has none of its own, as `generate` would fill in what a call leaves open.

    Args:
        model: The model that samples, or a PEFT model around it.
        generation_config: What TRL samples with. It stays as it is.
        split_rule: How segments end.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = model.generation_config
    refused = _refused(split_rule)
    left_out = [name for name, value in vars(own).items() if name in TREE_SETS or _why_not(name, value, refused)]
    kept = {name: value for name, value in own.to_dict().items() if name not in left_out}
    options = copy.deepcopy(generation_config)
    options.update(**kept, defaults_only=True, allow_custom_entries=True)  # as `generate` does
    model.generation_config = GenerationConfig()
    try:
        yield options
    finally:
        model.generation_config = own


def _refused(split_rule: str) -> dict[str, Reason]:
    """What does not work on trees with transformers."""
    return REFUSED if split_rule == "length" else REFUSED | UNEVEN_REFUSED


def _why_not(name: str, value: Any, refused: Mapping[str, Reason]) -> Reason | None:
    """The reason against an option that has this value, if there is one."""
    if isinstance(value, SynthIDTextWatermarkingConfig):
        return Reason(f"it remembers contexts, and {ANEW}", "use a WatermarkingConfig")
    if name not in refused or value is None or value in refused[name].harmless:
        return None
    return refused[name]


def _warn_of_own(options: Mapping[str, Any], refused: Mapping[str, Reason]) -> None:
    for name, value in options.items():
        why = _why_not(name, value, refused)
        if why is not None:
            warnings.warn(
                f"the model's generation_config has {name}={value!r}, which does not work on trees: {why.reason}. "
                f"Trees are grown without it. Set model.generation_config.{name} = None to train without this warning",
                stacklevel=4,
            )


def _warn_of_unknown(kwargs: Mapping[str, Any]) -> None:
    known = vars(GenerationConfig())
    for name in kwargs:
        if name not in known:
            warnings.warn(
                f"generation_kwargs has {name!r}, which is no option of GenerationConfig and has no effect, as in TRL."
                f"{_suggest(name, known)}",
                stacklevel=5,
            )


def _refuse_unknown(kwargs: Mapping[str, Any], known: set[str]) -> None:
    for name in kwargs:
        if name not in known:
            raise ValueError(
                f"generation_kwargs has {name!r}, which is no option of vLLM's SamplingParams that is known to be "
                f"right on trees. Remove it.{_suggest(name, known)}"
            )


def _suggest(name: str, known: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
