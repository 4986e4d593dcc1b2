"""Training adapters: what moves, the reference model, sampling, gradient checkpointing, saving, merging, going on."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from byte_llama import save_tiny_llama
from datasets import Dataset
from families import SIZES, Rows, dense
from peft import AutoPeftModelForCausalLM, IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_adapters import disturb, lora
from test_train_script import RUN, run_in_process
from tiny import CHARACTERS, EOS, PAD, coin_reward, make_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.growth import TreeShape, grow
from treerpo_trl.growth.backends import TransformersBackend


IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    """A tiny random Llama: `AutoTokenizer` leaves its saved tokenizer as it is, which it does not for a Qwen2."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(CHARACTERS) + 2})).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def base(model_path):
    return lambda: AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


class Recorder(TreeRPOTrainer):
    """It keeps the micro-batches that it has trained on, and the parameters that it started from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []
        self.before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def _compute_loss(self, model, inputs):
        self.batches.append(inputs)
        return super()._compute_loss(model, inputs)


def make_trainer(model, args, dataset, peft_config=None, **options) -> Recorder:
    return Recorder(
        model, coin_reward, args, train_dataset=dataset, processing_class=make_tokenizer(), peft_config=peft_config,
        **options,
    )  # fmt: skip


def train(model, args, dataset, peft_config=None, **options) -> Recorder:
    trainer = make_trainer(model, args, dataset, peft_config, **options)
    trainer.train()
    return trainer


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def logged(trainer, name) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# Training


STEPS = {
    "reentrant": (lora(), {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "not_reentrant": (lora(), {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    "saved_modules": (lora(modules_to_save=["lm_head", "embed_tokens"]), {"num_iterations": 2, "max_steps": 2}),
    "dora": (lora(use_dora=True, use_rslora=True), {}),
    "dropout_disabled": (lora(lora_dropout=0.5), {"disable_dropout": True}),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_is_the_dense_one_and_moves_the_adapter_only(base, make_args, dataset, case):
    """With the reference model, and with the gradient checkpointing that TRL switches on by default."""
    config, options = STEPS[case]
    options = {
        "beta": 0.1, "max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "seed": 3,
        "lr_scheduler_type": "constant", "gradient_checkpointing": "gradient_checkpointing_kwargs" in options,
        **options,
    }  # fmt: skip
    moves = {}
    for prefix_sharing in (True, False):
        torch.manual_seed(0)
        model = disturb(get_peft_model(base(), config))
        trainer = train(model, make_args(prefix_sharing=prefix_sharing, **options), dataset)
        after = dict(trainer.model.named_parameters())
        moves[prefix_sharing] = {
            name: after[name] - start for name, start in trainer.before.items() if after[name].requires_grad
        }
        frozen = [name for name in after if name not in moves[prefix_sharing]]
        assert all(torch.equal(after[name], trainer.before[name]) for name in frozen)
        assert frozen and all((move != 0).any() for move in moves[prefix_sharing].values())
    scale = max(move.abs().max() for move in moves[False].values())
    for name, move in moves[False].items():
        error = (moves[True][name] - move).abs().max() / move.abs().max().clamp(min=1e-3 * scale)
        assert error <= 2e-4, f"{name}: relative error {error:.1e}"


def test_every_flag_of_the_command_line_arrives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("length_rewards.py").write_text(
        "def length_reward(completions, **kwargs):\n    return [len(c[0]['content']) % 2 for c in completions]\n"
    )
    save_tiny_llama(tmp_path / "model")
    prompts = [[{"role": "user", "content": f"{i} + {i}"}] for i in range(8)]
    Dataset.from_dict({"prompt": prompts}).to_parquet("rows.parquet")
    config = {
        **RUN,
        "reward_funcs": ["length_rewards.length_reward"],
        "reward_weights": None,
        "dataset_solution_column": None,
    }
    config |= {"dataset_name": "rows.parquet", "model_name_or_path": "model", "output_dir": "out"}
    flags = "--use_peft --lora_r 3 --lora_alpha 5 --lora_dropout 0.25 --lora_target_modules all-linear --use_rslora "
    flags += "--use_dora --lora_modules_to_save lm_head --lora_task_type CAUSAL_LM --beta 0.1"
    run_in_process(config, *flags.split())
    saved = json.loads(Path("out/adapter_config.json").read_text())
    expected = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "use_rslora": True, "use_dora": True}
    assert {name: saved[name] for name in expected} == expected
    assert saved["modules_to_save"] == ["lm_head"] and saved["task_type"] == "CAUSAL_LM"
    layers = {name.rsplit(".")[-1] for name in saved["target_modules"]}
    assert layers == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    adapter = load_file("out/adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in adapter) and any("lm_head" in name for name in adapter)


# The reference model


def reference_error(batch, reference) -> float:
    """Largest difference of a batch's reference log-probabilities from those of `reference`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    needed = batch["completion_mask"].bool()
    with torch.no_grad():
        expected = dense(reference, Rows(ids, mask, needed)).log_probs
    return (batch["ref_per_token_logps"] - expected)[needed].abs().max().item()


def with_head(model):
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


