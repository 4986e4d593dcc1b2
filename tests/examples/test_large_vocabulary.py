"""The head of a large vocabulary on a CPU: made faster, it gives the same numbers."""

import large_vocabulary
import pytest
import torch
import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head


@pytest.fixture
def model(monkeypatch):
    """A small Llama of a large vocabulary with frozen weights and adapters; TRL's tiles are put back at the end."""
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", chunked_logprob.TOKEN_CHUNK_SIZE)
    name = "_CHUNKED_LOGPROB_CHUNK_SIZE"
    monkeypatch.setattr(trl.trainer.utils, name, getattr(trl.trainer.utils, name))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12_000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    return model.eval()


def logps_and_gradients(model, ids):
    """As GRPOTrainer's loss computes them."""
    model.zero_grad()
    outputs = model(input_ids=ids, labels=ids, fused_lm_head=True)
    outputs.log_probs.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    return outputs.log_probs.detach(), gradients


def generate(model, ids):
    torch.manual_seed(0)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=True)


def test_training_and_sampling_give_the_same_numbers(model):
    ids = torch.randint(2, 12_000, (3, 400))
    logps, gradients = logps_and_gradients(model, ids)
    sampled = generate(model, ids)
    large_vocabulary.speed_up_head(model)
    assert chunked_logprob.TOKEN_CHUNK_SIZE == 512
    faster_logps, faster_gradients = logps_and_gradients(model, ids)
    torch.testing.assert_close(faster_logps, logps)
    torch.testing.assert_close(faster_gradients, gradients)
    assert torch.equal(generate(model, ids), sampled)


def test_the_input_of_the_head_is_contiguous_and_its_tiles_are_used(model, monkeypatch):
    large_vocabulary.speed_up_head(model)
    are_contiguous, tiles = [], set()
    model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: are_contiguous.append(inputs[0].is_contiguous())
    )
    ids = torch.randint(2, 12_000, (3, 400))
    generate(model, ids)
    assert len(are_contiguous) == 8 and all(are_contiguous)
    forward_tile = chunked_logprob._forward_tile

    def record(tile, *args, **kwargs):
        tiles.add(tuple(tile.shape))
        return forward_tile(tile, *args, **kwargs)

    monkeypatch.setattr(chunked_logprob, "_forward_tile", record)
    logps_and_gradients(model, ids)
    assert max(rows for rows, _ in tiles) == 512 and max(columns for _, columns in tiles) == 1024


def test_a_small_vocabulary_keeps_trls_tiles(model):
    model.config.vocab_size = 100
    before = chunked_logprob.TOKEN_CHUNK_SIZE
    large_vocabulary.speed_up_head(model)
    assert before == chunked_logprob.TOKEN_CHUNK_SIZE and not model.get_output_embeddings()._forward_pre_hooks
