"""examples/train.py trains on MATH rows, resumes, and explains mistakes; its recipe is the paper's setting.

That it trains under every engine is in `test_distributed.py`.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import datasets
import pytest
import torch
import train
import yaml
from datasets import Dataset
from paper_data import find_data
from peft import AutoPeftModelForCausalLM
from places import ROOT, free_port
from train_data import NEED_SOLUTION
from transformers import AutoModelForCausalLM, AutoTokenizer

from treerpo_trl import TreeRPOConfig


RECIPE = ROOT / "examples" / "recipes" / "treerpo_qwen2.5_math_1.5b.yaml"
# A reward that a random model does not always miss, as it does accuracy_reward.
MY_REWARDS = '''"""A reward of 0 or 1."""


def parity_reward(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"])) % 2) for completion in completions]
'''
# A run on a CPU in seconds.
RUN = {
    "reward_funcs": ["accuracy_reward", "my_rewards.parity_reward"],
    "reward_weights": [0.5, 0.5],
    "dataset_prompt_column": "prompt",
    "dataset_solution_column": "reward_model.ground_truth",
    "max_prompt_length": 200,
    "branching_factor": [2, 2],
    "segment_length": 8,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
# What a command line has to give.
GIVEN = ["--model_name_or_path", "a/model", "--dataset_name", "rows.parquet", "--reward_funcs", "accuracy_reward"]


@pytest.fixture(scope="module")
def math_rows() -> Dataset:
    """Rows of the MATH training data with prompts of all lengths."""
    rows = Dataset.from_parquet(find_data("math_train"))
    lengths = [len(prompt[-1]["content"].encode()) for prompt in rows["prompt"]]
    by_length = sorted(range(len(rows)), key=lengths.__getitem__)
    return rows.select(by_length[:40] + by_length[-2:])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with a module of rewards and a cache of its own."""
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def parse_args(*args: str):
    return train.make_parser().parse_args_and_config(list(args))


def run_in_process(config: dict, *args: str) -> None:
    """What the command line does, without the seconds that a new process takes to import everything."""
    Path("run.yaml").write_text(yaml.safe_dump(config))
    train.main(*parse_args("--config", "run.yaml", *args))


