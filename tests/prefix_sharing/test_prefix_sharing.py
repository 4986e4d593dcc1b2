"""Packed rows against dense ones: log-probabilities, entropies, gradients, whole training steps, and who cannot."""

import itertools
import json
import warnings
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from families import (
    FAMILIES,
    NEEDED,
    OTHERS,
    RULES,
    SIZES,
    VOCABULARY,
    Rows,
    dense,
    full_tree_rows,
    make_model,
    pad_rows,
    random_rows,
)
from peft import LoraConfig, PromptTuningConfig
from tiny import coin_reward, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPTJForCausalLM, LlamaConfig, LlavaConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from trl.trainer.utils import add_fused_lm_head

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.prefix_sharing import (
    PrefixSharing,
    find_difference,
    forward_shared,
    install,
    pack_rows,
    unsupported_reason,
)
from treerpo_trl.prefix_sharing.forward import forward_dense
from treerpo_trl.prefix_sharing.support import has_low_precision


EXACT = 1e-5  # absolute on log-probabilities and entropies, relative to a parameter's largest gradient
CASES = [(seed, needed, seed % 2 == 1, RULES[seed % 3]) for seed, needed in enumerate(3 * sorted(NEEDED))]


def shared_model(family, dtype=torch.float32):
    model = make_model(family, dtype)
    install(model)
    return model


def shared(model, rows, **options):
    return forward_shared(model, rows.input_ids, rows.attention_mask, rows.needed, **options)


