"""Trees grown by a real vLLM engine on a CPU, colocated with the trainer: `make test-vllm`.

What a CPU engine cannot do is take weights from the trainer. The trainer here starts with those that the engine has
loaded, and takes one step.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from places import free_port
from random_trees import plan
from tiny import CHARACTERS, EOS, PAD, VLLM_ROUNDING, VLLM_SHAPE, VLLM_TOKENS, make_tokenizer, spread_reward
from transformers import GenerationConfig, Qwen2ForCausalLM

from treerpo_trl import Tree, TreeRPOConfig, TreeRPOTrainer
from treerpo_trl.growth import Delimiters, ForkShape, TreeShape, grow
from treerpo_trl.growth.backends import TransformersBackend, VLLMBackend, find_context_length
from treerpo_trl.tree import ROOT


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm makes an environment that has it")
pytestmark = pytest.mark.vllm

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # starts without compiling the model
os.environ.setdefault("MASTER_PORT", str(free_port()))  # else the engine takes 29500, which others may have
BLOCK = 128  # tokens of a block of the prefix cache on a CPU
CONTEXT = 300
SHAPE_NAMES = ("length", "delimiter", "forks")
PROMPT = [7, 11, 5, 9, 13, 8, 20] * 30  # longer than a block
NEWLINE, BREAK = 2 + CHARACTERS.index("\n"), 1 + len(VLLM_TOKENS)
FORKS = ForkShape(2, 2, 2, 2, min_segment_length=2, max_completion_length=12)


@pytest.fixture(scope="module")
def trainer(vllm_model_path, tmp_path_factory) -> TreeRPOTrainer:
    """A trainer and its engine, which takes half a minute to start."""
    options = {"branching_factor": [2, 2, 2], "segment_length": 4}
    return make_trainer(vllm_model_path, tmp_path_factory.mktemp("out"), **options)


def make_trainer(path: str, folder, **options) -> TreeRPOTrainer:
    dataset = Dataset.from_dict({"prompt": [f"{i}+" * 50 for i in range(10, 14)]})
    args = TreeRPOConfig(
        str(folder), per_device_train_batch_size=16, max_steps=1, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False,
        disable_tqdm=True, model_init_kwargs={"dtype": "float32"}, use_vllm=True, vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=CONTEXT, advantage_estimator="optimal_baseline", **options,
    )  # fmt: skip
    tokenizer = make_tokenizer(tokens=VLLM_TOKENS)
    return TreeRPOTrainer(path, spread_reward, args, train_dataset=dataset, processing_class=tokenizer)


@pytest.fixture
def generation(trainer) -> Iterator:
    """TRL's handle of the engine; what a test changes of it is undone."""
    generation = trainer.vllm_generation
    options = ("temperature", "generation_kwargs", "enable_sleep_mode", "_llm_weights_sleeping")
    before = {name: getattr(generation, name) for name in options}
    yield generation
    for name, value in before.items():
        setattr(generation, name, value)


class Request(NamedTuple):
    """Tokens of a prefix, how many of these were cached, and what was drawn after it."""

    length: int
    num_cached: int
    drawn: Sequence[int]


