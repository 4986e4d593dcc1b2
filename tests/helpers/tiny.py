"""A tiny model and its tokenizer, made in code, and rewards for what it says."""

import random
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from treerpo_trl.growth import TreeShape


CHARACTERS = "0123456789+-=\n abcdefgh"
PAD, EOS = 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def make_tokenizer(pad_is_eos: bool = False, tokens: Sequence[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character; unknown characters become `<pad>`."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        eos_token="<eos>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(**overrides) -> Qwen2Config:
    sizes = {
        "vocab_size": len(CHARACTERS) + 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    return Qwen2Config(**{**sizes, **overrides})


# For tests of vLLM, whose attention on CPUs needs heads of 32.
VLLM_SHAPE = TreeShape((2, 3, 2), 8, 22)
# What bfloat16, in which vLLM runs on a CPU, makes of a log-probability of this model, at most.
VLLM_ROUNDING = 0.25
# The last token has a delimiter inside.
VLLM_TOKENS = (*CHARACTERS[:-1], "b\n\nh")


def spread(text: str) -> float:
    """A deterministic pseudo-random number in [0, 1] for a text."""
    return random.Random(text).random()


def spread_reward(completions, **kwargs) -> list[float]:
    """A reward in [0, 1] that tells any two completions apart."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [spread(text) for text in texts]


def coin_reward(completions, **kwargs) -> list[float]:
    """A reward of 0 or 1, so that siblings often tie."""
    return [float(reward > 0.5) for reward in spread_reward(completions)]