def random_loss(outputs, needed):
    """A number that depends on each token asked for, by its log-probability and its entropy."""
    torch.manual_seed(0)
    weights = torch.randn(2, *needed.shape)
    values = torch.stack([outputs.log_probs, outputs.entropy])
    return (values * weights * needed).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close_gradients(actual, expected, tolerance=EXACT):
    assert actual.keys() == expected.keys()
    # Gradients that are zero but for rounding (a query's with one key in sight) have the scale of all.
    rounding = tolerance / 10 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error, size = (actual[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert error <= tolerance * size + rounding, f"{name}: error {error:.1e} of {size:.1e}"


def assert_exact(packed, model, rows, tolerance=EXACT):
    """Same log-probabilities, entropies and gradients as dense rows of a twin that nothing was installed in."""
    expected, actual = dense(model, rows), shared(packed, rows)
    for name in ("log_probs", "entropy"):
        difference = (getattr(actual, name) - getattr(expected, name))[rows.needed].abs()
        assert difference.numel() == 0 or difference.max() <= tolerance, f"{name}: {difference.max():.1e}"
    assert (actual.log_probs[~rows.needed] == 0).all()
    assert_close_gradients(
        gradients(packed, random_loss(actual, rows.needed)), gradients(model, random_loss(expected, rows.needed))
    )


# Exactness


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_packed_rows_equal_dense_rows(family, training):
    packed, model = shared_model(family).train(training), make_model(family).train(training)
    assert unsupported_reason(packed) is None
    for case in CASES:
        assert_exact(packed, model, random_rows(*case))


# Gemma 2's own eager attention is NaN for dense rows with left padding in double precision.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2"}))
def test_packed_rows_equal_dense_rows_in_double_precision(family):
    """What is left is what the models themselves compute in single precision: norms, rotations, the head."""
    packed, model = shared_model(family, torch.float64), make_model(family, torch.float64)
    for case in CASES[:5]:
        assert_exact(packed, model, random_rows(*case))


def test_hidden_states_are_exact_where_a_model_is_double_throughout():
    """GPT-2 has no part that computes in single precision."""
    packed, model = shared_model("gpt2", torch.float64), make_model("gpt2", torch.float64)
    states = []
    for each in (packed, model):
        each.base_model.register_forward_hook(lambda module, args, outputs: states.append(outputs.last_hidden_state))
    rows = random_rows(9)
    shared(packed, rows), dense(model, rows)
    source = pack_rows(rows.input_ids, rows.attention_mask, rows.needed).source_BT
    width = rows.needed.size(1)
    difference = states[0][0][source] - states[1][:, -width - 1 : -1]
    assert difference[rows.needed].abs().max() < 1e-10


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_prompts_of_very_different_lengths(family):
    prompts = [[5] * 3, [5] * 3, list(range(2, 20)) * 2, list(range(2, 20)) * 2]
    completions = [[6, 7, 8], [6, 9], [2, 3, 4, 5], [2, 3, 4, 6]]
    assert_exact(shared_model(family), make_model(family), pad_rows(prompts, completions, NEEDED["all"]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_implementations_of_attention(attention):
    packed, model = make_model("mistral"), make_model("mistral")
    for each in (packed, model):
        each.set_attn_implementation(attention)
    install(packed)
    assert_exact(packed, model, random_rows(9))


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2"])
def test_flex_attention_is_as_exact(family, monkeypatch):
    """Its kernels have a backward pass on GPUs only; what they stand for has one on a CPU, if it is let."""
    torch._dynamo.reset()  # other soft caps before are of no concern
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    packed, model = make_model(family), make_model(family)
    packed.set_attn_implementation("flex_attention")
    install(packed)
    assert unsupported_reason(packed) is None
    for case in CASES[:4]:
        assert_exact(packed, model, random_rows(*case))


def test_installing_twice_does_nothing():
    model = shared_model("qwen2")
    before = model.config._attn_implementation
    install(model)
    assert model.config._attn_implementation == before
    assert_exact(model, make_model("qwen2"), random_rows(9))


class OwnAttention(Qwen2Attention):
    """A layer of somebody's own, in another module than the eager attention it uses."""


def test_layers_derived_elsewhere_keep_their_eager_attention():
    packed, model = make_model("qwen2"), make_model("qwen2")
    for each in (packed, model):
        each.set_attn_implementation("eager")
    for layer in packed.model.layers:
        layer.self_attn.__class__ = OwnAttention
    install(packed)
    rows = random_rows(9)
    assert torch.equal(dense(packed, rows).log_probs, dense(model, rows).log_probs)
    assert_exact(packed, model, rows)


def test_a_layer_that_makes_its_own_mask_is_an_error():
    model, rows = shared_model("qwen2"), random_rows(9)

    def add_mask(module, args, kwargs):
        size = kwargs["hidden_states"].size(1)
        return args, kwargs | {"attention_mask": torch.zeros(1, 1, size, size)}

    model.model.layers[1].self_attn.register_forward_pre_hook(add_mask, with_kwargs=True)
    with pytest.raises(ValueError, match="Qwen2Attention makes a mask of its own"):
        shared(model, rows)


def test_dense_rows_of_an_installed_model_are_untouched():
    packed, model, rows = shared_model("gemma3"), make_model("gemma3"), random_rows(9)
    assert torch.equal(dense(packed, rows).log_probs, dense(model, rows).log_probs)


def test_the_missing_are_what_was_given():
    model, rows = shared_model("qwen2"), random_rows(1, "some_tokens")
    missing = torch.randn(rows.needed.shape)
    log_probs = shared(model, rows, missing=missing).log_probs
    assert torch.equal(log_probs[~rows.needed], missing[~rows.needed])


def test_nothing_asked_for_still_reaches_every_parameter_with_a_zero_gradient():
    model = shared_model("qwen2")
    loss = shared(model, random_rows(9, "none")).log_probs.sum()
    assert all((gradient == 0).all() for gradient in gradients(model, loss).values())


def test_only_mixtures_of_experts_hear_of_router_logits():
    """A forward that takes no such argument must not get it."""
    model, rows, seen = shared_model("qwen3_moe"), random_rows(9), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("output_router_logits")), with_kwargs=True
    )
    shared(model, rows), shared(model, rows, is_moe=True), shared(model, rows, is_moe=True, with_aux_loss=True)
    assert seen == [None, False, True]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("needed", ["all", "some_rows", "none"])
def test_the_load_balancing_loss_counts_the_tokens_of_the_rows(family, needed):
    packed, model = shared_model(family), make_model(family)
    for seed in range(4):
        rows = random_rows(seed, needed)
        expected = dense(model, rows, output_router_logits=True)
        actual = shared(packed, rows, is_moe=True, with_aux_loss=True)
        assert abs(actual.aux_loss - expected.aux_loss) <= EXACT
        assert_close_gradients(gradients(packed, actual.aux_loss), gradients(model, expected.aux_loss))
        difference = (actual.log_probs - expected.log_probs)[rows.needed].abs()
        assert difference.numel() == 0 or difference.max() <= EXACT
        assert shared(packed, rows, is_moe=True).aux_loss is None


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    packed, model, rows = shared_model(family).train(), make_model(family).train(), random_rows(9, "some_tokens")
    packed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    packed.enable_input_require_grads()
    runs = []
    layer = packed.base_model.h[0].attn if family == "gpt2" else packed.base_model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: runs.append(1))
    assert_exact(packed, model, rows)
    assert len(runs) == 2  # the layer ran again in the backward pass


def test_low_precision_is_as_close_to_single_precision_as_dense_rows_are():
    packed, model, rows = shared_model("qwen2"), make_model("qwen2"), random_rows(9)
    exact = dense(model, rows).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(outputs.log_probs - exact)[rows.needed].abs().mean() for outputs in
                  (shared(packed, rows), dense(model, rows))]  # fmt: skip
    assert errors[0] <= 1.5 * errors[1] + 1e-3


