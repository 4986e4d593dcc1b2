"""Every kind of adapter: packed rows are dense rows, or a refusal says why not before anything is trained."""

import copy
from types import SimpleNamespace

import pytest
import torch
from families import VOCABULARY, dense, make_model, random_rows
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    CartridgeConfig,
    CPTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from test_prefix_sharing import EXACT, assert_exact, shared
from tiny import coin_reward, make_tokenizer
from transformers import AutoModelForCausalLM

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.checks.adapters import check_adapter
from treerpo_trl.prefix_sharing import find_difference, install, unsupported_reason


LINEAR = ["q_proj", "v_proj", "down_proj"]
DRAWS = 80  # of dropout


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


KINDS = {
    "lora": lora(),
    "biases": lora(bias="all"),
    "rank_stabilized": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "saved_head": lora(modules_to_save=["lm_head"]),
    "saved_head_and_embedding": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lora(trainable_token_indices=[3, 4, 5]),
    "parameters": lora(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"]),
    "adalora": AdaLoraConfig(target_modules=LINEAR, total_step=10, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"),
    "oft": OFTConfig(oft_block_size=4, target_modules=LINEAR, task_type="CAUSAL_LM"),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
    "only_tokens": TrainableTokensConfig(token_indices=[3, 4, 5], task_type="CAUSAL_LM"),
}


def disturb(model: PeftModel, scale: float = 0.1) -> PeftModel:
    """Move every parameter of the adapter, as training would: adapters begin as the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def adapt(config, family: str = "qwen2") -> PeftModel:
    """A random model with the adapter. The same configuration gives the same weights."""
    return disturb(get_peft_model(make_model(family), copy.deepcopy(config)))


def pair(config, family: str = "qwen2") -> tuple[PeftModel, PeftModel]:
    packed, model = adapt(config, family), adapt(config, family)
    assert unsupported_reason(packed) is None
    install(packed)
    return packed, model


# Exactness


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_dense_rows(kind):
    """Log-probabilities, entropies, and the gradient of the adapter, which is all that has one."""
    packed, model = (each.train() for each in pair(KINDS[kind]))
    assert find_difference(packed, VOCABULARY, torch.device("cpu")) <= EXACT
    for seed, needed in enumerate(["all", "some_tokens", "some_rows"]):
        rows = random_rows(seed, needed)
        assert_exact(packed, model, rows)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name, p in model.named_parameters() if p.requires_grad
        }
    difference = dense(model, rows).log_probs - dense(make_model("qwen2"), rows).log_probs
    assert difference.abs().max() > 0.01  # the adapter does something


def test_adapted_experts_are_packed_exactly():
    """The experts of a mixture are parameters and not layers: `--lora_target_parameters`."""
    experts = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    packed, model = pair(experts, "mixtral")
    assert_exact(packed, model, random_rows(9))


def test_the_active_adapter_of_several_is_packed():
    models = pair(lora())
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("second", lora(init_lora_weights=False))
    rows = random_rows(9)
    outputs = []
    for active in ("default", "second"):
        for model in models:
            model.set_adapter(active)
        assert_exact(*models, rows)
        outputs.append(dense(models[1], rows).log_probs)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


def test_an_adapter_that_is_switched_off_is_not_packed():
    """How reference log-probabilities are computed. Layers that were saved as a whole are switched off, too."""
    packed, _ = pair(KINDS["saved_head_and_embedding"])
    rows = random_rows(9)
    with packed.disable_adapter():
        actual = shared(packed, rows).log_probs
    assert (actual - dense(make_model("qwen2"), rows).log_probs).abs().max() <= EXACT


def test_dropout_of_packed_rows_is_that_of_dense_rows():
    """Each row's log-probabilities have the same mean over many draws of dropout, within five standard errors."""
    packed, model = (each.train() for each in pair(lora(lora_dropout=0.3)))
    rows = random_rows(9)
    draws = {}
    with torch.no_grad():
        for name, compute in {"packed": lambda: shared(packed, rows), "dense": lambda: dense(model, rows)}.items():
            draws[name] = torch.stack([compute().log_probs[rows.needed] for _ in range(DRAWS)])
        error = ((draws["packed"].var(0) + draws["dense"].var(0)) / DRAWS).sqrt()
        assert all(draw.std(0).min() > 0.03 for draw in draws.values())  # dropout is active in both
        assert ((draws["packed"].mean(0) - draws["dense"].mean(0)).abs() <= 5 * error).all()
        exact = [each.eval() for each in (packed, model)]
        assert (shared(exact[0], rows).log_probs - dense(exact[1], rows).log_probs)[rows.needed].abs().max() <= EXACT


# Refusals


def virtual(kind, **options):
    return kind(**{"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", **options})


REFUSALS = {
    "prefix_tuning": (virtual(PrefixTuningConfig), "PrefixTuningConfig: its virtual tokens stand in the key-value"),
    "cartridge": (virtual(CartridgeConfig), "CartridgeConfig: its virtual tokens stand in the key-value"),
    "multitask": (virtual(MultitaskPromptTuningConfig, num_tasks=2), "MultitaskPromptTuningConfig: .* task"),
    "poly": (PolyConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), "PolyConfig: .* task"),
    "cpt": (
        CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3], cpt_mask=[1], cpt_tokens_type_mask=[1]),
        "CPTConfig: .* fused head",
    ),
    "xlora": (XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={}), "XLoraConfig: .* fused head"),
    "invoked": (lora(target_modules=["q_proj"], alora_invocation_tokens=[5, 6]), r"alora_invocation_tokens=\[5, 6\]"),
    "pissa": (lora(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the weights of the base model"),
    "pissa_niter": (lora(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' changes"),
    "olora": (lora(init_lora_weights="OLoRA"), "init_lora_weights='OLoRA' changes"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_trees_cannot_train_is_refused(model, make_args, dataset, kind):
    config, message = REFUSALS[kind]
    with pytest.raises(ValueError, match=message):
        TreeRPOTrainer(
            model, coin_reward, make_args(beta=0.1), train_dataset=dataset, processing_class=make_tokenizer(),
            peft_config=config,
        )  # fmt: skip


def test_without_a_reference_model_the_base_may_change(model):
    check_adapter(model, REFUSALS["pissa"][0], beta=0.0)


def test_an_adapter_on_the_head_is_refused(model, make_args, dataset):
    """By TRL: its fused head takes the weights of the head alone."""
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        TreeRPOTrainer(
            model, coin_reward, make_args(), train_dataset=dataset, processing_class=make_tokenizer(),
            peft_config=lora(target_modules=["q_proj", "lm_head"]),
        )  # fmt: skip


@pytest.fixture
def adapter_path(model, tmp_path) -> str:
    path = tmp_path / "adapter"
    get_peft_model(model, lora(init_lora_weights=False)).save_pretrained(path)
    return str(path)


LOADS = {
    "as_a_path": (lambda base, path: path, "is an adapter, not a model.*is_trainable=True"),
    "frozen": (
        PeftModel.from_pretrained,
        "no parameter of the PeftModelForCausalLM can be trained.*is_trainable=True",
    ),
    "without_peft": (
        lambda base, path: AutoModelForCausalLM.from_pretrained(path),
        "no parameter of the Qwen2ForCausalLM can be trained.*is_trainable=True",
    ),
    "by_another_name": (
        lambda base, path: PeftModel.from_pretrained(base, path, adapter_name="mine", is_trainable=True),
        "the active adapter is 'mine', but beta=0.1 needs a reference",
    ),
}


@pytest.mark.parametrize("way", LOADS)
def test_adapters_that_would_not_be_trained_are_refused(model_path, adapter_path, make_args, dataset, way):
    """Upstream trains nothing with the first three, or fails with an error of torch's."""
    load, message = LOADS[way]
    model = load(AutoModelForCausalLM.from_pretrained(model_path), adapter_path)
    with pytest.raises(ValueError, match=message):
        TreeRPOTrainer(
            model, coin_reward, make_args(beta=0.1), train_dataset=dataset, processing_class=make_tokenizer()
        )


def test_adapters_that_can_be_trained_pass(model_path, adapter_path):
    for load in (
        PeftModel.from_pretrained,
        lambda _, path, **options: AutoPeftModelForCausalLM.from_pretrained(path, **options),
    ):
        check_adapter(
            load(AutoModelForCausalLM.from_pretrained(model_path), adapter_path, is_trainable=True), None, 0.1
        )
    base = AutoModelForCausalLM.from_pretrained(model_path)
    check_adapter(PeftModel.from_pretrained(base, adapter_path, adapter_name="mine", is_trainable=True), None, 0.0)
    check_adapter(SimpleNamespace(), virtual(PromptTuningConfig), 0.1)
    check_adapter("some/model", virtual(PromptEncoderConfig, encoder_hidden_size=8), 0.1)