def log_history(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def test_tokenizer_survives_save_and_load(llama_path, math_rows):
    tokenizer = AutoTokenizer.from_pretrained(llama_path)
    for prompt in math_rows["prompt"]:
        text = prompt[-1]["content"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def launch(*arguments: str) -> str:
    """`accelerate launch` of train.py; what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "single_cpu.yaml")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(Path("hf").resolve()),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command += [str(ROOT / "examples/train.py"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def prepare_run(folder: Path, llama_path: str, rows: Dataset) -> list[str]:
    """A folder to train in; returns the command line: a YAML file with overrides, and a local parquet file."""
    (folder / "my_rewards.py").write_text(MY_REWARDS)
    rows.to_parquet(folder / "math.parquet")
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "max_steps": 7, "dataset_name": "missing.parquet"}))
    arguments = ["--config", "run.yaml", "--dataset_name", "math.parquet", "--max_steps", "2"]
    return [*arguments, "--model_name_or_path", llama_path, "--output_dir", "out"]


def check_run(folder: Path, llama_path: str, output: str) -> None:
    """What was printed, and a model that loads again."""
    assert "Left out 2 of 42 rows" in output
    assert "Training completed" in output

    before = AutoModelForCausalLM.from_pretrained(llama_path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    steps = [entry for entry in log_history(folder / "out" / "checkpoint-2") if "tree/nodes" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        assert 2 <= entry["tree/leaves"] <= 4
        assert 0 < entry["tree/kept_groups"] <= 1
        assert "rewards/accuracy_reward/mean" in entry and "rewards/parity_reward/mean" in entry


@pytest.mark.slow
def test_trains_on_math_by_accelerate_launch(folder, llama_path, math_rows):
    output = launch(*prepare_run(folder, llama_path, math_rows))
    check_run(folder, llama_path, output)


def rows_like_math() -> Dataset:
    """Made here, so that what trains on them runs wherever the package does."""
    problems = [f"What is {i} + {i}?" for i in range(40)] + [f"What is {'1 + ' * 100}{i}?" for i in range(2)]
    prompts = [[{"role": "user", "content": problem}] for problem in problems]
    answers = [{"ground_truth": str(2 * i)} for i in range(42)]
    return Dataset.from_dict({"prompt": prompts, "reward_model": answers})


@pytest.mark.parametrize("branching", [["1"], ["1", "2"]])
def test_single_paths_train_from_the_command_line(folder, llama_path, branching):
    """Given as options on top of a YAML file, with a baseline from the other prompts' trees."""
    prompts = [[{"role": "user", "content": f"What is {i} + {i}?"}] for i in range(16)]
    Dataset.from_dict({"prompt": prompts}).to_parquet(folder / "rows.parquet")
    config = {name: RUN[name] for name in RUN.keys() - {"dataset_solution_column", "reward_weights", "max_depth"}}
    config |= {"dataset_name": "rows.parquet", "model_name_or_path": llama_path, "output_dir": "out"}
    config["reward_funcs"] = ["my_rewards.parity_reward"]
    run_in_process(config, "--advantage_estimator", "optimal_baseline", "--branching_factor", *branching)
    steps = [entry for entry in log_history(folder / "out" / "checkpoint-2") if "tree/nodes" in entry]
    assert [entry["tree/kept_groups"] for entry in steps] == [1, 1]
    assert any(entry["grad_norm"] > 0 for entry in steps)


def test_trains_lora_and_resumes(folder, llama_path, math_rows):
    """LoRA flags save an adapter that peft loads; a run goes on from a checkpoint."""
    math_rows.to_parquet(folder / "math.parquet")
    config = {**RUN, "dataset_name": "math.parquet", "model_name_or_path": llama_path, "output_dir": "out"}
    lora = ["--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj", "v_proj"]
    run_in_process(config, *lora)
    before = log_history(folder / "out" / "checkpoint-2")
    run_in_process(config, *lora, "--max_steps", "4", "--resume_from_checkpoint", "out/checkpoint-2")

    history = log_history(folder / "out" / "checkpoint-4")
    assert history[:2] == before  # with its timings: a run from the start would have others
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "out")
    assert model.peft_config["default"].r == 4
    adapter = {name: weight for name, weight in model.state_dict().items() if "lora_B" in name}
    assert len(adapter) == 4  # two layers, two projections; lora_B starts at zero
    assert all(weight.abs().max() > 0 for weight in adapter.values())


def test_recipe_runs_on_rows_like_the_hubs(folder, llama_path, math_rows):
    """The recipe, made small, on a folder with the columns of its dataset: problems and worked solutions."""
    rows = Dataset.from_dict(
        {
            "problem": [prompt[-1]["content"] for prompt in math_rows["prompt"]],
            "solution": [info["ground_truth_cot"] for info in math_rows["extra_info"]],
        }
    )
    rows.to_parquet("MATH/train.parquet")
    rows.select(range(2)).to_parquet("MATH/test.parquet")
    small = ["--dataset_name", "MATH", "--model_name_or_path", llama_path, "--max_prompt_length", "200"]
    small += ["--branching_factor", "2", "--max_depth", "2", "--segment_length", "8"]
    small += ["--per_device_train_batch_size", "4", "--steps_per_generation", "2"]
    small += ["--gradient_accumulation_steps", "1", "--max_steps", "2", "--use_cpu", "--bf16", "false"]
    small += ["--eval_strategy", "steps", "--eval_steps", "2", "--num_generations_eval", "1"]
    small += ["--logging_steps", "1", "--save_steps", "2", "--report_to", "none", "--disable_tqdm", "true"]
    train.main(*parse_args("--config", str(RECIPE), "--output_dir", "out", *small))
    history = log_history(folder / "out" / "checkpoint-2")
    name = "rewards/boxed_math_accuracy_reward/mean"
    assert [entry[name] for entry in history if name in entry] == [0.0]  # one generation for the two updates
    assert [entry["eval_reward"] for entry in history if "eval_reward" in entry] == [0.0]


def test_recipe_is_the_papers_setting():
    """Every field of the parsed recipe equals the preset's."""
    _, parsed, model_args = parse_args("--config", str(RECIPE), "--use_cpu")
    preset = TreeRPOConfig.paper(parsed.output_dir, bf16=True, use_cpu=True)
    for field in dataclasses.fields(TreeRPOConfig):
        if field.init:
            assert getattr(parsed, field.name) == getattr(preset, field.name), field.name
    assert model_args.model_name_or_path == "Qwen/Qwen2.5-Math-1.5B"


def test_recipe_names_data_options():
    script_args, _, model_args = parse_args("--config", str(RECIPE), "--use_cpu")
    assert script_args.max_prompt_length == 512
    assert script_args.reward_funcs == ["boxed_math_accuracy_reward"]
    assert script_args.system_prompt.endswith(r"\boxed{{}}.")
    assert (model_args.dtype, model_args.use_peft) == ("float32", False)


def test_rewards_that_compare_with_a_solution_are_checked_for_one():
    comparing = {name for name, function in train.REWARD_FUNCS.items() if "solution" in signature(function).parameters}
    assert comparing == set(NEED_SOLUTION)


def test_help_shows_the_tree_options(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args("--help")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for option in ("branching_factor", "segment_length", "advantage_estimator", "reward_funcs", "max_prompt_length"):
        assert f"--{option}" in text


def test_help_begins_with_the_tree(capsys):
    """Then come data and rewards, then the model: TRL's 200 options hide none of them."""
    with pytest.raises(SystemExit):
        parse_args("--help")
    text = capsys.readouterr().out
    options = re.findall(r"^  (?:-h, )?--(?!no_)(\w+)", text, re.MULTILINE)  # what is on has an option to turn it off
    own = list(TreeRPOConfig.__annotations__)
    assert options[: len(own)] == own and own[0] == "branching_factor"
    assert len(options) == len(set(options)) > 200
    assert options.index("reward_funcs") < options.index("model_name_or_path") < options.index("learning_rate")
    assert {"help", "output_dir", "use_peft"} <= set(options)
    assert len(text.split("\n\n")[0].splitlines()) == 2  # the usage


@pytest.mark.parametrize("given", [(), ("--reward_funcs", "accuracy_reward"), ("--config", "half.yaml")])
def test_what_is_missing_is_told_with_the_usage(tmp_path, monkeypatch, capsys, given):
    """Before anything else, such as a GPU, is missed."""
    monkeypatch.chdir(tmp_path)
    Path("half.yaml").write_text(yaml.safe_dump({"model_name_or_path": "my/model", "max_steps": 1}))
    with pytest.raises(SystemExit) as exit_info:
        parse_args(*given)
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: train.py --model_name_or_path MODEL --dataset_name DATASET --reward_funcs")
    assert "--dataset_name: a dataset of the Hub, a local folder or a local file" in said
    assert ("--model_name_or_path: a model" in said) == ("half.yaml" not in given)
    assert ("--reward_funcs or --reward_model_name_or_path: one or more of" in said) == ("--reward_funcs" not in given)


def test_remote_code_is_off_by_default():
    _, training_args, _ = parse_args(*GIVEN, "--output_dir", "out", "--use_cpu")
    assert training_args.trust_remote_code is False


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("acuracy_reward", ["no reward function 'acuracy_reward'", "accuracy_reward, math_accuracy_reward"]),
        ("no_such_module.reward", ["'no_such_module' cannot be imported", "accuracy_reward"]),
        ("my_rewards.parity", ["has no function 'parity'", "it has parity_reward"]),
        ("my_rewards.", ["has no function ''"]),
        ("..reward", ["cannot be imported"]),
    ],
)
def test_bad_reward_is_named_before_anything_is_loaded(folder, name, messages):
    args = ["--output_dir", "out", "--use_cpu", "--reward_funcs", name]
    with pytest.raises(ValueError) as error:
        train.main(*parse_args(*args, "--dataset_name", "missing.parquet", "--model_name_or_path", "no/such-model"))
    for message in messages:
        assert message in str(error.value)


def test_no_reward_lists_the_choices():
    with pytest.raises(ValueError, match=r"No reward is given.*think_format_reward"):
        train.load_reward_funcs(train.TreeRPOScriptArguments())