# Cost


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2"])
def test_memory_grows_with_the_tokens_and_not_with_their_square(family, monkeypatch):
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)  # the head's tiles are TRL's matter
    model = shared_model(family)
    sizes, peaks = [], []
    for num_trees in (1, 2, 4, 8):
        rows = full_tree_rows(num_trees, depth=4, length=8)
        sizes.append(pack_rows(rows.input_ids, rows.attention_mask, rows.needed).input_ids.numel())
        with LargestTensor() as memory:
            random_loss(shared(model, rows), rows.needed).backward()
        peaks.append(memory.largest)
    assert peaks[-1] <= 1.1 * 8 * peaks[0]
    assert peaks[-1] < sizes[-1] ** 2 / 8


def test_the_load_balancing_loss_makes_no_mask_of_the_whole_pack(monkeypatch):
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    model, rows = make_model("mixtral"), full_tree_rows(8, depth=4, length=8)
    model.set_attn_implementation("eager")  # whose masks are never left out
    install(model)
    with LargestTensor() as memory:
        shared(model, rows, is_moe=True, with_aux_loss=True)
    assert memory.largest < pack_rows(rows.input_ids, rows.attention_mask, rows.needed).input_ids.numel() ** 2 / 4


def test_a_model_computes_only_what_is_packed():
    model, rows = shared_model("qwen2"), full_tree_rows(1, depth=4, length=8)
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared(model, rows)
    rows.needed[8:] = False
    shared(model, rows)
    assert seen[0] <= 8 * 31 + 16 and seen[1] <= 8 * 16 + 8


# Who cannot


def accelerator():
    """What PrefixSharing asks of an accelerator, in one process."""
    return SimpleNamespace(
        mixed_precision="no", is_main_process=True, unwrap_model=lambda model: model, gather=lambda tensor: tensor,
        autocast=nullcontext,
    )  # fmt: skip


def prefix_sharing(mode="auto", models=None, **attributes):
    """A PrefixSharing of one model, or several, with an accelerator of other attributes."""
    mocked = SimpleNamespace(**{**vars(accelerator()), **attributes})
    return PrefixSharing(mode, [make_model("qwen2").eval()] if models is None else models, mocked)


def first_batch():
    """One row of many tokens: TRL's (B, L), of which the first row is looked at."""
    return torch.randint(2, 24, (1, 30), generator=torch.Generator().manual_seed(0))


REASONS = {
    "qwen3_next": "linear_attention",
    "mamba": "linear_attention|recurrent",
    "bloom": "AttentionInterface",
    "gptj": "AttentionInterface",
    "llama4": "chunked_attention",
    "gpt_oss": "attention sinks",
    "opt": "other log-probabilities for packed rows",
    "gemma3_bidirectional": ".",
    "phimoe": ".",
    "doge": ".",
    "doge_window": ".",
}
if GPTJForCausalLM._supports_attention_backend:  # from transformers 5.24 on
    del REASONS["gptj"]


@pytest.mark.parametrize("family", REASONS)
def test_who_cannot_share_falls_back_with_one_warning_that_says_why(family):
    model = make_model(family).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sharing = PrefixSharing("auto", [model], accelerator())
        assert not sharing.can_share(model, first_batch())
        assert not sharing.can_share(model, first_batch())
    ours = [str(warning.message) for warning in caught if "dense rows" in str(warning.message)]
    assert len(ours) == 1
    assert type(model).__name__.removesuffix("ForCausalLM") in ours[0]
    with pytest.warns(UserWarning, match=REASONS[family]):
        PrefixSharing("auto", [model], accelerator()).can_share(model, first_batch())


