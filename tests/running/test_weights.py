"""Weights of a checkpoint come back, all of them, for every family; upstream's way alone loses some."""

import copy
import inspect
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES, OTHERS, SIZES, make_model
from peft import IA3Config, LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, spread_reward
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LagunaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
)

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.running.weights import is_converted_when_saved, restore_weights


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGES = {**VISION, "image_size": 16, "patch_size": 8}


def gemma3_multimodal():
    text = {**SIZES, "head_dim": 8}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=IMAGES, mm_tokens_per_image=4, image_token_index=3, boi_token_index=4,
            eoi_token_index=5,
        )
    )  # fmt: skip


def llava():
    text = {**SIZES, "model_type": "qwen2"}
    vision = {**IMAGES, "model_type": "clip_vision_model", "projection_dim": 32}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=3))


def laguna():
    return AutoModelForCausalLM.from_config(
        LagunaConfig(
            **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
        )
    )  # fmt: skip


MODELS = {name: partial(make_model, name) for name in (*FAMILIES, *OTHERS)}
MODELS |= {"gemma3_multimodal": gemma3_multimodal, "llava": llava, "laguna": laguna}
# Families whose files differ from the model in memory, as transformers stands.
CONVERTED = {
    "gpt_neox", "qwen3_moe", "qwen2_moe", "mixtral", "afmoe", "deepseek_v3", "qwen3_next", "phimoe",
    "gemma3_multimodal", "llava", "laguna",
}  # fmt: skip


def disturb(model, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def load_as_upstream(model, folder: Path) -> None:
    """What `Trainer` does with the files of a checkpoint."""
    files = {}
    for path in folder.glob("*.safetensors"):
        files |= load_file(path)
    model.load_state_dict(files, strict=False)


def differing(model, other) -> list[str]:
    parameters = dict(other.named_parameters())
    return [name for name, value in model.named_parameters() if not torch.equal(value, parameters[name])]


@pytest.mark.parametrize("from_disk", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize("family", MODELS)
def test_every_weight_comes_back(family, from_disk, tmp_path):
    """To a model that was made in code, and to one that was loaded, which remembers how its files were converted."""
    torch.manual_seed(0)
    model = MODELS[family]()
    if from_disk:
        model.save_pretrained(tmp_path / "first")
        model = type(model).from_pretrained(tmp_path / "first", dtype=torch.float32)
    saved, other = disturb(copy.deepcopy(model), 1), disturb(copy.deepcopy(model), 2)
    places = {name: parameter.data_ptr() for name, parameter in other.named_parameters()}
    saved.save_pretrained(tmp_path / "checkpoint")
    state = torch.get_rng_state()
    restore_weights(other, tmp_path / "checkpoint", lambda: load_as_upstream(other, tmp_path / "checkpoint"))
    assert differing(saved, other) == []
    assert {name: parameter.data_ptr() for name, parameter in other.named_parameters()} == places
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", MODELS)
def test_upstream_alone_loses_weights_of_the_families_that_are_converted(family, tmp_path):
    """So that the tests here find the fault where it is not put right."""
    torch.manual_seed(0)
    saved = disturb(MODELS[family](), 1)
    assert is_converted_when_saved(saved) == (family in CONVERTED)
    saved.save_pretrained(tmp_path)
    other = disturb(copy.deepcopy(saved), 2)
    load_as_upstream(other, tmp_path)
    assert bool(differing(saved, other)) == (family in CONVERTED)


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules="all-linear"),
    "experts": LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "head": LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "bias": LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    "ia3": IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def adapt(model, kind: str):
    """PEFT writes into a configuration what it finds in the model, so each model gets its own."""
    return get_peft_model(model, copy.deepcopy(ADAPTERS[kind]))


def trained(model) -> dict:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("qwen3_moe", kind) for kind in ADAPTERS),
        *((family, "lora") for family in ("laguna", "gemma3_multimodal")),
        ("mixtral", "experts"),
    ],
)  # fmt: skip
def test_every_weight_of_an_adapter_comes_back(family, kind, tmp_path):
    torch.manual_seed(0)
    base = MODELS[family]()
    saved, other = (disturb(adapt(copy.deepcopy(base), kind), seed) for seed in (1, 2))
    saved.save_pretrained(tmp_path)
    restore_weights(other, tmp_path, lambda: other.load_adapter(str(tmp_path), "default", is_trainable=True))
    assert trained(saved).keys() == trained(other).keys()
    for name, value in trained(saved).items():
        assert torch.equal(value, trained(other)[name]), name


