"""Generation options on trees: which are right, which the tree sets, and which are refused, with the reason.

Each segment of a tree is a `generate` call, or a request to vLLM, of its own. An option that looks at single tokens,
or at the whole path so far, does on trees what it does in GRPO. One that counts from the start of a call would not.

Every option of transformers' `GenerationConfig` and of vLLM's `SamplingParams` is in one of the tables, which a test
holds complete. What a configuration asks for and trees cannot do is an error. What merely comes with a model, in its
own generation config, is left out when trees are grown, with a warning if it would have changed the samples.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from transformers import GenerationConfig, SynthIDTextWatermarkingConfig


class Reason(NamedTuple):
    """Why an option is not the user's to set, what to do instead, and the values that change nothing."""

    reason: str
    fix: str = "remove it"
    harmless: tuple[Any, ...] = ()


_LENGTH = Reason("the tree decides how long a segment is", "set segment_length and max_depth")
_SIBLINGS = Reason("siblings are sampled independently, one at a time", harmless=(0, 1, False))
_CACHE = Reason("only the default cache can be forked")
_OUTPUT = Reason("trees read the sampled tokens alone", harmless=(False,))
_SPECULATION = Reason("speculative decoding takes one row at a time", harmless=(False,))
_ANEW = "it would begin anew at each segment"