@pytest.mark.parametrize("family", REASONS)
def test_insisting_on_sharing_is_an_error_that_says_why(family):
    model = make_model(family).eval()
    with pytest.raises(ValueError, match=f"prefix_sharing=True cannot be had.*({REASONS[family]})"):
        PrefixSharing(True, [model], accelerator()).can_share(model, first_batch())


def test_a_model_that_fails_on_packed_rows_falls_back():
    """Whatever it raises is a reason, with its text, and no end of the run."""
    model = make_model("qwen2").eval()
    sharing = PrefixSharing("auto", [model], accelerator())

    def fail(module, args, kwargs):
        if kwargs["input_ids"].size(0) == 1:  # dense rows of the check are more
            raise TypeError("unexpected shape")

    model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.warns(UserWarning, match="dense rows.*unexpected shape"):
        assert not sharing.can_share(model, first_batch())


def test_warnings_point_to_the_caller():
    for model in (make_model("bloom"), make_model("opt").eval()):  # refused at once, and by the check
        with pytest.warns(UserWarning, match="dense rows") as caught:
            PrefixSharing("auto", [model], accelerator()).can_share(model, first_batch())
        assert caught[0].filename == __file__


def test_one_model_that_cannot_share_keeps_all_from_it():
    policy, reference = make_model("qwen2"), make_model("bloom")
    with pytest.warns(UserWarning, match="Bloom") as caught:
        sharing = prefix_sharing(models=[reference, policy, reference])
    assert len(caught) == 1
    assert not sharing.is_active
    assert policy.config._attn_implementation == "sdpa"


def test_only_the_main_process_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not prefix_sharing(models=[make_model("bloom")], is_main_process=False).is_active


def fake_difference(monkeypatch, difference):
    """Let the check measure this. Returns what it was asked for."""
    calls = []

    def find(model, vocabulary_size, device):
        calls.append((model.training, vocabulary_size, device))
        return difference

    monkeypatch.setattr("treerpo_trl.prefix_sharing.sharing.find_difference", find)
    return calls


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("no", torch.float32, 1e-3),
        ("bf16", torch.float32, 0.25),
        ("fp16", torch.float32, 0.25),
        ("no", torch.bfloat16, 0.25),
    ],
)
def test_the_check_tolerates_what_rounding_explains(monkeypatch, precision, dtype, tolerance):
    model = make_model("qwen2", dtype).eval()
    for difference, is_tolerated in [(0, True), (0.9 * tolerance, True), (1.1 * tolerance, False)]:
        fake_difference(monkeypatch, difference)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sharing = prefix_sharing(models=[model], mixed_precision=precision)
            assert sharing.can_share(model, first_batch()) == is_tolerated
        assert is_tolerated or f"differ by up to {difference:.2g}" in str(caught[-1].message)


def test_the_check_tolerates_the_tolerance_itself(monkeypatch):
    fake_difference(monkeypatch, 0.25)
    assert prefix_sharing(mixed_precision="bf16").can_share(make_model("qwen2"), first_batch())


def test_log_probabilities_that_are_not_numbers_do_not_pass_the_check(monkeypatch):
    fake_difference(monkeypatch, float("nan"))
    with pytest.warns(UserWarning, match="differ by up to nan"):
        assert not prefix_sharing().can_share(make_model("qwen2"), first_batch())


@pytest.mark.parametrize("training", [False, True])
def test_the_check_is_made_once_in_evaluation_mode(monkeypatch, training):
    calls, model = fake_difference(monkeypatch, 0.0), make_model("qwen2").train(training)
    sharing = prefix_sharing(models=[model])
    for _ in range(2):
        assert sharing.can_share(model, first_batch())
        assert model.training == training
    assert calls == [(False, VOCABULARY, torch.device("cpu"))]


def test_one_process_that_differs_keeps_all_from_sharing(monkeypatch):
    fake_difference(monkeypatch, 0.0)
    devices = []

    def gather(local):
        devices.append(local.device.type)
        return torch.tensor([0.0, 0.5, 0.0])

    sharing = prefix_sharing(gather=gather)
    with pytest.warns(UserWarning, match="differ by up to 0.5"):
        assert not sharing.can_share(make_model("qwen2"), first_batch().to("meta"))
    assert devices == ["meta"]  # where the input is


