"""Adapters on models of 4 and 8 bits, with bitsandbytes itself on the CPU: gradients, steps, saving, and mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from families import SIZES, dense, random_rows
from peft import AutoPeftModelForCausalLM, get_peft_model
from places import ROOT
from safetensors.torch import load_file
from test_adapters import disturb, lora
from test_lora import logged, logits, train
from test_prefix_sharing import assert_close_gradients, gradients, random_loss, shared
from test_train_script import RUN, run_in_process
from tiny import CHARACTERS, coin_reward, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_quantization_config
from trl.trainer.utils import add_fused_lm_head

from treerpo_trl import TreeRPOTrainer
from treerpo_trl.checks.adapters import check_quantization, prepare_adapter
from treerpo_trl.prefix_sharing import install


def reason_to_skip() -> str | None:
    """Why bitsandbytes cannot run here, if it cannot: it has no kernels for some processors."""
    if not is_bitsandbytes_available():
        return "bitsandbytes is not installed"
    try:
        from bitsandbytes.nn import Linear4bit

        Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")(torch.ones(1, 64))
    except Exception as error:
        return f"bitsandbytes does not run on this CPU: {type(error).__name__}: {error}"
    return None


REASON = reason_to_skip()
needs_bitsandbytes = pytest.mark.skipif(REASON is not None, reason=REASON or "")

FLAGS = {
    "nf4": {"load_in_4bit": True},
    "nf4_nested": {"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "bfloat16"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def quantization(name) -> BitsAndBytesConfig:
    """As TRL's command line makes it."""
    return get_quantization_config(ModelConfig(**FLAGS[name]))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    """A Llama, whose layers have no bias, with weights of a whole block of 64 in each row."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(CHARACTERS) + 2, "hidden_size": 64, "intermediate_size": 128}
    path = tmp_path_factory.mktemp("quantized")
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def load(model_path, name, **options):
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, quantization_config=quantization(name), **options
    )
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def adapt(model):
    torch.manual_seed(0)
    return get_peft_model(model, lora(init_lora_weights=False)).train()


def loss_gradients(model, rows, compute):
    outputs = compute(model, rows)
    return outputs.log_probs.detach(), gradients(model, random_loss(outputs, rows.needed))


# Gradients


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("compute", [shared, dense], ids=["packed", "dense"])
def test_the_gradient_is_that_of_the_dequantized_weights(model_path, name, compute):
    """Also after an evaluation, for which bitsandbytes repacks weights of 4 bits on some processors."""
    exact, model = adapt(load(model_path, name).dequantize()), adapt(load(model_path, name))
    prepare_adapter(model, beta=0.0)
    for each in (exact, model):
        install(each)
    rows = random_rows(9)
    for _ in range(2):
        actual, expected = (loss_gradients(each, rows, compute) for each in (model, exact))
        assert (actual[0] - expected[0])[rows.needed].abs().max() <= 1e-4
        assert_close_gradients(actual[1], expected[1], tolerance=2e-3 if name == "int8" else 1e-4)
        with torch.no_grad():
            dense(model.eval(), rows)
        model.train()


@needs_bitsandbytes
def test_weights_that_were_packed_for_inference_are_refused(model_path, make_args, dataset):
    from bitsandbytes.functional import has_avx512bf16

    model = adapt(load(model_path, "nf4")).eval()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    if not has_avx512bf16():
        return prepare_adapter(model, beta=0.0)  # nothing was packed
    with pytest.raises(ValueError, match=r"packed for inference on this CPU.*Load it again"):
        train(model, make_args(), dataset)


# Training


STEPS = {
    "nf4": {"bf16": True, "use_cpu": True},
    "nf4_nested": {"gradient_checkpointing": True},
    "int8": {},
}


@needs_bitsandbytes
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_near_the_dense_one_and_moves_the_adapter_only(model_path, make_args, dataset, name):
    """TRL trains adapters of quantized models in bfloat16, so packed and dense rows are equal but for its rounding."""
    moves = {}
    for prefix_sharing in ("auto", False):
        args = make_args(
            prefix_sharing=prefix_sharing, beta=0.1, max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0.0,
            lr_scheduler_type="constant", seed=3, model_init_kwargs={"dtype": "float32"}, eval_on_start=True,
            num_generations_eval=2, **STEPS[name],
        )  # fmt: skip
        trainer = train(
            model_path, args, dataset, lora(init_lora_weights=False), quantization_config=quantization(name),
            eval_dataset=dataset.select(range(2)),
        )  # fmt: skip
        assert trainer._prefix_sharing.is_active == bool(prefix_sharing)
        after = dict(trainer.model.named_parameters())
        trained = [name for name, parameter in after.items() if parameter.requires_grad]
        assert all(torch.equal(after[name], trainer.before[name]) for name in after if name not in trained)
        assert {after[name].dtype for name in trained} == {torch.bfloat16}
        assert all((after[name] != trainer.before[name]).any() for name in trained)
        moves[prefix_sharing] = torch.cat([(after[name] - trainer.before[name]).flatten().float() for name in trained])
    error = (moves["auto"] - moves[False]).norm() / moves[False].norm()
    assert error < 0.03, f"relative error {error:.1e}"


@needs_bitsandbytes
def test_an_adapter_is_saved_loaded_and_continued(model_path, make_args, dataset, tmp_path):
    options = {"dtype": torch.float32, "quantization_config": quantization("nf4")}
    args = make_args(beta=0.1, max_steps=2, model_init_kwargs={"dtype": "float32"})
    trainer = train(model_path, args, dataset, lora(), quantization_config=quantization("nf4"))
    kl = logged(trainer, "kl")
    assert abs(kl[0]) < 1e-6 and kl[1] > 1e-4  # the reference is the quantized base
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    prepare_adapter(loaded, beta=0.0)  # bitsandbytes infers in bfloat16 on some processors
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()  # as TRL trains it
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=1e-5)

    # Parameters that are no numbers of bfloat16, to which TRL rounds the adapter but not its reference.
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True, **options)
    continued = train(disturb(again), make_args(beta=0.1, max_steps=2), dataset)
    kl = logged(continued, "kl")
    assert abs(kl[0]) < 1e-9 and kl[1] > 1e-4


# The command line


@pytest.fixture
def run_file(model_path, tmp_path, monkeypatch) -> dict:
    """The configuration of a run, in a folder that has all it needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("length.py").write_text("def reward(completions, **kwargs):\n    return [len(c) % 2 for c in completions]\n")
    Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(8)]}).to_parquet("rows.parquet")
    changes = {"reward_funcs": ["length.reward"], "reward_weights": None, "dataset_solution_column": None}
    return {**RUN, **changes, "dataset_name": "rows.parquet", "model_name_or_path": model_path, "output_dir": "out"}


