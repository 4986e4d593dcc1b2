"""Sampling with forked caches: the same draws as prefilling every prefix, each token computed once."""

import warnings
from dataclasses import replace

import pytest
import torch
from tiny import EOS, PAD, make_tokenizer, tiny_config
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
)

from treerpo_trl.growth import TreeShape, Wave, grow
from treerpo_trl.growth.backends import TransformersBackend
from treerpo_trl.tree import ROOT, Tree


SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "mistral_sliding_window": MistralConfig(**SIZES, sliding_window=5),
    "gpt2": GPT2Config(
        vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=PAD, eos_token_id=EOS,
        bos_token_id=None, initializer_range=0.3,
    ),
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 5]]


def make_backend(model, max_rows=64, fork_caches=True, pad=PAD, tokenizer=None, **options) -> TransformersBackend:
    config = GenerationConfig(
        **{"do_sample": False, "eos_token_id": [EOS], "pad_token_id": pad, "disable_compile": True, **options}
    )
    return TransformersBackend(model, config, [EOS], pad, max_rows, tokenizer, fork_caches)


def grow_trees(model, shape, prompts=PROMPTS, seed=0, **options):
    torch.manual_seed(seed)
    with torch.no_grad():
        return grow(prompts, shape, make_backend(model, **options))


@pytest.fixture(params=[*FAMILIES, "qwen2"])
def family(request):
    torch.manual_seed(0)
    config = FAMILIES.get(request.param) or tiny_config(initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()


def count_positions(model):
    """Record the width x rows of every forward."""
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return calls


SHAPE = TreeShape((2, 3, 2), 4, 12)


def test_forked_equals_prefilled_when_greedy(family):
    assert grow_trees(family, SHAPE) == grow_trees(family, SHAPE, fork_caches=False)


@pytest.mark.parametrize("seed", range(3))
def test_forked_equals_prefilled_when_sampling(family, seed):
    """Same random numbers, same probabilities, same tokens; some branches end early."""
    prompts = PROMPTS * 2
    forked = grow_trees(family, SHAPE, prompts, seed=seed, do_sample=True, temperature=2.0)
    prefilled = grow_trees(family, SHAPE, prompts, seed=seed, do_sample=True, temperature=2.0, fork_caches=False)
    assert forked == prefilled
    assert any(len(tree.leaves) < SHAPE.num_leaves for tree in forked)


def test_each_token_is_computed_once(model):
    """A sampled token costs one position; a prompt costs its tokens but the last, which its children are fed."""
    calls = count_positions(model)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 5]]
    trees = grow_trees(model, SHAPE, prompts, do_sample=True, suppress_tokens=[EOS])
    assert all(len(tree.leaves) == SHAPE.num_leaves for tree in trees)  # so no row idles while others go on
    sampled = sum(tree.num_sampled_tokens for tree in trees)
    assert sum(calls) == sampled + sum(len(prompt) - 1 for prompt in prompts)
    assert calls[0] == 2 * 3  # both prompts are prefilled at once, each once
    flat = sum(SHAPE.num_leaves * (len(prompt) + SHAPE.max_completion_length - 1) for prompt in prompts)
    assert sum(calls) < 0.6 * flat


def nested(tree: Tree, index: int = 0) -> tuple:
    """A tree whatever the order in which its nodes were drawn."""
    return replace(tree.nodes[index], parent=0), tuple(nested(tree, child) for child in tree.children[index])


@pytest.mark.parametrize("max_rows", [1, 3, 5, 64])
def test_rows_decoded_at_a_time_do_not_change_greedy_trees(model, max_rows):
    trees, others = (grow_trees(model, SHAPE, max_rows=rows) for rows in (max_rows, 64))
    assert [nested(tree) for tree in trees] == [nested(tree) for tree in others]


@pytest.mark.parametrize("max_rows", [1, 4, 6, 64])
def test_caches_of_no_more_branches_wait_than_fit(model, max_rows):
    """Of each depth those of one block, and of the last depth none."""
    held = []

    class Watched(TransformersBackend):
        def extend(self, trees, wave):
            segments = super().extend(trees, wave)
            blocks = {id(block): block for block, _ in self._places.values()}
            held.append(sum(len(block.input_ids) for block in blocks.values()))
            return segments

    config = GenerationConfig(do_sample=True, suppress_tokens=[EOS], eos_token_id=[EOS], pad_token_id=PAD)
    backend = Watched(model, config, [EOS], PAD, max_rows, fork_caches=True)
    with torch.no_grad():
        trees = grow([[5, 6, 7], [8, 9, 10], [5, 9]], SHAPE, backend)
    assert all(len(tree.leaves) == SHAPE.num_leaves for tree in trees) and not backend._places
    assert max(held) <= (SHAPE.max_depth - 1) * max(max_rows, *SHAPE.branching)
    if max_rows == 64:
        assert max(held) == 3 * SHAPE.num_leaves // SHAPE.branching[-1]


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_never_more_rows_than_allowed(model, max_rows):
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].size(0)), with_kwargs=True
    )
    grow_trees(model, SHAPE, do_sample=True, max_rows=max_rows)
    assert max(sizes) <= max_rows