@pytest.mark.parametrize("family", ["mamba", "opt", "qwen2"])
def test_dense_rows_by_choice_are_silent(family):
    model = make_model(family).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not PrefixSharing(False, [model], accelerator()).can_share(model, first_batch())
    assert not model.config._attn_implementation.startswith("prefix_sharing")


@pytest.mark.parametrize("family", [*FAMILIES, "ctrl"])
def test_who_can_share_does_so_silently(family):
    model = make_model(family).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharing = PrefixSharing("auto", [model], accelerator())
        assert sharing.can_share(model, first_batch())
    assert find_difference(model, VOCABULARY, torch.device("cpu")) <= EXACT


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("seed", range(3))
def test_no_model_is_silently_wrong(family, seed):
    """Whoever shares is exact, also on rows longer than the check's."""
    model = make_model(family).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = PrefixSharing("auto", [model], accelerator()).can_share(model, first_batch())
    if shares:
        rows = full_tree_rows(1, depth=3, length=10, seed=seed)
        difference = shared(model, rows).log_probs - dense(make_model(family).eval(), rows).log_probs
        assert difference.abs().max() <= 10 * EXACT


@pytest.mark.parametrize(
    "first_row", [[0] * 40, [7] * 40, [0] * 39 + [7], [5], [5, 6]], ids=["padding", "one_token", "end", "one", "two"]
)
def test_the_check_sees_through_any_first_row(first_row):
    """A row of left padding, or of one token again and again, must not hide that a model is not exact."""
    model = make_model("gemma3_bidirectional").eval()
    sharing = PrefixSharing("auto", [model], accelerator())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not sharing.can_share(model, torch.tensor([first_row]))


def test_the_check_measures_models_that_barely_differ_between_tokens():
    """Freshly initialised weights are small; a model that ignores the layout must be found nevertheless."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS["gemma3_bidirectional"]()).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    install(model)
    assert find_difference(model, VOCABULARY, torch.device("cpu")) > 1e-3


ROTATIONS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 31,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_that_depend_on_the_length_are_exact_or_refused(rotation):
    """Dense rows have 32 columns, but no position of a pack is the last column of a row."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        limit = 31 if rotation == "dynamic" else 128
        config = LlamaConfig(**{**SIZES, "max_position_embeddings": limit}, rope_parameters=ROTATIONS[rotation])
        models.append(AutoModelForCausalLM.from_config(config).eval())
        add_fused_lm_head(models[-1], outputs=("log_probs", "entropy"))
    packed, model = models
    if unsupported_reason(packed) is None:
        install(packed)
        rows = full_tree_rows(1, depth=3, length=8)
        assert (shared(packed, rows).log_probs - dense(model, rows).log_probs).abs().max() <= EXACT


def test_the_check_compares_with_dense_rows():
    """All of the columns asked for, 0 on padding, and the head computes nothing before them."""
    model, rows, outputs = make_model("qwen2"), random_rows(9), []
    width = rows.needed.size(1)
    expected = dense(model, rows).log_probs
    model.register_forward_hook(lambda module, args, result: outputs.append(result.log_probs))
    assert torch.equal(forward_dense(model, rows.input_ids, rows.attention_mask, width), expected)
    assert not rows.needed.all() and (expected[~rows.needed] == 0).all()
    assert (outputs[0][:, :-width] == 0).all()


def test_golden_rows_of_the_check():
    """Two rows that share a trunk, and one whose trunk comes later; all of them after a prompt and padding."""
    model, seen = shared_model("qwen2").eval(), []
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    find_difference(model, VOCABULARY, torch.device("cpu"))
    rows, packed = seen
    prompt, trunk = [11, 18, 1, 8, 15, 22, 5], [3, 8, 13, 18]
    assert rows["input_ids"].tolist() == [
        [*prompt, *trunk, 2, 13, 0, 11, 22, 9, 20],
        [*prompt, *trunk, 5, 18, 7, 20, 9, 22, 11],
        [*prompt, 8, 1, 18, 11, 4, 21, 14, *trunk],
    ]
    assert rows["attention_mask"].tolist() == [[0] + [1] * 17] * 3
    assert packed["input_ids"].numel() == 6 + 4 + 6 + (1 + 6) + (1 + 10)  # the last token of a row predicts nothing


