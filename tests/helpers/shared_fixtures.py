"""Fixtures of all tests: tiny models, data and configurations. `conftest.py` loads them where tests run."""

import pytest
import torch
from byte_llama import save_tiny_llama
from datasets import Dataset
from tiny import EOS, PAD, VLLM_ROUNDING, VLLM_SHAPE, VLLM_TOKENS, make_tokenizer, tiny_config
from transformers import Qwen2ForCausalLM

from treerpo_trl import TreeRPOConfig


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory) -> str:
    """A tiny random Llama on disk, whose tokenizer takes any text."""
    path = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(path)
    return str(path)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A tiny random Qwen2 on disk. It is sharp enough that its samples are not uniform."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(initializer_range=0.2))
    path = tmp_path_factory.mktemp("tiny-qwen2")
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def model(model_path):
    return Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def dataset():
    """Prompts of one to several tokens."""
    rows = 32
    return Dataset.from_dict(
        {"prompt": ["7+" * (i % 4) + f"{i}=" for i in range(rows)], "answer": [str(i) for i in range(rows)]}
    )


def tiny_args(output_dir: str, **overrides) -> TreeRPOConfig:
    """A configuration for a tiny CPU run: 8 leaves (2 x 2 x 2) of 4-token segments."""
    defaults = {
        "branching_factor": 2,
        "max_depth": 3,
        "segment_length": 4,
        "advantage_estimator": "treerpo",
        "per_device_train_batch_size": 16,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return TreeRPOConfig(output_dir, **{**defaults, **overrides})


@pytest.fixture
def make_args(tmp_path):
    """`tiny_args` with a folder of the test's own."""
    return lambda **overrides: tiny_args(**{"output_dir": str(tmp_path / "out"), **overrides})


@pytest.fixture(scope="session")
def vllm_model_path(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.2, hidden_size=128, head_dim=32, max_position_embeddings=512)
    path = tmp_path_factory.mktemp("tiny-qwen2-vllm")
    Qwen2ForCausalLM(config).save_pretrained(path)
    make_tokenizer(tokens=VLLM_TOKENS).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def vllm_reference(vllm_model_path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(vllm_model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def greedy_prompts(vllm_reference) -> list[list[int]]:
    """Prompts after which no greedy choice is close enough for rounding to turn it, one that ends early among them."""
    prompts = torch.randint(2, 25, (2048, 6), generator=torch.Generator().manual_seed(0))
    output = vllm_reference.generate(
        prompts, do_sample=False, max_new_tokens=VLLM_SHAPE.max_completion_length, output_logits=True,
        return_dict_in_generate=True, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    first, second = torch.stack(output.logits, dim=1).topk(2).values.unbind(-1)
    is_end = output.sequences[:, prompts.size(1) :] == EOS
    has_ended = is_end.cumsum(dim=1) - is_end.int() > 0
    is_clear = ((first - second) > 3 * VLLM_ROUNDING) | has_ended
    clear, ends = is_clear.all(dim=1), is_end.any(dim=1)
    return [*prompts[clear & ends][:1].tolist(), *prompts[clear & ~ends][:3].tolist()]