RIGHT = {
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens"),
    *("renormalize_logits", "remove_invalid_values", "min_length", "forced_bos_token_id", "stop_strings"),
    *("watermarking_config", "pad_token_id", "bos_token_id", "eos_token_id"),
    # Counted from the start, or to the end, of the completion: see growth/backends/options.py.
    *("min_new_tokens", "begin_suppress_tokens", "forced_eos_token_id", "exponential_decay_length_penalty"),
    # Without effect where an only row is sampled from a decoder, as in GRPO.
    *("early_stopping", "length_penalty", "decoder_start_token_id", "compile_config", "continuous_batching_config"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    *("speculation_type", "transformers_version"),
}
TREE_SETS = {
    "max_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "num_return_sequences": Reason(_SIBLINGS.reason, "set branching_factor", (1,)),
    "do_sample": Reason("without sampling, all siblings would be the same", harmless=(True,)),
    "use_cache": Reason("trees are grown on the cache", harmless=(True,)),
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "prefill_chunk_size": Reason("a prompt is prefilled once, as a whole"),
    "disable_compile": Reason("TRL sets it"),
    "return_dict_in_generate": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
}
REFUSED = {
    "max_time": Reason(f"{_ANEW}, and a segment cut short would pass for a whole one"),
    "num_beams": _SIBLINGS,
    "num_beam_groups": _SIBLINGS,
    "diversity_penalty": _SIBLINGS,
    "constraints": _SIBLINGS,
    "force_words_ids": _SIBLINGS,
    "penalty_alpha": _SIBLINGS,
    "low_memory": _SIBLINGS,
    "dola_layers": Reason("it replaces the distribution that is trained by another"),
    "guidance_scale": Reason(f"its unconditional branch has no prompt, and {_ANEW}", harmless=(1,)),
    "encoder_repetition_penalty": Reason(
        "it would take the path above a segment for the prompt", "use repetition_penalty", (1,)
    ),
    "encoder_no_repeat_ngram_size": Reason(
        "it would take the path above a segment for the prompt", "use no_repeat_ngram_size", (0,)
    ),
    "token_healing": Reason("it would rewrite the last token above each segment", harmless=(False,)),
    "use_mtp": _SPECULATION,
    "prompt_lookup_num_tokens": _SPECULATION,
    "assistant_early_exit": _SPECULATION,
}

_COUNTS_SEGMENT = Reason("vLLM would count the tokens of one segment, not of its path", "use repetition_penalty", (0,))
_LOGPROBS = Reason("trees keep the log-probabilities of the sampled tokens, and no others")
_TRL_SETS = Reason("TRL sets it")
_INTERNAL = Reason("vLLM sets it itself")
_UNSEEN = Reason("what reads it sees each segment as a request of its own")

VLLM_RIGHT = {
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids"),
    *("stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"),
    *("include_stop_str_in_output", "detokenize", "skip_reading_prefix_cache", "routed_experts_prompt_start"),
}
VLLM_TREE_SETS = {
    "n": Reason(_SIBLINGS.reason, "set branching_factor", (1,)),
    "max_tokens": _LENGTH,
    "logprobs": _LOGPROBS,
    "flat_logprobs": Reason("TRL reads log-probabilities as vLLM gives them by default", harmless=(False,)),
    "output_kind": _INTERNAL,
    "stream_interval": _INTERNAL,
    "skip_clone": _INTERNAL,
    "output_text_buffer_length": _INTERNAL,
}
VLLM_REFUSED = {
    "min_tokens": Reason("vLLM would count the tokens of one segment, not of its path", harmless=(0,)),
    "seed": Reason("it would draw all siblings alike", "remove it, and set the seed of the run", (-1,)),
    "presence_penalty": _COUNTS_SEGMENT,
    "frequency_penalty": _COUNTS_SEGMENT,
    "bad_words": Reason("vLLM looks for them within one segment, not across", "use logit_bias", ([],)),
    "structured_outputs": Reason(_ANEW),
    "thinking_token_budget": Reason(_ANEW),
    "repetition_detection": Reason(f"{_ANEW}, and what it cuts short would pass for a whole completion"),
    "trace_decode_token_ids": Reason(_ANEW),
    "watermarking": Reason("vLLM draws from the context, so all siblings would be alike", harmless=(False,)),
    "prompt_logprobs": _LOGPROBS,
    "prompt_logprob_token_ids": _LOGPROBS,
    "prompt_logprob_start": _LOGPROBS,
    "logprob_token_ids": _LOGPROBS,
    "extra_args": _UNSEEN,
}
# What requests to a server may have besides.
SERVER_RIGHT = {"user", "priority", "cache_salt", "session_id", "add_special_tokens", "length_penalty"}
SERVER_REFUSED = {
    "truncate_prompt_tokens": Reason("it would cut the path that a segment continues"),
    "truncation_side": Reason("it would cut the path that a segment continues"),
    "response_format": Reason(_ANEW),
    "use_beam_search": Reason(_SIBLINGS.reason, harmless=(False,)),
    "suffix": Reason("trees continue what is above a segment alone"),
    "request_id": Reason("each segment is a request of its own"),
    "echo": Reason("trees read the sampled tokens alone", harmless=(False,)),
    "prompt_embeds": _TRL_SETS,
    "model": _TRL_SETS,
    "prompt": _TRL_SETS,
    "stream": _TRL_SETS,
    "stream_options": _TRL_SETS,
    "return_token_ids": _TRL_SETS,
    "return_tokens_as_token_ids": _TRL_SETS,
    "return_token_offsets": _TRL_SETS,
    "kv_transfer_params": _UNSEEN,
    "ec_transfer_params": _UNSEEN,
    "vllm_xargs": _UNSEEN,
}


def check_generation_kwargs(config: Any) -> None:
    """Check the generation options of a configuration.

    Args:
        config: A TreeRPOConfig, whose generation_kwargs is a dict or None.

    Raises:
        ValueError: One of them is the tree's to set, or does not work on trees; the message says what to do instead.

    Warns:
        UserWarning: GenerationConfig does not know one of them, so it is without effect.
    """
    kwargs = config.generation_kwargs or {}
    refused: Mapping[str, Reason] = TREE_SETS | REFUSED
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


def check_generation_options(config: Any, own: GenerationConfig, eos_token_ids: Sequence[int]) -> None:
    """Check the options that come with a model, and those of a configuration that must fit the model.

    Args:
        config: A TreeRPOConfig.
        own: The model's own generation config, from which come the options that a configuration leaves open.
        eos_token_ids: Every token that ends a completion.

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
    _warn_of_own({name: value for name, value in vars(own).items() if kwargs.get(name) is None}, REFUSED)
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
def options_on_trees(model: Any, generation_config: GenerationConfig) -> Iterator[GenerationConfig]:
    """The options to grow trees with: those given, then those of the model's own that are right on trees.

    Within the context the model has none of its own, as `generate` would fill in what a call leaves open.

    Args:
        model: The model that samples, or a PEFT model around it.
        generation_config: What TRL samples with. It stays as it is.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = model.generation_config
    left_out = [name for name, value in vars(own).items() if name in TREE_SETS or _why_not(name, value, REFUSED)]
    kept = {name: value for name, value in own.to_dict().items() if name not in left_out}
    options = copy.deepcopy(generation_config)
    options.update(**kept, defaults_only=True, allow_custom_entries=True)  # as `generate` does
    model.generation_config = GenerationConfig()
    try:
        yield options
    finally:
        model.generation_config = own


def _why_not(name: str, value: Any, refused: Mapping[str, Reason]) -> Reason | None:
    """The reason against an option that has this value, if there is one."""
    if isinstance(value, SynthIDTextWatermarkingConfig):
        return Reason(f"it remembers contexts, and {_ANEW}", "use a WatermarkingConfig")
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
