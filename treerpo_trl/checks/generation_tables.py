"""Every option of `generate` and of vLLM's sampling: right on trees, set by the tree, or refused, with the reason."""

from __future__ import annotations

from typing import Any, NamedTuple


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
ANEW = "it would begin anew at each segment"

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
    "max_time": Reason(f"{ANEW}, and a segment cut short would pass for a whole one"),
    "num_beams": _SIBLINGS,
    "num_beam_groups": _SIBLINGS,
    "diversity_penalty": _SIBLINGS,
    "constraints": _SIBLINGS,
    "force_words_ids": _SIBLINGS,
    "penalty_alpha": _SIBLINGS,
    "low_memory": _SIBLINGS,
    "dola_layers": Reason("it replaces the distribution that is trained by another"),
    "guidance_scale": Reason(f"its unconditional branch has no prompt, and {ANEW}", harmless=(1,)),
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

# Beside these, where segments end anywhere, so that rows of different lengths are decoded together.
_OWN_LENGTH = Reason(
    "it counts tokens, and rows that continue segments of any length are decoded together",
    "remove it, or set split_rule='length' (without tools)",
)
UNEVEN_REFUSED = {
    "min_new_tokens": _OWN_LENGTH._replace(harmless=(0,)),
    "min_length": _OWN_LENGTH._replace(harmless=(0,)),
    "forced_eos_token_id": _OWN_LENGTH,
    "exponential_decay_length_penalty": _OWN_LENGTH,
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
    "structured_outputs": Reason(ANEW),
    "thinking_token_budget": Reason(ANEW),
    "repetition_detection": Reason(f"{ANEW}, and what it cuts short would pass for a whole completion"),
    "trace_decode_token_ids": Reason(ANEW),
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
    "response_format": Reason(ANEW),
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
