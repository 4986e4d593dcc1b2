"""Tokenizers with one token a character, and Llamas small enough to train on a CPU in minutes."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"


def make_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token a character. A character outside the vocabulary is an error, never silently lost."""
    vocabulary = {token: index for index, token in enumerate([PAD_TOKEN, EOS_TOKEN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    # "." would not match the newline, and an unmatched character would be glued to the next one.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, context_length: int = 128) -> LlamaForCausalLM:
    """A fresh Llama of about a third of a million parameters.

    Llama, because its config does not name a tokenizer class: `AutoTokenizer` on a folder that says `qwen2` would load
    Qwen2's tokenizer over this one and lose the newline.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
