"""Tiny random models of many families, with TRL's fused head, and random rows that share prefixes."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from random_trees import RandomBackend
from tiny import EOS, PAD
from torch import Tensor
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    CTRLConfig,
    DeepseekV3Config,
    DogeConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)
from trl.trainer.utils import add_fused_lm_head

from treerpo_trl.growth import Delimiters, ForkShape, Shape, TreeShape, grow


TEMPERATURE = 0.7
VOCABULARY = 24
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
SIZES = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GPT_SIZES = {**SPECIAL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
WINDOW = 5  # shorter than most rows

# Families whose prefixes can be shared.
FAMILIES: dict[str, Callable[[], object]] = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **SIZES, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**SIZES, sliding_window=WINDOW),
    "gpt2": lambda: GPT2Config(**GPT_SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": lambda: GPTNeoXConfig(**{**SIZES, "hidden_dropout": 0.0}),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8, moe_intermediate_size=24, num_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(  # it leaves the window to the mask
        **SIZES, **EXPERTS, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=4,
        use_sliding_window=True, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "afmoe": lambda: AfmoeConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        moe_intermediate_size=24, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=12,
    ),
}  # fmt: skip
MIXTURES = ("qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "afmoe")

# Families whose prefixes cannot be shared, or not exactly.
OTHERS: dict[str, Callable[[], object]] = {
    "qwen3_next": lambda: Qwen3NextConfig(
        **SIZES, **EXPERTS, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
        moe_intermediate_size=24, shared_expert_intermediate_size=24,
    ),
    "mamba": lambda: MambaConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, state_size=4),
    "bloom": lambda: BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "gptj": lambda: GPTJConfig(**GPT_SIZES, rotary_dim=4, resid_pdrop=0.0),
    "llama4": lambda: Llama4TextConfig(
        **SIZES, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=6, num_local_experts=2
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES, head_dim=8, sliding_window=WINDOW, num_local_experts=4),
    "opt": lambda: OPTConfig(
        **SPECIAL, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, init_std=0.2, dropout=0.0,
    ),
    "gemma3_bidirectional": lambda: Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True),
    "phimoe": lambda: PhimoeConfig(**SIZES, num_local_experts=4, sliding_window=20),
    "doge": lambda: DogeConfig(**SIZES, keep_window_size=20),
    "doge_window": lambda: DogeConfig(**SIZES, sliding_window=20),
    "ctrl": lambda: CTRLConfig(**{**GPT_SIZES, "dff": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}  # fmt: skip

# Families that keep more than keys and values of what they have read, or less.
STATEFUL: dict[str, Callable[[], object]] = {
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(  # offsets of positions, on the model
        text_config={**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32},
        image_token_id=20, video_token_id=21, vision_start_token_id=22, vision_end_token_id=23,
    ),
    "gemma3n": lambda: Gemma3nTextConfig(  # layers that read the keys and values of others
        **{**SIZES, "num_hidden_layers": 4}, head_dim=8, sliding_window=WINDOW, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
    ),
    "minimax": lambda: MiniMaxConfig(  # a linear state beside the layers of its cache
        **SIZES, head_dim=8, num_local_experts=4, block_size=4, layer_types=["full_attention", "linear_attention"]
    ),
    "granite_hybrid": lambda: GraniteMoeHybridConfig(  # convolutions and recurrent states in layers of its cache
        **SIZES, layer_types=["mamba", "attention"], num_local_experts=4, shared_intermediate_size=24, mamba_n_heads=4,
        mamba_d_head=16, mamba_d_state=4, mamba_chunk_size=8,
    ),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(  # recurrent states on the model
        **{**SIZES, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16
    ),
    "mamba": OTHERS["mamba"],  # a cache of another name
    "openai_gpt": lambda: OpenAIGPTConfig(**GPT_SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),  # no cache
}  # fmt: skip


def make_sampler(family: str) -> PreTrainedModel:
    """A random model of any family to sample from, sharp enough that its prefixes matter."""
    torch.manual_seed(0)
    config = {**FAMILIES, **OTHERS, **STATEFUL}[family]()
    auto = AutoModelForImageTextToText if family == "qwen2_5_vl" else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_model(family: str, dtype: torch.dtype = torch.float32, temperature: float = TEMPERATURE) -> PreTrainedModel:
    """A random model whose every parameter matters, with TRL's fused head. The same name gives the same weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**FAMILIES, **OTHERS}[family]()).to(dtype)
    if dtype == torch.float64 and family in MIXTURES:
        model.set_experts_implementation("eager")  # the grouped product knows no double precision
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases begin at 1 and 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    return model


