"""Caches that cannot be forked are found before samples rest on them; the others are forked, whole."""

import warnings

import pytest
import torch
from families import make_sampler
from tiny import EOS, PAD, spread_reward
from transformers import Cache, DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.growth.backends import TransformersBackend, caches, transformers, trial


PROMPTS = [[5, 6, 7, 8, 9, 11], [10, 3]]
SHAPE = TreeShape((4, 2), 3, 6)
# What the warning says of a family. None: it is forked.
FAULTS = {
    "qwen2_5_vl": None,
    "gemma3n": None if caches.NO_LAYER else "not made of per-token keys and values alone",
    "mistral": None,
    "minimax": "not made of per-token keys and values alone: MiniMaxCache",
    "granite_hybrid": "not made of per-token keys and values alone: DynamicCache, LinearAttentionLayer",
    "recurrent_gemma": "not made of per-token keys and values alone",
    "mamba": "not made of per-token keys and values alone",
    "openai_gpt": f"ValueError: The following `model_kwargs` are not used by the model: ['{caches.CACHE}']",
}


def make_backend(model, max_rows=64, fork_caches=None, **options) -> TransformersBackend:
    config = GenerationConfig(
        **{"do_sample": False, "eos_token_id": [EOS], "pad_token_id": PAD, "disable_compile": True, **options}
    )
    return TransformersBackend(model, config, [EOS], PAD, max_rows, fork_caches=fork_caches)


def sample(model, prompts=PROMPTS, shape=SHAPE, **options):
    """Trees, and what was said of forks."""
    backend = make_backend(model, **options)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        trees = grow(prompts, shape, backend)
    said = [str(warning.message) for warning in caught if "forked" in str(warning.message)]
    assert len(said) == (backend.fork_caches is False and options.get("fork_caches") is None)
    return trees, "".join(said)


def completions(trees) -> list[list[tuple[int, ...]]]:
    return [[tuple(tree.completion_ids(leaf)) for leaf in tree.leaves] for tree in trees]


def generate(model, prompts=PROMPTS) -> list[list[tuple[int, ...]]]:
    """The greedy completion of each prompt, by upstream's `generate` on it alone, for each leaf."""
    rows = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False,
            max_new_tokens=SHAPE.max_completion_length, eos_token_id=EOS, pad_token_id=PAD, suppress_tokens=[EOS],
        )  # fmt: skip
        rows.append(tuple(output[0, len(prompt) :].tolist()))
    return [[row] * SHAPE.num_leaves for row in rows]


@pytest.mark.parametrize("family", FAULTS)
def test_greedy_trees_are_what_generate_gives_row_by_row(family):
    model = make_sampler(family)
    expected = generate(model)
    assert len({row for rows in expected for row in rows}) == len(PROMPTS)
    for max_rows in (64, 3):  # more than a group, less than one
        trees, said = sample(model, max_rows=max_rows, suppress_tokens=[EOS])
        assert completions(trees) == expected
        if FAULTS[family] is None:
            assert not said
        else:
            assert FAULTS[family] in said and type(model).__name__ in said and "Sampling is slower" in said


def test_batches_of_any_size_follow_one_another_on_a_model_that_keeps_state():
    """Positions of multimodal models depend on what they saw last: other prompts, a training step, an evaluation."""
    model = make_sampler("qwen2_5_vl")
    prompts = [*PROMPTS, [4], [12, 13, 14]]
    backend = None
    for size in (2, 4, 1, 3):
        expected = generate(model, prompts[:size])
        forks = backend and backend.fork_caches
        backend = make_backend(model, max_rows=3, fork_caches=forks, suppress_tokens=[EOS])
        with torch.no_grad():
            assert completions(grow(prompts[:size], SHAPE, backend)) == expected
        rows = torch.randint(2, 9, (5, 7))
        model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.sum().backward()
    assert backend.fork_caches


def wrong_row(cache, rows, room):
    return caches.fork(cache, rows.roll(1), room)


def without_last_layer(cache, rows, room):
    forked = caches.fork(cache, rows, room)
    forked.layers[-1].keys.zero_()
    return forked


def keeping_ended_rows(cache, rows, room):
    forked = caches.fork(cache, rows, room)
    forked.batch_select_indices = lambda rows: None
    return forked


def in_one_memory(cache, rows, room):
    """What one chunk writes, the next one reads."""
    forked = caches.fork(cache, rows, room)
    forked.layers[0] = cache.layers[0]
    cache.layers[0].batch_select_indices(rows % len(cache.layers[0].keys))
    return forked


@pytest.mark.parametrize("fork", [wrong_row, without_last_layer, keeping_ended_rows, in_one_memory])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fork_that_gives_something_else_is_found(model, monkeypatch, fork, dtype):
    """The type of the cache tells nothing here; what comes of it does."""
    model = model.to(dtype)
    expected, said = sample(model)
    assert not said
    monkeypatch.setattr(transformers, "fork", fork)
    trees, said = sample(model)
    assert "differ" in said or "RuntimeError" in said
    assert trees == expected


