"""What the tests share: a tiny model and tokenizer made in code, and random trees."""

import os
import random
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from byte_llama import save_tiny_llama
from datasets import Dataset
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from treerpo_trl import TreeRPOConfig
from treerpo_trl.growth import Backend, Delimiters, ForkShape, Shape, TreeShape, Wave, grow
from treerpo_trl.tree import Segment, Tree


# Random cases on a developer's machine, the same ones in CI.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")

# A process that is killed while it compiles leaves a lock, for which every later one waits for ever. So what DeepSpeed
# compiles is shared with the processes that the tests start, and with no other run of the tests.
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    _extensions = tempfile.TemporaryDirectory(prefix="torch-extensions-")
    os.environ["TORCH_EXTENSIONS_DIR"] = _extensions.name

# Test processes side by side, and what they start, take a core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

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


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


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


@pytest.fixture
def dataset():
    """Prompts of one to several tokens."""
    rows = 32
    return Dataset.from_dict(
        {"prompt": ["7+" * (i % 4) + f"{i}=" for i in range(rows)], "answer": [str(i) for i in range(rows)]}
    )


@pytest.fixture
def make_args(tmp_path):
    """A configuration for a tiny CPU run: 8 leaves (2 x 2 x 2) of 4-token segments."""

    def make(**overrides) -> TreeRPOConfig:
        defaults = {
            "output_dir": str(tmp_path / "out"),
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
        return TreeRPOConfig(**{**defaults, **overrides})

    return make


# For tests of vLLM, whose attention on CPUs needs heads of 32.
VLLM_SHAPE = TreeShape((2, 3, 2), 8, 22)
# What bfloat16, in which vLLM runs on a CPU, makes of a log-probability of this model, at most.
VLLM_ROUNDING = 0.25
# The last token has a delimiter inside.
VLLM_TOKENS = (*CHARACTERS[:-1], "b\n\nh")


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


def plan(shape: Shape, trees: Sequence[Tree], wave: int) -> tuple[list[Tree], Wave]:
    """The plan of a wave for whole trees."""
    depth = min(wave, shape.max_depth)
    nodes = [
        (index, node)
        for index, tree in enumerate(trees)
        for node in range(len(tree.nodes))
        if tree.depths[node] == depth or (shape.plans_whole_trees and wave)
    ]
    return shape.plan(trees, wave, nodes)


class RandomBackend(Backend):
    """Segments from a random generator: some end, some are full, some are cut short (`short_probability`)."""

    def __init__(self, seed: int, end_probability: float, short_probability: float = 0.1):
        self.random = random.Random(seed)
        self.end_probability = end_probability
        self.short_probability = short_probability

    def extend(self, trees, wave) -> list[list[Segment]]:
        return [[self._draw(most) for _ in range(wave.num_children)] for most in wave.max_tokens]

    def _draw(self, max_tokens: int) -> Segment:
        ended = self.random.random() < self.end_probability
        is_short = ended or self.random.random() < self.short_probability
        length = self.random.randint(1, max_tokens) if is_short else max_tokens
        ids = tuple(self.random.randint(2, 9) for _ in range(length))
        return Segment(ids, ended, uncertainties=tuple(float(token % 5) for token in ids))


@st.composite
def shapes(draw, max_depth: int = 3, max_branching: int = 3, min_branching: int = 2) -> TreeShape:
    branching = draw(st.lists(st.integers(min_branching, max_branching), min_size=1, max_size=max_depth))
    segment_length = draw(st.integers(1, 4))
    shorter = draw(st.integers(0, segment_length - 1))
    return TreeShape(tuple(branching), segment_length, len(branching) * segment_length - shorter)


@st.composite
def forests(draw, min_branching: int = 2, most: int = 3) -> tuple[TreeShape, list[Tree]]:
    """A shape and one to three (`most`) random trees grown to it."""
    shape = draw(shapes(min_branching=min_branching))
    prompts = draw(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=3), min_size=1, max_size=most))
    backend = RandomBackend(draw(st.integers(0, 10_000)), draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])))
    return shape, grow(prompts, shape, backend)


@st.composite
def fork_shapes(draw) -> ForkShape:
    trunks, forks, width, rounds = (draw(st.integers(1, most)) for most in (2, 3, 2, 2))
    return ForkShape(trunks, forks, width, rounds, draw(st.integers(1, 2)), draw(st.integers(1, 9)))


@st.composite
def delimited_shapes(draw) -> TreeShape:
    """Segments end anywhere; a path may be full above depth D."""
    shape = draw(shapes())
    return replace(shape, max_completion_length=draw(st.integers(1, 12)), delimiters=Delimiters(("\n",), 1))


@st.composite
def any_forests(draw, most: int = 3) -> tuple[Shape, list[Tree]]:
    """A shape of any split rule and one to three (`most`) random trees grown to it."""
    shape = draw(st.one_of(shapes(), delimited_shapes(), fork_shapes()))
    prompts = draw(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=3), min_size=1, max_size=most))
    is_even = isinstance(shape, TreeShape) and shape.delimiters is None
    ends, short = draw(st.sampled_from([0.0, 0.2, 0.6])), 0.1 if is_even else 0.7
    backend = RandomBackend(draw(st.integers(0, 10_000)), ends, short)
    return shape, grow(prompts, shape, backend)


def leaf_rewards(tree: Tree, rewards: Sequence[float | None]) -> dict[int, float | None]:
    """Rewards of the leaves in depth-first order, repeated as needed."""
    return {leaf: rewards[index % len(rewards)] for index, leaf in enumerate(tree.leaves)}