@needs_bitsandbytes
def test_the_flags_of_the_command_line_train_a_quantized_model(run_file):
    run_in_process(run_file, "--use_peft", "--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant")
    adapter = load_file("out/adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.bfloat16}  # TRL's, on quantized models only
    assert all(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantized_weights_without_an_adapter_are_refused_before_anything_is_loaded(run_file, flag):
    nothing = {"dataset_name": "missing.parquet", "model_name_or_path": "no/such-model"}
    with pytest.raises((ValueError, ImportError), match=f"{flag} (is set, but weights|needs bitsandbytes)"):
        run_in_process({**run_file, **nothing, flag: True})


def test_quantization_in_the_keyword_arguments_of_the_model_is_seen(make_args, dataset):
    args = make_args(model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)})
    with pytest.raises((ValueError, ImportError), match=r"load_in_8bit (is set, but weights|needs bitsandbytes)"):
        TreeRPOTrainer("no/such-model", coin_reward, args, train_dataset=dataset, processing_class=make_tokenizer())


def test_models_that_are_loaded_and_other_quantizations_are_left_to_upstream(model_path):
    check_quantization(AutoModelForCausalLM.from_pretrained(model_path), BitsAndBytesConfig(load_in_4bit=True), None)
    check_quantization("no/such-model", object(), None)
    check_quantization("no/such-model", None, None)


# Hides bitsandbytes from Python, as if it were not installed.
WITHOUT_BITSANDBYTES = """
import runpy, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "bitsandbytes" else PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_without_bitsandbytes_the_error_names_the_extra_before_anything_is_loaded(run_file):
    script = [str(ROOT / "examples" / "train.py"), "--output_dir", "out", "--reward_funcs", "length.reward"]
    script += ["--dataset_name", "missing.parquet", "--model_name_or_path", "no/such-model", "--use_cpu"]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_BITSANDBYTES, *script, "--use_peft", "--load_in_4bit"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert process.returncode != 0
    *_, last = process.stderr.strip().splitlines()
    assert last.startswith("ImportError: load_in_4bit needs bitsandbytes")
    assert 'pip install "treerpo-trl[quantization]"' in last
