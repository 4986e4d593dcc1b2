"""examples/evaluate.py with a real vLLM engine on a CPU: `make test-vllm`."""

import json
import os
from pathlib import Path

import evaluate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import EOS, VLLM_SHAPE, make_tokenizer
from transformers import Qwen2ForCausalLM


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm makes an environment that has it")
pytestmark = pytest.mark.vllm

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # starts without compiling the model


def make_args(model: str, **options) -> evaluate.EvaluationArguments:
    return evaluate.EvaluationArguments(
        model_name_or_path=model,
        engine="vllm",
        temperature=0.0,
        max_completion_length=VLLM_SHAPE.max_completion_length,
        vllm_max_model_length=300,
        vllm_gpu_memory_utilization=0.3,
        **options,
    )


@pytest.fixture(scope="module")
def adapted(vllm_model_path, tmp_path_factory) -> tuple[PeftModel, str]:
    """A model with adapters that raise or lower the logit of EOS by so much that rounding does not matter."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM.from_pretrained(vllm_model_path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight[EOS] = 100.0
    path = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return model, str(path)


@pytest.fixture(scope="module")
def sampler(adapted):
    """It takes half a minute to start. The adapters are merged into the base model that they name."""
    args = make_args(adapted[1])
    base = evaluate.find_base_model(args)
    return evaluate.load_sampler(args, base, evaluate.load_tokenizer(args, base))


def greedy_of(model, prompt: list[int]) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=VLLM_SHAPE.max_completion_length,
        eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def test_greedy_responses_are_those_of_transformers(sampler, adapted, vllm_reference, greedy_prompts):
    ids, finished = sampler(greedy_prompts, 0)
    assert ids == [greedy_of(adapted[0], prompt) for prompt in greedy_prompts]
    assert ids != [greedy_of(vllm_reference, prompt) for prompt in greedy_prompts]  # it has the adapters
    assert finished == [row[-1] == EOS for row in ids]


def test_samples_follow_from_the_seed(sampler, monkeypatch):
    make_params = sampler.make_params

    def warm(seed):
        params = make_params(seed)
        params.temperature = 1.0
        params.logit_bias = {EOS: -1e4}  # else they end at once
        return params

    monkeypatch.setattr(sampler, "make_params", warm)
    prompts = [[7, 11, 5]] * 8
    drawn, finished = sampler(prompts, 0)
    assert len({tuple(row) for row in drawn}) > 4
    assert sampler(prompts, 0)[0] == drawn
    assert sampler(prompts, 100)[0] != drawn
    assert finished == [False] * 8


def test_the_script(sampler, adapted, greedy_prompts, tmp_path, monkeypatch):
    """From a file of prompts to its summary."""
    prompts = [make_tokenizer().decode(prompt) for prompt in greedy_prompts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "my_ones.py").write_text("def one(completions, **_):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_sampler", lambda *_: sampler)
    evaluate.main(make_args(adapted[1], dataset_name=["rows.jsonl"], reward_funcs=["my_ones.one"], output_dir="out"))
    summary = json.loads(Path("out/summary.json").read_text())["rows"]
    lengths = [len(greedy_of(adapted[0], prompt)) for prompt in greedy_prompts]
    assert summary["mean_length"] == summary["mean_length_correct"] == pytest.approx(sum(lengths) / len(lengths))
    assert summary["pass_at_1"] == 1