@pytest.fixture
def requests(generation, monkeypatch) -> list[list[Request]]:
    """Every request, a list a call."""
    seen = []
    generate = generation.llm.generate

    def spy(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        seen.append(
            [
                Request(len(output.prompt_token_ids), output.num_cached_tokens, output.outputs[0].token_ids)
                for output in outputs
            ]
        )
        return outputs

    monkeypatch.setattr(generation.llm, "generate", spy)
    return seen


def make_backend(generation, end_token_ids: Sequence[int] = (EOS,)) -> VLLMBackend:
    return VLLMBackend(generation, end_token_ids, make_tokenizer(tokens=VLLM_TOKENS))


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


@pytest.mark.parametrize(
    "shape", [VLLM_SHAPE, replace(VLLM_SHAPE, delimiters=Delimiters(tuple("147b+"), 3)), FORKS], ids=SHAPE_NAMES
)
def test_logprobs_are_those_of_the_model(generation, vllm_reference, vllm_model_path, shape):
    """At the temperature of sampling, and as close to those in float32 as transformers' are in the engine's type.

    A segment may be of two calls, and a node a part of a segment.
    """
    rounded = Qwen2ForCausalLM.from_pretrained(vllm_model_path, dtype=torch.bfloat16).eval()
    generation.temperature = 0.7
    trees = grow([PROMPT, [9, 10]], shape, make_backend(generation))
    nodes = [node for tree in trees for node in tree.nodes[1:]]
    assert all(node.uncertainties == tuple(-logprob for logprob in node.logprobs) for node in nodes)
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


@pytest.mark.parametrize("min_tokens", [None, 1, 4])
def test_greedy_trees_are_those_of_transformers(generation, vllm_reference, greedy_prompts, min_tokens):
    """At a length or at delimiters, which are pairs of tokens in the middle of greedy completions."""
    generation.temperature = 0.0
    tokenizer = make_tokenizer(tokens=VLLM_TOKENS)
    config = GenerationConfig(do_sample=False, eos_token_id=[EOS], pad_token_id=0, disable_compile=True)

    def grow_expected(shape: TreeShape) -> list[Tree]:
        with torch.no_grad():
            backend = TransformersBackend(vllm_reference, config, [EOS], 0, max_rows=64, tokenizer=tokenizer)
            return grow(greedy_prompts, shape, backend)

    shape, expected = VLLM_SHAPE, grow_expected(VLLM_SHAPE)
    if min_tokens is not None:
        texts = {tokenizer.decode(tree.completion_ids(tree.leaves[0])[2:4]) for tree in expected} - {""}
        shape = replace(shape, delimiters=Delimiters((*texts,), min_tokens))
        expected = grow_expected(shape)
        firsts = [tree.nodes[1] for tree in expected]
        assert min(len(node.token_ids) for node in firsts if not node.ended) < shape.segment_length
    trees = grow(greedy_prompts, shape, make_backend(generation))
    for tree, other in zip(trees, expected, strict=True):
        assert [(node.parent, node.token_ids, node.ended) for node in tree.nodes] == [
            (node.parent, node.token_ids, node.ended) for node in other.nodes
        ]


def test_prefixes_come_from_the_cache(generation, requests):
    """The siblings of the first wave share their prompt, those of the later ones all blocks that are full."""
    generation.llm.reset_prefix_cache()
    grow([PROMPT], VLLM_SHAPE, VLLMBackend(generation, [EOS]))
    first, *later = requests
    assert [request.num_cached for request in first] == [0, BLOCK]
    assert len(later) == 2
    for wave in later:
        assert all(request.num_cached == request.length // BLOCK * BLOCK > 0 for request in wave)


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


def find_ends(shape: TreeShape, ids: Sequence[int]) -> list[int]:
    """After how many tokens a delimiter ends a segment, decoded as a whole."""
    tokenizer = make_tokenizer(tokens=VLLM_TOKENS)
    texts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    return [
        end
        for end in range(shape.delimiters.min_tokens, len(ids) + 1)
        for text in shape.delimiters.texts
        if text in texts[end][max(len(texts[end - 1]) + 1 - len(text), 0) :]
    ]


def check_delimited(shape: TreeShape, tree: Tree, stops: tuple[str, ...] = (), ends: Sequence[int] = (EOS,)) -> list:
    """The laws of trees that branch at delimiters; returns (node, whether a delimiter ended it) of each."""
    tokenizer, seen = make_tokenizer(tokens=VLLM_TOKENS), []
    for index, node in enumerate(tree.nodes[1:], start=1):
        is_last = tree.depths[index] == shape.max_depth
        left = shape.max_completion_length - tree.lengths[node.parent]
        limit = left if is_last else min(left, shape.segment_length)
        found = [] if is_last else find_ends(shape, node.token_ids)
        text, before = (tokenizer.decode(tree.completion_ids(index)[:end]) for end in (None, -1))
        assert node.ended == (node.token_ids[-1] in ends or any(stop in text for stop in stops))
        assert not any(stop in before for stop in stops) and not set(ends) & set(node.token_ids[:-1])
        assert len(node.token_ids) == len(node.logprobs) <= limit
        assert set(found) <= {len(node.token_ids)}  # nothing is drawn beyond a delimiter
        assert found or node.ended or len(node.token_ids) == limit
        seen.append((node, bool(found)))
    return seen


@pytest.mark.parametrize("min_tokens", [1, 3])
def test_segments_end_at_delimiters(generation, requests, min_tokens):
    """Of one token or two, at the first token of a segment or at its last."""
    generation.generation_kwargs = {"logit_bias": {NEWLINE: 4.0, BREAK: 3.0, EOS: 1.0, 3: 2.0}}
    shape = TreeShape((3, 2, 2), 5, 14, Delimiters(("\n\n", "1"), min_tokens))
    trees = grow([[9, 10], [5], PROMPT, [7, 7]] * 2, shape, make_backend(generation))
    seen = [each for tree in trees for each in check_delimited(shape, tree)]
    delimited = [node.token_ids for node, is_delimited in seen if is_delimited]
    assert any(ids[-1] == BREAK for ids in delimited) and any(ids[-2:] == (NEWLINE, NEWLINE) for ids in delimited)
    assert {len(ids) for ids in delimited} == set(range(min_tokens, 6))
    assert any(not node.ended and not is_delimited for node, is_delimited in seen)
    # A wave is a call, or two where the first tokens pass delimiters by; no token is drawn for nothing but there.
    assert len(requests) == (3 if min_tokens == 1 else 5)
    drawn = sum(len(request.drawn) for wave in requests[:-1] for request in wave)
    assert drawn <= 1.2 * sum(len(node.token_ids) for tree in trees for node in tree.nodes[1:])


@pytest.mark.parametrize(
    "options",
    [{"stop": "7"}, {"stop": ["70", "7"], "include_stop_str_in_output": True}, {"stop_token_ids": [9]},
     {"stop_token_ids": [9], "ignore_eos": True}],
)  # fmt: skip
def test_what_ends_a_completion_does_so_beside_delimiters(generation, options):
    generation.generation_kwargs = {**options, "logit_bias": {9: 3.0, NEWLINE: 4.0, BREAK: 3.0, EOS: 2.0}}
    shape = TreeShape((3, 2, 2), 4, 12, Delimiters(("\n\n",), 2))
    trees = grow([[9, 10], [5]] * 3, shape, make_backend(generation))
    ends = [] if options.get("ignore_eos") else [EOS]
    stops = ("7",) if "stop" in options else ()
    seen = [
        each
        for tree in trees
        for each in check_delimited(shape, tree, stops, [*ends, *options.get("stop_token_ids", [])])
    ]
    assert any(node.token_ids[-1] == 9 for node, _ in seen) and any(is_delimited for _, is_delimited in seen)
    assert generation.generation_kwargs.keys() == {*options, "logit_bias"}


def test_a_special_token_can_be_a_delimiter(generation, requests):
    """vLLM leaves special tokens out of a text unless it is told not to."""
    generation.generation_kwargs = {"logit_bias": {PAD: 5.0}, "detokenize": False}
    shape = TreeShape((2, 2), 20, 24, Delimiters(("<pad>",), 1))
    trees = grow([[9, 10], [5]], shape, make_backend(generation))
    assert any(is_delimited for tree in trees for _, is_delimited in check_delimited(shape, tree))
    assert sum(len(request.drawn) for request in requests[0]) == sum(
        len(tree.nodes[child].token_ids) for tree in trees for child in tree.children[ROOT]
    )


def test_a_path_may_have_less_left_than_a_segments_fewest_tokens(generation):
    generation.generation_kwargs = {"logit_bias": {EOS: -100.0}}
    shape = TreeShape((2, 2, 2, 2), 3, 7, Delimiters(("1",), 3))
    for tree in grow([[9, 10], PROMPT], shape, make_backend(generation)):
        check_delimited(shape, tree)
        assert all(tree.lengths[leaf] == 7 for leaf in tree.leaves)


def test_forks_continue_what_is_above_them(generation, vllm_reference, requests):
    """Sampled responses, and greedy continuations of them, which are the model's after the same tokens."""
    generation.generation_kwargs = {"logit_bias": {EOS: -100.0}}
    generation.llm.reset_prefix_cache()
    backend, trees = make_backend(generation), [Tree.from_prompt(PROMPT), Tree.from_prompt([9, 10])]
    for index in range(FORKS.num_waves):
        trees, wave = plan(FORKS, trees, index)
        segments = backend.extend(trees, wave)
        generation.temperature = 0.0
        children = [{} for _ in trees]
        for (tree, node), group in zip(wave.branches, segments, strict=True):
            children[tree][node] = group
            assert len({segment.token_ids for segment in group}) == (FORKS.num_trunks if node == ROOT else 1)
        trees = [tree.grow(group) for tree, group in zip(trees, children, strict=True)]
        for tree, node in wave.branches if index else ():
            for child in trees[tree].children[node][1:]:  # the first is what was cut
                check_greedy(vllm_reference, trees[tree], child)
    assert len(requests) == FORKS.num_waves
    assert all(request.num_cached >= BLOCK for wave in requests[1:] for request in wave if request.length > BLOCK)
    for tree in trees:
        assert len(tree.leaves) == FORKS.num_leaves == 18
        assert {tree.lengths[leaf] for leaf in tree.leaves} == {12}


def check_greedy(model, tree: Tree, node: int) -> None:
    """No other token of the node is likelier than the one drawn, but for rounding."""
    ids, length = [*tree.prompt_ids, *tree.completion_ids(node)], len(tree.nodes[node].token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -length - 1 : -1]
    logits[:, EOS] = -math.inf
    drawn = logits.gather(1, torch.tensor(ids[-length:])[:, None])[:, 0]
    assert (logits.max(dim=1).values - drawn).max() < 2 * VLLM_ROUNDING


def test_nothing_ends_at_the_end_of_the_context(generation):
    """Rows are asked for more than they have room for, and the engine stops there by itself."""
    generation.generation_kwargs = {"logit_bias": {EOS: -100.0}}
    shape = ForkShape(1, 3, 1, 1, min_segment_length=1, max_completion_length=12)
    prompts = [[5] * (CONTEXT - 12), [9, 10], [5] * (CONTEXT - 15)]
    for tree in grow(prompts, shape, make_backend(generation)):
        assert not any(node.ended for node in tree.nodes)
        assert [tree.lengths[leaf] for leaf in tree.leaves] == [12] * 4


@pytest.mark.parametrize("shape", [replace(VLLM_SHAPE, delimiters=Delimiters(("1",), 3)), FORKS], ids=SHAPE_NAMES[1:])
def test_waves_with_nothing_to_draw_call_nothing(generation, requests, shape):
    generation.generation_kwargs = {"logit_bias": {EOS: 100.0}}
    (tree,) = grow([PROMPT], shape, make_backend(generation))
    assert all(node.token_ids == (EOS,) and node.ended for node in tree.nodes[1:]) and len(requests) == 1
    assert grow([], shape, make_backend(generation)) == [] and len(requests) == 1


@pytest.mark.parametrize("shape", [VLLM_SHAPE, FORKS], ids=["length", "forks"])
def test_an_engine_that_sleeps_stays_awake_within_a_tree(generation, requests, monkeypatch, shape):
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
        grow([PROMPT], shape, backend)
    assert calls == ["sync_weights", "wake_up", *["generate"] * shape.num_waves, "sleep"]
    assert generation.enable_sleep_mode and generation._llm_weights_sleeping
    assert all(request.num_cached > 0 for wave in requests[1:] for request in wave)  # nothing was lost in between
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


@pytest.mark.parametrize(
    "options",
    [
        {"split_rule": "uncertainty", "num_trunks": 2, "forks_per_trunk": 3, "max_completion_length": 12},
        {"split_rule": "delimiter", "branching_factor": [2, 2, 2], "segment_length": 4, "min_segment_length": 2,
         "max_completion_length": 12, "overlap_rewards": True,
         "step_delimiters": ["\n", "1", "7", "b"]},
    ],
    ids=SHAPE_NAMES[:0:-1],
)  # fmt: skip
def test_a_training_step_with_other_split_rules(trainer, vllm_model_path, tmp_path, monkeypatch, options):
    """On the engine that runs, whose weights are those that training starts with."""
    engine = trainer.vllm_generation.llm
    monkeypatch.setattr("trl.generation.vllm_generation.LLM", lambda **_: engine)
    other = make_trainer(vllm_model_path, tmp_path, **options)
    other._last_loaded_step = 0
    before = {name: parameter.clone() for name, parameter in other.model.named_parameters()}
    other.train()
    (log,) = [log for log in other.state.log_history if "loss" in log]
    assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
    assert log["sampling/sampling_logp_difference/mean"] < VLLM_ROUNDING / 4
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.05)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in other.model.named_parameters())
    lengths = [len(node.token_ids) for scored in other.last_trees for node in scored.tree.nodes[1:]]
    assert len(other.last_trees) == 2 and len(set(lengths)) > 2