def test_the_check_finds_a_difference_of_any_one_token(monkeypatch):
    model = shared_model("qwen2").eval()
    for row, column in itertools.product(range(3), range(11)):

        def forward(*args, where=(row, column)):
            outputs = forward_shared(*args)
            assert outputs.log_probs.shape == (3, 11)
            outputs.log_probs[where] += 1
            return outputs

        monkeypatch.setattr("treerpo_trl.prefix_sharing.forward.forward_shared", forward)
        assert find_difference(model, VOCABULARY, torch.device("cpu")) == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        ("config", "layer_types", ["b", "full_attention", "a"], "has layers of type a, b, whose state cannot branch"),
        ("", "_is_stateful", True, "carries a recurrent state"),
        ("model.norm", "sinks", torch.zeros(4), "has attention sinks"),
        ("config", "rope_parameters", {"rope_type": "dynamic"}, "has rotary positions (dynamic) that depend"),
        (
            "config",
            "rope_parameters",
            {"sliding": {"rope_type": "longrope"}, "full": {"rope_type": "default"}, "theta": 1.0},
            "has rotary positions (default, longrope) that depend",
        ),
        ("config", "is_encoder_decoder", True, "is an encoder-decoder model"),
        ("", "active_peft_config", SimpleNamespace(is_prompt_learning=True), "learns virtual tokens"),
        ("", "_supports_attention_backend", False, "does not take its attention from transformers"),
        ("config", "_attn_implementation", "flash_attention_2", "uses attn_implementation='flash_attention_2', not"),
    ],
)
def test_what_a_model_is_made_of_can_rule_sharing_out(owner, name, value, reason):
    model = make_model("qwen2")
    assert unsupported_reason(model) is None
    setattr(attrgetter(owner)(model) if owner else model, name, value)
    assert unsupported_reason(model).startswith(f"Qwen2ForCausalLM {reason}")


def test_the_text_model_of_several_is_looked_at():
    model = make_model("qwen2")
    model.config = LlavaConfig(text_config=OTHERS["qwen3_next"]())
    assert "linear_attention" in unsupported_reason(model)


def test_one_small_parameter_makes_low_precision():
    model = make_model("qwen2")
    assert not has_low_precision(model)
    model.lm_head.to(torch.bfloat16)
    assert has_low_precision(model)


# Chunks of rows


def run_chunks(sharing, model, rows, batch_size, missing=None, entropy=False, aux_loss=False):
    return sharing.forward(
        model, rows.input_ids, rows.attention_mask, rows.needed, missing, batch_size, entropy, aux_loss
    )