class Forgetful(Qwen2ForCausalLM):
    """Takes its positions from how often it was called, as if no cache was ever forked."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        self.position = 0 if input_ids.size(1) > 1 else self.position + 1
        if input_ids.size(1) == 1:
            position_ids = torch.full_like(position_ids, self.position + 3)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class Hoarder(Qwen2ForCausalLM):
    """Keeps a state of each row on itself."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.model.layers[0].state = output.logits[:, -1]
        return output


class Refuser(Qwen2ForCausalLM):
    """Cannot continue more rows than it has read."""

    def forward(self, *args, **kwargs):
        cache = kwargs.get(caches.CACHE)
        if cache is not None and cache.get_seq_length() and kwargs["input_ids"].size(0) == 4:
            raise ValueError("no room for 4 rows")
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Forgetful, "log-probabilities after a fork differ by"),
        (Hoarder, "it keeps 'state' of each batch on itself, in model.layers.0"),
        (Refuser, "ValueError: no room for 4 rows"),
    ],
)
def test_a_model_that_cannot_continue_from_a_fork_is_found(model_path, kind, fault):
    model = kind.from_pretrained(model_path, dtype=torch.float32)
    assert fault in sample(model, PROMPTS)[1]


def test_without_the_trial_these_models_would_be_sampled_wrongly(model_path):
    """So the tests above test something."""
    model = Forgetful.from_pretrained(model_path, dtype=torch.float32)
    assert sample(model, fork_caches=True) != sample(model, fork_caches=False)
    minimax = make_sampler("minimax")
    with pytest.raises(caches.CannotForkError, match="MiniMaxCache"):
        sample(minimax, fork_caches=True)


def sharpen(model):
    """So that rounding to bfloat16 makes more of a difference than single precision ever does."""
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prompts", [[[5]], [[EOS], [PAD]], [[7] * 40, [8]]])
def test_what_can_be_forked_is_whatever_the_prompts_and_the_precision(model, dtype, prompts):
    _, said = sample(sharpen(model).to(dtype), prompts)
    assert not said


def test_autocast_is_not_taken_for_a_fault(model):
    """The parameters have full precision; what is computed with them has not."""
    forward = torch.autocast("cpu", dtype=torch.bfloat16)(sharpen(model).forward)
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert not sample(model)[1]


def test_nothing_but_numbers_that_are_not_finite_is_no_fault_of_the_cache(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert trial.find_fault(make_backend(model), PROMPTS) is None


def test_the_trial_leaves_the_random_state_and_the_model_as_they_were():
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=EOS)
    model = GPT2LMHeadModel(config).train()  # with dropout
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert trial.find_fault(make_backend(model), PROMPTS) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    samples = []
    for fork_caches in (None, True):
        torch.manual_seed(3)
        samples.append(sample(model, fork_caches=fork_caches, do_sample=True)[0])
    assert samples[0] == samples[1]


@pytest.mark.parametrize("max_rows", [64, 3, 2, 1])
def test_the_trial_costs_some_calls_on_few_rows(model, max_rows):
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    trial.find_fault(make_backend(model, max_rows), [[5] * 100, [6] * 100])
    assert len(sizes) <= (21 if max_rows > 3 else 50)
    assert max(rows for rows, _ in sizes) <= min(max_rows, 4)
    assert max(tokens for _, tokens in sizes) <= 10


def test_a_trainer_tries_once(model, make_args, dataset, monkeypatch):
    calls = []

    def find_fault(*args):
        calls.append(args)
        return trial.find_fault(*args)

    monkeypatch.setattr(transformers, "find_fault", find_fault)
    trainer = TreeRPOTrainer(model=model, reward_funcs=spread_reward, args=make_args(), train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(calls) == 1 and trainer._can_fork_caches


def test_processes_of_one_model_decide_alike(model, monkeypatch):
    """One that finds nothing follows another one that does."""
    monkeypatch.setattr(trial.distributed, "all_reduce", lambda tensor, op: tensor.fill_(1.0))
    backend = make_backend(model)
    backend.synced_gpus = True
    monkeypatch.setattr(TransformersBackend, "_any_calls", lambda self, has_call: False)
    monkeypatch.setattr(model, "_has_unfinished_sequences", lambda finished, synced_gpus, device: not finished)
    assert trial.find_fault(backend, PROMPTS) == "another process found that it cannot"


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_a_checkpoint_that_turns_the_cache_off_is_sampled_on_the_cache(model, place):
    expected, _ = sample(model)
    getattr(model, place).use_cache = False
    positions = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trees, said = sample(model, fork_caches=True)
    assert trees == expected and not said
    assert sum(positions) == 2 * 5 + sum(tree.num_sampled_tokens for tree in trees)
    assert not sample(model)[1]


class PlainSubclass(DynamicCache):
    pass


def with_attribute(cache):
    cache.state = torch.zeros(2)
    return cache


class LayerSubclass(DynamicLayer):
    pass


@pytest.mark.parametrize(
    "cache", [PlainSubclass(), with_attribute(DynamicCache()), DynamicCache(offloading=True), Cache([LayerSubclass()])]
)
def test_only_caches_of_known_kinds_are_forked(cache):
    caches.check_forkable(DynamicCache())
    with pytest.raises(caches.CannotForkError, match=type(cache).__name__):
        caches.check_forkable(cache)