@dataclass
class Rows:
    """A micro-batch: (B, L) tokens and mask, and (B, T) completion tokens that are asked for."""

    input_ids: Tensor
    attention_mask: Tensor
    needed: Tensor


def pad_rows(prompts: list[list[int]], completions: list[list[int]], needed: Callable[[Tensor], Tensor]) -> Rows:
    """Prompts padded on the left, completions on the right, as TRL does. `needed` maps real (B, T) to needed."""
    left, right = max(map(len, prompts)), max(map(len, completions))
    pairs = list(zip(prompts, completions, strict=True))
    ids = [[PAD] * (left - len(p)) + p + c + [PAD] * (right - len(c)) for p, c in pairs]
    mask = [[0] * (left - len(p)) + [1] * (len(p) + len(c)) + [0] * (right - len(c)) for p, c in pairs]
    attention_mask = torch.tensor(mask)
    return Rows(torch.tensor(ids), attention_mask, needed(attention_mask[:, left:].bool()))


# Which tokens are asked for, by the name of the case.
NEEDED: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda real: real,
    "none": torch.zeros_like,
    "some_rows": lambda real: real & (torch.rand(len(real), 1) < 0.4),
    "some_tokens": lambda real: real & (torch.rand(real.shape) < 0.3),
    "late_tokens": lambda real: real & (torch.arange(real.size(1)) >= real.size(1) // 2),
}


RULES = ("length", "delimiter", "uncertainty")


def random_shape(draw: random.Random, rule: str) -> Shape:
    """When trees of a split rule branch."""
    if rule == "uncertainty":
        return ForkShape(*(draw.randint(1, most) for most in (3, 3, 2, 2, 2)), draw.randint(4, 16))
    branching = tuple(draw.randint(2, 3) for _ in range(draw.randint(1, 3)))
    segment_length = draw.randint(1, 5)
    shape = TreeShape(branching, segment_length, len(branching) * segment_length - draw.randrange(segment_length))
    return replace(shape, delimiters=Delimiters(("\n",), 1)) if rule == "delimiter" else shape


def random_rows(seed: int, needed: str = "all", shuffled: bool = False, rule: str = "length") -> Rows:
    """The rows of one to three random trees: early ends, repeats, prompts of several lengths."""
    draw = random.Random(seed)
    shape = random_shape(draw, rule)
    prompts = [[draw.randint(2, 9) for _ in range(draw.randint(1, 7))] for _ in range(draw.randint(1, 3))]
    short = 0.7 if rule == "delimiter" else 0.1
    trees = grow(prompts, shape, RandomBackend(seed, draw.choice([0.0, 0.2, 0.6]), short))
    rows = [(list(tree.prompt_ids), list(tree.completion_ids(leaf))) for tree in trees for leaf in shape.slots(tree)]
    if shuffled:
        draw.shuffle(rows)
    torch.manual_seed(seed)
    return pad_rows([prompt for prompt, _ in rows], [completion for _, completion in rows], NEEDED[needed])


def full_tree_rows(num_trees: int, depth: int, length: int, seed: int = 0) -> Rows:
    """Binary trees without early ends, whose prompts and segments have one length."""
    draw = random.Random(seed)
    prompts, completions = [], []

    def descend(prompt, path, left):
        if left == 0:
            prompts.append(prompt)
            completions.append(path)
            return
        for _ in range(2):
            descend(prompt, path + [draw.randint(2, VOCABULARY - 1) for _ in range(length)], left - 1)

    for _ in range(num_trees):
        descend([draw.randint(2, VOCABULARY - 1) for _ in range(length)], [], depth)
    return pad_rows(prompts, completions, NEEDED["all"])


def dense(model: PreTrainedModel, rows: Rows, **options) -> SimpleNamespace:
    """What TRL computes row by row: (B, T) log-probabilities and entropies, and the load-balancing loss."""
    width = rows.needed.size(1)
    labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
    labels[:, :-width] = -100
    outputs = model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=labels, fused_lm_head=True, **options
    )
    return SimpleNamespace(
        log_probs=outputs.log_probs[:, -width:], entropy=outputs.entropy[:, -width:], aux_loss=outputs.aux_loss
    )