def chunks_of(rows, size):
    return [
        Rows(rows.input_ids[at : at + size], rows.attention_mask[at : at + size], rows.needed[at : at + size])
        for at in range(0, len(rows.needed), size)
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_chunks_of_rows_give_what_all_rows_give(batch_size):
    model, rows = make_model("qwen2"), random_rows(13, "some_tokens")
    sharing, missing = prefix_sharing(True, [model]), torch.randn(rows.needed.shape)
    expected = shared(model, rows, missing=missing)
    log_probs, entropy, aux_loss = run_chunks(sharing, model, rows, batch_size, missing, entropy=True)
    torch.testing.assert_close(log_probs, expected.log_probs, rtol=0, atol=EXACT)
    torch.testing.assert_close(entropy, expected.entropy, rtol=0, atol=EXACT)
    assert aux_loss is None
    log_probs, entropy, _ = run_chunks(sharing, model, rows, batch_size)
    torch.testing.assert_close(log_probs, expected.log_probs * rows.needed, rtol=0, atol=EXACT)
    assert entropy is None


def test_the_load_balancing_loss_of_chunks_is_their_mean():
    packed, model, rows = make_model("qwen3_moe"), make_model("qwen3_moe"), random_rows(13)
    _, _, actual = run_chunks(prefix_sharing(True, [packed]), packed, rows, 4, aux_loss=True)
    losses = [dense(model, chunk, output_router_logits=True).aux_loss for chunk in chunks_of(rows, 4)]
    assert len(losses) > 1
    assert abs(actual - sum(losses) / len(losses)) <= EXACT


def test_tokens_are_counted_where_there_is_a_gradient():
    model, rows = make_model("qwen2"), random_rows(13, "some_tokens")
    sharing = prefix_sharing(True, [model])
    for _ in range(2):
        run_chunks(sharing, model, rows, 4)
    with torch.no_grad():
        run_chunks(sharing, model, rows, 4)
    computed = [pack_rows(*vars(chunk).values()).input_ids.numel() for chunk in chunks_of(rows, 4)]
    assert sharing.take_token_counts() == (2 * rows.attention_mask.sum(), 2 * sum(computed))
    assert sharing.take_token_counts() == (0, 0)
    assert prefix_sharing(False).take_token_counts() == (1, 1)


# Generation and saving


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2", "mistral"])
def test_generation_is_untouched_between_steps(family):
    packed, model = shared_model(family), make_model(family)
    prompts = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    options = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 20, "do_sample": False}
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (packed, model)]
    for step in range(3):
        assert torch.equal(packed.generate(prompts, **options), model.generate(prompts, **options))
        rows = random_rows(step + 9)
        losses = [random_loss(outputs, rows.needed) for outputs in (shared(packed, rows), dense(model, rows))]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_nothing_of_it_is_saved(tmp_path):
    packed, rows = shared_model("qwen2"), random_rows(9)
    packed.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert "prefix_sharing" not in path.read_text()
    assert "attn_implementation" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        logits = reloaded(rows.input_ids, attention_mask=rows.attention_mask).logits
        expected = make_model("qwen2")(rows.input_ids, attention_mask=rows.attention_mask).logits
    assert torch.equal(logits, expected)


# Training


def load(family, make_args):
    """A model on disk, where the trainer finds the reference model."""
    path = Path(make_args().output_dir).parent / family
    if not path.exists():
        make_model(family).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def train(family, make_args, dataset, prefix_sharing, peft_config=None, **options):
    defaults = {
        "max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        "seed": 3, "prefix_sharing": prefix_sharing,
    }  # fmt: skip
    eval_dataset = options.pop("eval_dataset", None)
    trainer = TreeRPOTrainer(
        load(family, make_args), coin_reward, make_args(**{**defaults, **options}), train_dataset=dataset,
        eval_dataset=eval_dataset, processing_class=make_tokenizer(), peft_config=peft_config,
    )  # fmt: skip
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moves = {
        name: parameter.detach() - before[name]
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    return trainer, moves


def assert_same_training(family, make_args, dataset, tolerance=2e-4, **options):
    """Every parameter moves by the same amount with and without sharing."""
    (_, moves), (trainer, expected) = (
        train(family, make_args, dataset, prefix_sharing, **options) for prefix_sharing in (True, False)
    )
    floor = 1e-3 * max(move.abs().max() for move in expected.values())
    assert floor > 0
    for name, move in expected.items():
        error = ((moves[name] - move).abs().max() / move.abs().max().clamp(min=floor)).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
    return trainer


OPTIONS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "reference": {"beta": 0.1},
    "two_iterations": {"num_iterations": 2, "max_steps": 2, "beta": 0.1},
    "off_policy": {"per_device_train_batch_size": 8, "steps_per_generation": 2, "max_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "top_entropy": {"top_entropy_quantile": 0.5},
    "node_weights": {"loss_weighting": "node"},
    "temperature_and_entropy": {"temperature": 0.6, "entropy_coef": 0.05},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "truncated": {"mask_truncated_completions": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_training_step_is_the_dense_one(make_args, dataset, options):
    assert_same_training("qwen2", make_args, dataset, **options)


@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "num_iterations": 2, "max_steps": 2}], ids=["plain", "kl"])
def test_a_training_step_with_lora_is_the_dense_one(make_args, dataset, options):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    assert_same_training("qwen2", make_args, dataset, peft_config=lora, **options)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "mixtral"])
def test_a_training_step_of_other_families_is_the_dense_one(make_args, dataset, family):
    assert_same_training(family, make_args, dataset, num_iterations=2, max_steps=2, beta=0.1)


def test_a_training_step_with_the_load_balancing_loss_is_the_dense_one(make_args, dataset):
    assert_same_training("qwen3_moe", make_args, dataset, router_aux_loss_coef=0.3, prune_threshold=0.0)