@pytest.mark.parametrize("config", [lora(), lora(modules_to_save=["lm_head", "embed_tokens"])], ids=["lora", "saved"])
def test_the_reference_of_a_new_adapter_is_the_base_model(base, make_args, dataset, config):
    trainer = train(base(), make_args(beta=0.1, max_steps=3), dataset, config)
    assert trainer.ref_model is None and set(trainer.model.peft_config) == {"default"}
    kl = logged(trainer, "kl")
    assert abs(kl[0]) < 1e-6 and kl[2] > 1e-4
    assert all(reference_error(batch, with_head(base())) < 1e-5 for batch in trainer.batches)


CONTINUED = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "saved_modules": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": lora(trainable_token_indices=list(range(2, 12))),
    "ia3": IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


@pytest.fixture
def adapter_path(base, tmp_path):
    def save(config) -> str:
        path = tmp_path / "adapter"
        disturb(get_peft_model(base(), config), 0.3).save_pretrained(path)
        return str(path)

    return save


@pytest.mark.parametrize("kind", CONTINUED)
def test_the_reference_of_a_continued_adapter_is_its_start(base, adapter_path, make_args, dataset, kind):
    path = adapter_path(CONTINUED[kind])
    model = PeftModel.from_pretrained(base(), path, is_trainable=True)
    trainer = train(model, make_args(beta=0.1, max_steps=3), dataset)
    kl = logged(trainer, "kl")
    assert abs(kl[0]) < 1e-6 and kl[2] > 1e-4
    start = PeftModel.from_pretrained(with_head(base()), path)
    assert all(reference_error(batch, start) < 1e-5 for batch in trainer.batches)
    assert reference_error(trainer.batches[0], with_head(base())) > 0.1
    after = dict(trainer.model.named_parameters())
    assert not any(after[name].requires_grad for name in after if "ref" in name.split("."))


# Sampling


def greedy_trees(model, prompts, shape):
    backend = TransformersBackend(
        model, GenerationConfig(do_sample=False, pad_token_id=PAD, eos_token_id=EOS), [EOS], PAD, max_rows=64
    )
    trees = grow(prompts, shape, backend)
    assert backend.fork_caches
    return trees


def plain(model, prompt, length) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
    return tuple(tokens.tolist())


@pytest.mark.parametrize(
    "config", [lora(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")], ids=["lora", "virtual_tokens"]
)
def test_branches_from_forked_caches_are_what_the_adapted_model_generates(base, config):
    """Prompts of one length: where rows are padded, PEFT's virtual tokens are further from what they precede."""
    model, shape = disturb(get_peft_model(base(), config), 0.3).eval(), TreeShape((2, 2, 2), 4, 12)
    prompts = [[3, 5, 6, 7], [5, 6, 2, 2], [9, 3, 4, 8]]
    for prompt, tree in zip(prompts, greedy_trees(model, prompts, shape), strict=True):
        expected = plain(model, prompt, shape.max_completion_length)
        assert {tuple(tree.completion_ids(leaf)) for leaf in tree.leaves} == {expected}
    assert any(plain(base(), prompt, 12) != plain(model, prompt, 12) for prompt in prompts)


# Saving, merging, going on


@pytest.mark.parametrize("kind", ["lora", "dora", "saved_modules"])
def test_an_adapter_is_saved_loaded_merged_and_continued(model_path, make_args, dataset, tmp_path, kind):
    args = make_args(beta=0.1, max_steps=2, model_init_kwargs={"dtype": "float32"})
    trainer = train(model_path, args, dataset, CONTINUED[kind])
    trainer.save_model(str(tmp_path / "adapter"))
    expected = logits(trainer.model)

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    for name, model in {"loaded": loaded, "trained": trainer.model}.items():
        model.merge_and_unload().save_pretrained(tmp_path / name)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert "prefix_sharing" not in (tmp_path / name / "config.json").read_text()
        assert {type(parameter) for parameter in merged.parameters()} == {torch.nn.Parameter}
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)

    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    continued = train(again, make_args(beta=0.1, max_steps=2), dataset)
    kl = logged(continued, "kl")
    assert abs(kl[0]) < 1e-6 and kl[1] > 1e-5
    continued.save_model(str(tmp_path / "continued"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "continued")  # and not the reference, saved beside it
    assert (tmp_path / "continued" / "ref").is_dir()
    torch.testing.assert_close(logits(loaded), logits(continued.model), rtol=0, atol=1e-5)
    assert (logits(loaded) - expected).abs().max() > 1e-3


def test_a_continued_run_resumes_with_its_reference(base, adapter_path, make_args, dataset):
    path = adapter_path(lora())

    def make(**options):
        model = PeftModel.from_pretrained(base(), path, is_trainable=True)
        return make_trainer(model, make_args(beta=0.1, save_strategy="steps", save_steps=2, **options), dataset)

    straight = make(max_steps=4)
    straight.train()
    resumed = make(max_steps=4)
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-2"))
    start = PeftModel.from_pretrained(with_head(base()), path)
    assert reference_error(resumed.batches[0], start) < 1e-5
    assert logged(resumed, "kl")[:2] == logged(straight, "kl")[:2]
    expected = dict(straight.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)
