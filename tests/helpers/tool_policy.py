"""A tiny chat model that calls tools: a random Llama whose next token leans on the last one, and whose vocabulary has
whole calls as tokens.

A turn is a call (one of `CALLS`) or an answer of a few digits. Which comes is drawn anew at every turn, so dialogues
have any number of turns, and of tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import trl
from byte_llama import make_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
DIGITS = "0123456789"
STRENGTH = 6.0  # nats


def call(name: str, **arguments: Any) -> str:
    """A call as the template writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


CALLS = [call("look_up", key=key) for key in "ab"]
BROKEN = '<tool_call>\n{"name": "look_up", "argum\n</tool_call>'
UNKNOWN = call("delete", key="a")
FAILING = call("look_up", key="missing")


def make_tool_tokenizer(calls: list[str]) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each call and each token of the template."""
    fast = make_byte_tokenizer()
    fast.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    fast.add_tokens([*calls, *fixed_texts(fast)])
    return fast


def fixed_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the template writes around the list of tools and around their answers: as tokens, dialogues stay short."""
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    messages = [{"role": "user", "content": "?"}]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    system = text.split("<|im_start|>")[1].split("<|im_end|>")[0]
    before, after = system.split(json.dumps(tool))
    return [before, after, "user\n<tool_response>\n", "\n</tool_response>", "user\n", "assistant\n"]


def make_tool_policy(
    calls: list[str] | None = None,
    call_share: float = 0.5,
    context_length: int = 2048,
    seed: int = 0,
    hidden_size: int = 32,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer; a turn is a call with that probability, roughly."""
    calls = CALLS if calls is None else calls
    tokenizer = make_tool_tokenizer(calls)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    leanings = [
        (
            ["assistant\n"],
            {**dict.fromkeys(calls, call_share / len(calls)), **dict.fromkeys(DIGITS, (1 - call_share) / 10)},
        ),
        (DIGITS, {"<|im_end|>": 0.6, **dict.fromkeys(DIGITS, 0.04)}),
        (calls, {"<|im_end|>": 1.0}),
    ]
    for dimension, (last, shares) in enumerate(leanings):
        # After the last norm, an embedding along one dimension is sqrt(hidden_size) there.
        row = torch.full((config.vocab_size,), -STRENGTH)
        for text, share in shares.items():
            row[tokenizer(text)["input_ids"][0]] = STRENGTH + torch.log(torch.tensor(share))
        model.lm_head.weight.data[:, dimension] = row / config.hidden_size**0.5
        for text in last:
            model.model.embed_tokens.weight.data[tokenizer(text)["input_ids"][0], dimension] = 10.0
    return model, tokenizer
