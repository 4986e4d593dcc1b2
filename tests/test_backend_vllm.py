"""Trees grown by a real vLLM engine on a CPU, colocated with the trainer: `make test-vllm`.

What a CPU engine cannot do is take weights from the trainer. The trainer here starts with those that the engine has
loaded, and takes one step.
"""

import math
import os
from collections.abc import Iterator

import pytest
import torch
from conftest import EOS, VLLM_ROUNDING, VLLM_SHAPE, free_port, make_tokenizer, spread_reward
from datasets import Dataset
from transformers import GenerationConfig, Qwen2ForCausalLM

from treerpo_trl import Tree, TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.growth.backends import TransformersBackend, VLLMBackend, find_context_length
from treerpo_trl.tree import ROOT


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm makes an environment that has it")
pytestmark = pytest.mark.vllm

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("MASTER_PORT", str(free_port()))  # else the engine takes 29500, which others may have
BLOCK = 128  # tokens of a block of the prefix cache on a CPU
PROMPT = [7, 11, 5, 9, 13, 8, 20] * 30  # longer than a block


@pytest.fixture(scope="module")
def trainer(vllm_model_path, tmp_path_factory) -> TreeRPOTrainer:
    """A trainer and its engine, which takes half a minute to start."""
    tokenizer = make_tokenizer()
    dataset = Dataset.from_dict({"prompt": [f"{i}+" * 50 for i in range(10, 14)]})
    args = TreeRPOConfig(
        str(tmp_path_factory.mktemp("out")), branching_factor=[2, 2, 2], segment_length=4,
        per_device_train_batch_size=16, max_steps=1, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False, disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"}, use_vllm=True, vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=300, advantage_estimator="optimal_baseline",
    )  # fmt: skip
    return TreeRPOTrainer(vllm_model_path, spread_reward, args, train_dataset=dataset, processing_class=tokenizer)


@pytest.fixture
def generation(trainer) -> Iterator:
    """TRL's handle of the engine; what a test changes of it is undone."""
    generation = trainer.vllm_generation
    options = ("temperature", "generation_kwargs", "enable_sleep_mode", "_llm_weights_sleeping")
    before = {name: getattr(generation, name) for name in options}
    yield generation
    for name, value in before.items():
        setattr(generation, name, value)