def test_a_training_step_in_low_precision_is_near_the_dense_one(make_args, dataset):
    assert_same_training("qwen2", make_args, dataset, tolerance=0.2, bf16=True, use_cpu=True)


@pytest.mark.parametrize("family", ["gpt_oss", "opt", "qwen3_next"])
def test_who_cannot_share_trains_as_without_it(make_args, dataset, family):
    with pytest.warns(UserWarning, match="Training computes dense rows"):
        _, moves = train(family, make_args, dataset, "auto")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, expected = train(family, make_args, dataset, False)
    assert not any("dense rows" in str(warning.message) for warning in caught)
    for name, move in expected.items():  # with several threads, a mixture of experts adds in any order
        torch.testing.assert_close(moves[name], move, rtol=1e-4, atol=1e-6)


def test_virtual_tokens_train_as_without_sharing(make_args, dataset):
    """PEFT puts virtual tokens before the rows and drops position ids."""
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    _, moves = train("qwen2", make_args, dataset, "auto", peft_config=config)
    _, expected = train("qwen2", make_args, dataset, False, peft_config=config)
    assert all(torch.allclose(moves[name], move, atol=1e-7) for name, move in expected.items())


def test_a_first_row_of_padding_still_finds_out(make_args):
    """The first prompt is so much shorter than the others that the check's tokens would all be padding."""
    rows = Dataset.from_dict({"prompt": ["1=", "7+" * 25 + "1="] * 8})
    with pytest.warns(UserWarning, match="Training computes dense rows"):
        train("gemma3_bidirectional", make_args, rows, "auto")


class CountingTrainer(TreeRPOTrainer):
    """It records how many positions each forward pass for the loss computes."""

    def _compute_loss(self, model, inputs):
        def count(module, args, kwargs):
            self.positions.append(kwargs["input_ids"].numel())

        hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            hook.remove()


def test_the_loss_needs_fewer_positions_than_dense_rows(make_args, dataset):
    """Prefixes are computed once, and what pruned groups sampled is not computed."""
    counts = {}
    for prefix_sharing in (True, False):
        trainer = CountingTrainer(
            load("qwen2", make_args), coin_reward, make_args(prefix_sharing=prefix_sharing, max_steps=1, seed=3),
            train_dataset=dataset, processing_class=make_tokenizer(),
        )  # fmt: skip
        trainer.positions = []
        trainer.train()
        counts[prefix_sharing] = trainer.positions[-1]  # the first may be the check's
    distinct = 0
    for scored in trainer.last_trees:
        tree = scored.tree
        needed = {node for index, kept in enumerate(scored.kept) if kept for node in tree.path(index)}
        distinct += len(tree.prompt_ids) + sum(len(tree.nodes[node].token_ids) for node in needed)
        assert len(needed) < len(tree.nodes) - 1  # some are pruned
    assert counts[True] <= distinct + 8
    assert counts[True] < 0.7 * counts[False]


def test_evaluation_is_the_dense_one(make_args, dataset):
    losses = []
    for prefix_sharing in (True, False):
        trainer, _ = train(
            "qwen2", make_args, dataset, prefix_sharing, eval_dataset=dataset.select(range(4)), eval_strategy="steps",
            eval_steps=1, max_steps=2, num_generations_eval=4, per_device_eval_batch_size=8, beta=0.1,
        )  # fmt: skip
        losses.append([log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_tokens_left_out_of_the_loss_keep_their_old_log_probabilities(model, make_args, dataset):
    """Their ratio is 1 then. Any other filling could overflow it, and infinity times a mask of zero is NaN."""
    trainer = TreeRPOTrainer(
        model, coin_reward, make_args(prefix_sharing=True), train_dataset=dataset, processing_class=make_tokenizer()
    )
    input_ids = torch.tensor([[5, 6, 7, 8, 9, 10]] * 2)
    input_ids[1, 4:] = 11
    tool_mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    old = torch.full((2, 4), -200.0)
    trainer._loss_inputs = {"tool_mask": tool_mask, "old_per_token_logps": old}
    logps, _, _ = trainer._get_per_token_logps_and_entropies(model, input_ids, torch.ones_like(input_ids), 4)
    assert torch.equal(logps[tool_mask == 0], old[tool_mask == 0])
    assert (logps[tool_mask == 1] > -100).all()