def test_peft_alone_loses_weights_of_an_adapter_that_it_renames(tmp_path):
    base = laguna()
    saved, other = (disturb(adapt(copy.deepcopy(base), "lora"), seed) for seed in (1, 2))
    saved.save_pretrained(tmp_path)
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert not all(torch.equal(value, trained(other)[name]) for name, value in trained(saved).items())


# What does not come back is an error that names it


def change_file(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_weight_that_the_checkpoint_lacks_is_named(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"
    change_file(tmp_path / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"does not restore every parameter .*: {name}.* leaves them out"):
        restore_weights(model, tmp_path, lambda: load_as_upstream(model, tmp_path))


def test_a_part_that_is_not_saved_with_the_model_is_named(tmp_path):
    """A head of the user's own, which no `from_pretrained` would know."""
    model = make_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    model.value_head = torch.nn.Linear(4, 1)
    with pytest.raises(RuntimeError, match=r"value_head\.weight"):
        restore_weights(model, tmp_path, lambda: load_as_upstream(model, tmp_path))
    plain = make_model("qwen2")
    plain.save_pretrained(tmp_path / "plain")
    plain.value_head = torch.nn.Linear(4, 1)
    with pytest.raises(ValueError, match=r"value_head\.weight, value_head\.bias"):
        restore_weights(plain, tmp_path / "plain", lambda: load_as_upstream(plain, tmp_path / "plain"))


def test_a_weight_that_was_not_loaded_is_named(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: model\.norm\.weight\. Either"):
        restore_weights(model, tmp_path, lambda: None)


def test_a_weight_of_an_adapter_that_does_not_come_back_is_named(tmp_path):
    model = adapt(make_model("qwen2"), "lora")
    model.save_pretrained(tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change_file(tmp_path / "adapter_model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f": {name}. Either"):
        restore_weights(model, tmp_path, lambda: model.load_adapter(str(tmp_path), "default", is_trainable=True))


def test_a_trained_weight_of_the_base_model_which_no_adapter_holds_is_named(tmp_path):
    model = adapt(make_model("qwen2"), "lora")
    model.base_model.model.model.norm.weight.requires_grad = True
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r": base_model\.model\.model\.norm\.weight\. Either"):
        restore_weights(model, tmp_path, lambda: model.load_adapter(str(tmp_path), "default", is_trainable=True))


def test_an_encoder_of_virtual_tokens_of_which_peft_saves_the_output_alone_is_refused(tmp_path):
    config = PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
    model = disturb(get_peft_model(make_model("qwen2"), config), 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prompt_embeddings"):
        restore_weights(model, tmp_path, lambda: model.load_adapter(str(tmp_path), "default", is_trainable=True))


def test_nan_comes_back_as_nan_and_files_in_parts_are_read(tmp_path):
    model = make_model("qwen3_moe")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    other = disturb(copy.deepcopy(model), 2)
    restore_weights(other, tmp_path, lambda: pytest.fail("the files are converted"))
    assert [name for name in differing(model, other) if name != "model.norm.weight"] == []
    assert other.model.norm.weight[0].isnan() and torch.equal(other.model.norm.weight[1:], model.model.norm.weight[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_any_precision_come_back_exactly(dtype, tmp_path):
    model = make_model("qwen3_moe", dtype)
    model.lm_head.to(torch.float32)  # some keep parts in another precision
    saved, other = (disturb(copy.deepcopy(model), seed) for seed in (1, 2))
    saved.save_pretrained(tmp_path)
    restore_weights(other, tmp_path, lambda: pytest.fail("the files are converted"))
    assert differing(saved, other) == []
    assert other.lm_head.weight.dtype == torch.float32 and other.model.norm.weight.dtype == dtype


# Whole runs


class Run:
    """Trains a family in a folder, 4 steps, saving each."""

    def __init__(self, family, make_args, dataset, adapter):
        self.family, self.make_args, self.dataset, self.adapter = family, make_args, dataset, adapter

    def train(self, folder, resume=None, before=None, **options):
        torch.manual_seed(0)
        args = self.make_args(
            output_dir=str(folder), save_strategy="steps", save_steps=1, segment_length=3, max_depth=2,
            per_device_train_batch_size=4, max_steps=4, **options,
        )  # fmt: skip
        trainer = TreeRPOTrainer(
            MODELS[self.family](), spread_reward, args, train_dataset=self.dataset,
            eval_dataset=self.dataset.select([0]), processing_class=make_tokenizer(),
            peft_config=copy.deepcopy(self.adapter),
        )  # fmt: skip
        if before is not None:
            before(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer


@pytest.fixture
def run(make_args, dataset):
    return lambda family, adapter=None: Run(family, make_args, dataset, adapter)


WHOLE = {
    "experts": ("qwen3_moe", None),
    "multimodal": ("gemma3_multimodal", None),
    "head": ("gpt_neox", None),
    "adapter of experts": ("qwen3_moe", ADAPTERS["experts"]),
    "renamed adapter": ("laguna", ADAPTERS["lora"]),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_resumed_run_ends_as_an_unbroken_one(case, run, tmp_path):
    runs = run(*WHOLE[case])
    unbroken = runs.train(tmp_path / "unbroken").model
    resumed = runs.train(tmp_path / "unbroken", resume=str(tmp_path / "unbroken" / "checkpoint-2")).model
    assert differing(unbroken, resumed) == []


@pytest.mark.parametrize("case", ["experts", "renamed adapter"])
def test_without_the_fix_a_resumed_run_ends_otherwise(case, run, tmp_path, monkeypatch):
    runs = run(*WHOLE[case])
    unbroken = runs.train(tmp_path / "unbroken").model
    monkeypatch.setattr("treerpo_trl.trainers.resuming.restore_weights", lambda model, folder, load: load())
    resumed = runs.train(tmp_path / "unbroken", resume=str(tmp_path / "unbroken" / "checkpoint-2")).model
    assert differing(unbroken, resumed)


@pytest.mark.parametrize("case", ["experts", "renamed adapter"])
def test_the_best_model_comes_back_whole_at_the_end(case, run, tmp_path):
    """The first of four steps is the best: the reward of an evaluation falls from then on."""
    runs = run(*WHOLE[case])
    best = {}

    def worsen(trainer):
        evaluate = trainer.evaluate

        def evaluate_worse(*args, **kwargs):
            metrics = evaluate(*args, **kwargs) | {"eval_reward": -float(trainer.state.global_step)}
            trainer._determine_best_metric(metrics, trial=None)
            if trainer.state.global_step == 1:
                best.update({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
            return metrics

        trainer.evaluate = evaluate_worse

    trainer = runs.train(
        tmp_path / "run", before=worsen, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_reward", greater_is_better=True, num_generations_eval=1,
        per_device_eval_batch_size=1,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, best[name]), name


def test_what_upstream_does_is_still_what_these_tests_rest_on():
    """`load_as_upstream` stands for these methods."""
    for name in ("_load_from_checkpoint", "_load_best_model"):
        assert "load_state_dict(state_dict, False)" in inspect.getsource(getattr(Trainer, name)), name