@pytest.fixture
def requests(generation, monkeypatch) -> list[list[tuple[int, int]]]:
    """(tokens of the prefix, of these cached) of every request, a list a wave."""
    seen = []
    generate = generation.llm.generate

    def spy(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        seen.append([(len(output.prompt_token_ids), output.num_cached_tokens) for output in outputs])
        return outputs

    monkeypatch.setattr(generation.llm, "generate", spy)
    return seen


def check_laws(tree: Tree, shape: TreeShape) -> None:
    """What every backend's trees obey."""
    for index, node in enumerate(tree.nodes):
        depth = tree.depths[index]
        is_final = node.ended or depth == shape.max_depth
        assert len(tree.children[index]) == (0 if is_final else shape.branching[depth])
        if index == ROOT:
            continue
        assert node.ended == (node.token_ids[-1] == EOS)
        assert EOS not in node.token_ids[:-1]
        assert len(node.token_ids) == len(node.logprobs)
        most = min(shape.segment_length, shape.max_completion_length - tree.lengths[node.parent])
        assert len(node.token_ids) <= most
        assert node.ended or len(node.token_ids) == most


def test_trees_obey_the_laws_of_trees(generation):
    prompts = [PROMPT, [9, 10], PROMPT[::-1], [5]]
    trees = grow(prompts, VLLM_SHAPE, VLLMBackend(generation, [EOS]))
    assert [list(tree.prompt_ids) for tree in trees] == prompts
    for tree in trees:
        check_laws(tree, VLLM_SHAPE)
    nodes = [node for tree in trees for node in tree.nodes]
    assert any(node.ended for node in nodes)
    assert len({tree.completion_ids(leaf)[0] for tree in trees for leaf in tree.leaves}) > 2  # they were sampled
    assert generation.max_completion_length == 12  # evaluation's, untouched


def logprobs_of(model, tree: Tree, leaf: int, temperature: float) -> torch.Tensor:
    """Log-probabilities of a leaf's completion, in one forward pass."""
    completion = torch.tensor(tree.completion_ids(leaf))
    ids = torch.cat([torch.tensor(tree.prompt_ids), completion])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(tree.prompt_ids) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def test_logprobs_are_those_of_the_model(generation, vllm_reference, vllm_model_path):
    """At the temperature of sampling, and as close to those in float32 as transformers' are in the engine's type."""
    rounded = Qwen2ForCausalLM.from_pretrained(vllm_model_path, dtype=torch.bfloat16).eval()
    generation.temperature = 0.7
    trees = grow([PROMPT, [9, 10]], VLLM_SHAPE, VLLMBackend(generation, [EOS]))
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    exact = torch.cat([logprobs_of(vllm_reference, tree, leaf, 0.7) for tree, leaf in leaves])
    errors = (torch.cat([torch.tensor(tree.completion_logprobs(leaf)) for tree, leaf in leaves]) - exact).abs()
    rounding = (torch.cat([logprobs_of(rounded, tree, leaf, 0.7) for tree, leaf in leaves]) - exact).abs()
    assert errors.mean() < 2 * rounding.mean()
    assert errors.max() < 3 * rounding.max()


def test_score_norms_are_estimated_from_the_logprobs(generation, vllm_reference):
    """(1 - p)^2 by token, which is between half and all of 1 - 2 p + sum_v p_v^2."""
    trees = grow([PROMPT, [9, 10]], VLLM_SHAPE, VLLMBackend(generation, [EOS]))
    for tree in trees:
        for node in tree.nodes[1:]:
            assert node.score_norm == pytest.approx(sum((1 - math.exp(logprob)) ** 2 for logprob in node.logprobs))
    estimated = exact = 0.0
    for tree in trees:
        for leaf in tree.leaves:
            ids = [*tree.prompt_ids, *tree.completion_ids(leaf)]
            with torch.no_grad():
                probs = vllm_reference(torch.tensor([ids])).logits[0, len(tree.prompt_ids) - 1 : -1].softmax(-1)
            drawn = probs.gather(1, torch.tensor(ids[len(tree.prompt_ids) :])[:, None])[:, 0]
            exact += (1 - 2 * drawn + probs.square().sum(-1)).sum().item()
            estimated += sum(tree.nodes[node].score_norm for node in tree.path(leaf))
    assert 0.45 * exact < estimated < 1.05 * exact  # with room for rounding


def test_greedy_trees_are_those_of_transformers(generation, vllm_reference, greedy_prompts):
    generation.temperature = 0.0
    config = GenerationConfig(do_sample=False, eos_token_id=[EOS], pad_token_id=0, disable_compile=True)
    with torch.no_grad():
        expected = grow(greedy_prompts, VLLM_SHAPE, TransformersBackend(vllm_reference, config, [EOS], 0, max_rows=64))
    trees = grow(greedy_prompts, VLLM_SHAPE, VLLMBackend(generation, [EOS]))
    for tree, other in zip(trees, expected, strict=True):
        assert [(node.parent, node.token_ids, node.ended) for node in tree.nodes] == [
            (node.parent, node.token_ids, node.ended) for node in other.nodes
        ]


def test_prefixes_come_from_the_cache(generation, requests):
    """The siblings of the first wave share their prompt, those of the later ones all blocks that are full."""
    generation.llm.reset_prefix_cache()
    grow([PROMPT], VLLM_SHAPE, VLLMBackend(generation, [EOS]))
    first, *later = requests
    assert [cached for _, cached in first] == [0, BLOCK]
    assert len(later) == 2
    for wave in later:
        assert all(cached == length // BLOCK * BLOCK > 0 for length, cached in wave)


def test_each_wave_is_one_call(generation, requests):
    grow([PROMPT, [9, 10]], TreeShape((2, 2), 4, 8), VLLMBackend(generation, [EOS]))
    assert len(requests) == 2 and len(requests[0]) == 4
    generation.generation_kwargs = {"logit_bias": {EOS: 100.0}}
    requests.clear()
    (tree,) = grow([PROMPT], VLLM_SHAPE, VLLMBackend(generation, [EOS]))
    assert tree.depths[-1] == 1 and len(requests) == 1  # with nothing left to extend, the engine is not called


def test_stop_strings_end_a_completion_even_across_segments(generation):
    """The text of the completion counts, as in flat sampling, not that of a segment."""
    tokenizer = make_tokenizer()
    generation.generation_kwargs = {"stop": ["12", "7"], "logit_bias": {3: 4.0, 4: 4.0, EOS: -100.0}}  # "1" and "2"
    backend = VLLMBackend(generation, [EOS], tokenizer)
    trees = grow([[9, 10]] * 8, TreeShape((2, 2, 2), 2, 6), backend)
    starts_across = 0
    for tree in trees:
        for index, node in enumerate(tree.nodes[1:], start=1):
            text = tokenizer.decode(tree.completion_ids(index))
            assert node.ended == ("12" in text or "7" in text)
            assert not node.ended or text.endswith(("12", "7"))
            assert len(node.token_ids) == len(node.logprobs)
            starts_across += node.ended and node.token_ids == (4,) and text.endswith("12")
    assert starts_across > 0


def test_an_end_at_the_last_token_of_a_segment_is_an_end(generation):
    generation.generation_kwargs = {"logit_bias": {EOS: 4.0}}
    shape = TreeShape((2, 2, 2), 1, 3)
    trees = grow([[9, 10], [5], PROMPT], shape, VLLMBackend(generation, [EOS]))
    for tree in trees:
        check_laws(tree, shape)
    assert any(node.ended for tree in trees for node in tree.nodes)


def test_ignored_ends_do_not_end_a_branch(generation):
    generation.generation_kwargs = {"ignore_eos": True, "logit_bias": {EOS: 100.0}}
    (tree,) = grow([[9, 10]], TreeShape((2, 2), 3, 6), VLLMBackend(generation, [EOS]))
    assert len(tree.leaves) == 4
    assert all(tree.completion_ids(leaf) == [EOS] * 6 for leaf in tree.leaves)


def test_an_engine_that_sleeps_stays_awake_within_a_tree(generation, requests, monkeypatch):
    """On a CPU, vLLM's sleep does nothing but reset the prefix cache; here, when it is called counts."""
    calls = []
    generation.enable_sleep_mode, generation._llm_weights_sleeping = True, True
    llm = generation.llm
    for target, name in [(generation, "sync_weights"), (llm, "sleep"), (llm, "wake_up"), (llm, "generate")]:
        original = getattr(target, name)

        def spy(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return None if name == "sync_weights" else original(*args, **kwargs)  # a CPU engine takes no weights

        monkeypatch.setattr(target, name, spy)
    backend = VLLMBackend(generation, [EOS])
    with backend.awake():
        grow([PROMPT], VLLM_SHAPE, backend)
    assert calls == ["sync_weights", "wake_up", *["generate"] * VLLM_SHAPE.max_depth, "sleep"]
    assert generation.enable_sleep_mode and generation._llm_weights_sleeping
    assert all(cached > 0 for wave in requests[1:] for _, cached in wave)  # nothing was lost between the waves
    with pytest.raises(RuntimeError, match="in a tree"), backend.awake():
        raise RuntimeError("in a tree")
    assert calls[-1] == "sleep" and generation.enable_sleep_mode
    llm.wake_up()


def test_the_context_is_the_engines(trainer):
    assert find_context_length(trainer.vllm_generation) == 300
    assert trainer._max_prompt_length == 300 - 12


def test_a_training_step(trainer):
    """Sampling, importance sampling correction by token, loss and update; the first step needs no new weights."""
    trainer._last_loaded_step = 0  # a CPU engine takes no weights, and has those of the model
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
    assert log["sampling/sampling_logp_difference/mean"] < VLLM_ROUNDING / 4
    assert log["sampling/sampling_logp_difference/max"] < 2 * VLLM_ROUNDING
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.05)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    shape = trainer.tree_shape
    for scored in trainer.last_trees:
        check_laws(scored.tree, shape)
        assert all(scored.kept[1:]) and all(node.score_norm is not None for node in scored.tree.nodes[1:])
    assert len(trainer.last_trees) == 2