def test_rows_that_ended_are_let_go(model):
    """Caches of finished branches must not stay in memory behind the views of the others."""
    backend = make_backend(model, do_sample=True, temperature=2.0)
    torch.manual_seed(0)
    with torch.no_grad():
        tree = Tree.from_prompt(PROMPTS[0])
        (segments,) = backend.extend([tree], Wave(((0, ROOT),), 16, (6,), is_last=False))
    alive = sum(not segment.ended for segment in segments)
    assert 0 < alive < 16
    (block, _), *_ = backend._places.values()
    stored = [
        tensor.untyped_storage().nbytes() for layer in block.cache.layers for tensor in (layer.keys, layer.values)
    ]
    row = 2 * 8 * 4 * (len(PROMPTS[0]) + 6 - 1)  # heads x size x bytes x positions
    assert stored == [alive * row] * 4


def test_pad_that_equals_eos_ends_segments_once(model):
    padded = grow_trees(model, SHAPE, do_sample=True, seed=1)
    as_eos = grow_trees(model, SHAPE, do_sample=True, seed=1, pad=EOS)
    assert [tree.nodes for tree in padded] == [tree.nodes for tree in as_eos]
    nodes = [node for tree in padded for node in tree.nodes[1:]]
    assert any(node.ended for node in nodes)
    for node in nodes:
        assert node.ended == (node.token_ids[-1] == EOS)
        assert EOS not in node.token_ids[:-1]


def test_a_sampled_pad_token_does_not_end_a_segment(model):
    """The pad token is an ordinary token of a random model: only end-of-sequence tokens cut."""
    trees = grow_trees(model, SHAPE, do_sample=True, seed=2, temperature=3.0)
    inner = [node for tree in trees for node in tree.nodes[1:] if PAD in node.token_ids[:-1]]
    assert inner and all(len(node.token_ids) == 4 or node.ended for node in inner)


def test_every_eos_id_ends_a_segment(model):
    backend = make_backend(model, do_sample=True, eos_token_id=[EOS, 7, 8])
    backend.eos_token_ids = torch.tensor([EOS, 7, 8])
    with torch.no_grad():
        (tree,) = grow([[5, 6]], SHAPE, backend)
    ends = {node.token_ids[-1] for node in tree.nodes[1:] if node.ended}
    assert ends <= {EOS, 7, 8} and ends & {7, 8}
    assert all(not {EOS, 7, 8} & set(node.token_ids[:-1]) for node in tree.nodes[1:])


@pytest.mark.parametrize("fork_caches", [True, False])
def test_prompts_of_one_token(model, fork_caches):
    trees = grow_trees(model, SHAPE, [[5], [6]], fork_caches=fork_caches)
    assert trees == grow_trees(model, SHAPE, [[5], [6]], fork_caches=not fork_caches)


def test_a_prompts_tree_does_not_depend_on_its_neighbours_padding(model):
    together = grow_trees(model, SHAPE, PROMPTS)
    alone = [grow_trees(model, SHAPE, [prompt])[0] for prompt in PROMPTS]
    assert together == alone


def test_stop_strings_end_a_path(model):
    tokenizer = make_tokenizer()
    options = {"do_sample": True, "stop_strings": ["3", "ab"], "temperature": 2.0, "tokenizer": tokenizer}
    trees = grow_trees(model, TreeShape((4, 4), 6, 12), seed=3, **options)
    nodes = [node for tree in trees for node in tree.nodes[1:]]
    stopped = [tokenizer.decode(node.token_ids) for node in nodes if node.ended and node.token_ids[-1] != EOS]
    assert stopped and all(text.endswith(("3", "b")) for text in stopped)
    assert all("3" not in tokenizer.decode(node.token_ids[:-1]) for node in nodes)


def test_generation_options_keep_working(model):
    trees = grow_trees(model, SHAPE, do_sample=True, suppress_tokens=[5, 6, 7], repetition_penalty=1.5, top_k=5)
    assert not {5, 6, 7} & {token for tree in trees for node in tree.nodes[1:] for token in node.token_ids}


def test_sampling_leaves_the_model_and_its_config_alone(model):
    before = model.generation_config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grow_trees(model, SHAPE, do_sample=True)
    assert model.generation_config.to_dict() == before


def test_hybrid_models_fall_back_to_prefilling_with_one_warning():
    """A recurrent state cannot be forked with the keys and values; continuing without it would be silently wrong."""
    config = Qwen3NextConfig(
        **SIZES, layer_types=["linear_attention", "full_attention"], head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    hybrid = AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="cannot be forked.*not different") as caught:
        trees = grow_trees(hybrid, SHAPE, fork_caches=None)
    assert len([warning for warning in caught if "forked" in str(warning.message)]) == 1
    assert trees == grow_trees(hybrid, SHAPE, fork_caches=False)


def test_depth_one_draws_what_generate_draws(model_path):
    """D = 1 is GRPO's sampling: the same random state gives the same completions as `generate` on repeated prompts."""
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    prompt, shape = [5, 6, 7], TreeShape((8,), 6, 6)
    trees = grow_trees(model, shape, [prompt, prompt], do_sample=True, seed=4)
    drawn = [tree.completion_ids(leaf) for tree in trees for leaf in tree.leaves]
    torch.manual_seed(4)
    input_ids = torch.tensor([prompt] * 16)
    config = GenerationConfig(do_sample=True, max_new_tokens=6, eos_token_id=[EOS], pad_token_id=PAD)
    output = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    for completion, row in zip(drawn, output[:, 3:].tolist(), strict=True):
        assert row[: len(completion)] == completion
