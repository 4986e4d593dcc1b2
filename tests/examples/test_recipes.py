"""The recipes of the paper's comparison parse, agree with each other and train; what the README says of them holds."""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist, fmean

import datasets
import evaluate
import numpy as np
import prepare_data
import pytest
import torch
import train
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import load_dataset
from paper_data import find_data
from places import EXAMPLES, ROOT, free_port
from test_train_script import MY_REWARDS
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import GRPOConfig, TrlParser
from trl.scripts import grpo

from treerpo_trl import TreeRPOConfig, rewards
from treerpo_trl.growth import Backend, TreeShape, grow
from treerpo_trl.tree import Segment


README = (EXAMPLES / "README.md").read_text()
SECTION = README.split("\n## The paper's comparison\n")[1].split("\n## ")[0]
SIZES = ("1.5b", "7b")
GRPO = {"grpo": 8, "grpo_equal_tokens": 64}  # responses a prompt
METHODS = ("treerpo", *GRPO)
RECIPES = sorted(path.name for path in (EXAMPLES / "recipes").glob("*.yaml"))
# What a recipe for GRPO may set otherwise than that for TreeRPO. The rows differ because a tree has 512 of them.
DIFFERING = {
    "output_dir",
    "num_generations",
    "per_device_train_batch_size",
    "steps_per_generation",
    "gradient_accumulation_steps",
    "generation_batch_size",
}


def recipe(method: str, size: str) -> Path:
    return EXAMPLES / "recipes" / f"{method}_qwen2.5_math_{size}.yaml"


def parse(path: Path, *args: str) -> tuple:
    """The script's arguments, the trainer's and the model's, as the script that the recipe is for parses them."""
    parser = train.make_parser() if path.name.startswith("treerpo") else grpo.make_parser()
    # TRL's script lets pass what it does not know; a recipe should not have any of it.
    return parser.parse_args_and_config(["--config", str(path), "--use_cpu", *args])[:3]


@pytest.fixture
def eight_processes(monkeypatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 8)


def test_every_recipe_is_known():
    assert {recipe(method, size).name for method in METHODS for size in SIZES} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_batches_divide_on_eight_processes(eight_processes, name):
    """128 prompts a step and two updates; a prompt's rows lie on one process."""
    _, args, _ = parse(EXAMPLES / "recipes" / name)
    assert args.generation_batch_size == 128 * args.num_generations
    assert args.steps_per_generation == 2 * args.gradient_accumulation_steps
    assert args.per_device_train_batch_size * args.steps_per_generation % args.num_generations == 0


@pytest.mark.parametrize("name", RECIPES)
def test_three_hundred_steps_of_two_updates(name):
    """verl, which the authors' scripts call, counts a batch of 128 prompts as a step, and max_steps counts updates."""
    _, args, _ = parse(EXAMPLES / "recipes" / name)
    updates_a_step = args.steps_per_generation // args.gradient_accumulation_steps
    assert args.max_steps == 300 * updates_a_step
    assert f"{300 / (7_500 // 128):.1f} epochs" in recipe("treerpo", "1.5b").read_text()


@pytest.mark.parametrize("method", GRPO)
@pytest.mark.parametrize("size", SIZES)
def test_grpo_shares_every_other_setting(eight_processes, size, method):
    (script, tree, model), (grpo_script, flat, grpo_model) = (
        parse(recipe("treerpo", size)),
        parse(recipe(method, size)),
    )
    assert flat.num_generations == GRPO[method]
    # `init=False` fields are derived. Without vLLM the correction has no effect, but one may turn vLLM on.
    names = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    assert {name for name in names if getattr(tree, name) != getattr(flat, name)} == DIFFERING
    assert model == grpo_model
    # By name and by the path that TRL's script imports it from.
    functions = [train.load_reward_func(name) for name in (*script.reward_funcs, *grpo_script.reward_funcs)]
    assert functions == [rewards.boxed_math_accuracy_reward] * 2
    assert model.model_name_or_path == f"Qwen/Qwen2.5-Math-{size.upper()}"


def test_sizes_differ_in_model_and_engine_only():
    for method in METHODS:
        small, large = [yaml.safe_load(recipe(method, size).read_text()) for size in SIZES]
        engine = {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_mode": "token_mask"}
        for name in ("model_name_or_path", "output_dir"):
            assert large[name] == small.pop(name).replace("1.5B", "7B")
        assert large.items() >= engine.items()
        assert {**large, **small} == large and set(large) - set(small) <= {"model_name_or_path", "output_dir", *engine}


def test_7b_is_the_papers_setting():
    """As `test_recipe_is_the_papers_setting` of test_train_script.py does for 1.5B."""
    _, parsed, _ = parse(recipe("treerpo", "7b"))
    preset = TreeRPOConfig.paper(parsed.output_dir, use_vllm=True, vllm_mode="server", bf16=True, use_cpu=True)
    for field in dataclasses.fields(TreeRPOConfig):
        if field.init:
            assert getattr(parsed, field.name) == getattr(preset, field.name), field.name


# How num_generations and the README's estimates follow from the assumptions.


def log_normal(median: float, spread: float = 0.6, num: int = 20_000) -> np.ndarray:
    """Quantiles of the assumed lengths."""
    quantiles = (np.arange(num) + 0.5) / num
    return median * np.exp(spread * np.array([NormalDist().inv_cdf(float(q)) for q in quantiles]))


def segments(lengths: np.ndarray, depth: int, length: int) -> list[float]:
    """E[min(max(length - (d - 1) L, 0), L)] for d = 1 .. D."""
    return [float(np.clip(lengths - d * length, 0, length).mean()) for d in range(depth)]


def tree_tokens(branching: list[int], lengths: np.ndarray, length: int) -> float:
    """Expected tokens of a tree: the sum over d of N_1 .. N_d times the above."""
    of_depth = segments(lengths, len(branching), length)
    return sum(math.prod(branching[: d + 1]) * tokens for d, tokens in enumerate(of_depth))


def shares_longer(lengths: np.ndarray, *bounds: int) -> list[float]:
    return [float((lengths > bound).mean()) for bound in bounds]


class Memoryless(Backend):
    """Responses of geometric length: what is left of one does not depend on how long it is."""

    def __init__(self, mean: float):
        self.random, self.mean = np.random.default_rng(0), mean

    def extend(self, trees, wave) -> list[list[Segment]]:
        drawn = self.random.geometric(1 / self.mean, (len(wave.branches), wave.num_children))
        (max_tokens,) = set(wave.max_tokens)
        return [[Segment((2,) * min(n, max_tokens), n <= max_tokens) for n in row] for row in drawn.tolist()]


def test_formula_is_what_trees_have():
    shape = TreeShape((4, 3, 2), 20, 60)
    trees = grow([[1]] * 3000, shape, Memoryless(mean=30))
    sampled = fmean(sum(len(node.token_ids) for node in tree.nodes[1:]) for tree in trees)
    lengths = np.random.default_rng(1).geometric(1 / 30, 400_000)
    assert sampled == pytest.approx(tree_tokens([4, 3, 2], lengths, 20), rel=0.02)


@pytest.mark.parametrize("size", SIZES)
def test_num_generations_samples_as_many_tokens(size):
    """The number in the recipe, and those that its comment says of other lengths."""
    _, tree, _ = parse(recipe("treerpo", size))
    _, flat, _ = parse(recipe("grpo_equal_tokens", size))

    def fitting(median: float) -> int:
        lengths = log_normal(median)
        tokens = tree_tokens(tree.branching_factor, lengths, tree.segment_length)
        return round(tokens / np.minimum(lengths, flat.max_completion_length).mean())

    assert flat.num_generations == fitting(450) == 64
    comment = " ".join(recipe("grpo_equal_tokens", size).read_text().replace("\n#", " ").split())
    assert f"with a median of 350 it would be {fitting(350)}, with 550 {fitting(550)}." in comment
    first, second, third = [round(tokens) for tokens in segments(log_normal(450), 3, 384)]
    assert f"8 x {first} + 64 x {second} + 512 x {third} = 33,000" in comment
    half, long, cut = [f"{share:.0%}" for share in shares_longer(log_normal(450), 384, 768, 1152)]
    assert (
        f"mean {np.minimum(log_normal(450), 1152).mean():.0f}, {half} above 384, {long} above 768, {cut} cut"
        in comment
    )


def estimates(size: str, method: str) -> dict[str, str]:
    """The README's table of what the comparison takes, from what it says below the table."""
    parameters, bytes_of_cache = {"1.5b": (1.54e9, 28_672), "7b": (7.6e9, 57_344)}[size]
    lengths, rows, tokens_of_row = log_normal(450), 16 * GRPO.get(method, 0), 512 + 1152
    longer = [1.0, *shares_longer(lengths, 384, 768)]
    branches = [16 * 8 ** (d + 1) * longer[d] for d in range(3)]
    leaves = sum(8 ** (d + 1) * (longer[d] - [*longer, 0][d + 1]) for d in range(3))
    if method == "treerpo":
        sampled = 128 * tree_tokens([8, 8, 8], lengths, 384)
        cache = (256 * tokens_of_row + 16 * 64 * (512 + 768)) * bytes_of_cache
        decoding = sum(math.ceil(number / 256) for number in branches) * 384 * 0.040
        trained, rewards = sampled, 16 * leaves * 0.010
    else:
        sampled = 8 * rows * np.minimum(lengths, 1152).mean()
        cache = rows * tokens_of_row * bytes_of_cache
        decoding = 1152 * (0.080 if rows > 256 else 0.040)
        trained, rewards = 8 * rows * tokens_of_row, rows * 0.010
    if size == "1.5b":
        gpus, memory = 8, parameters * (2 + 14 / 8 + 2) + cache
    else:
        gpus, decoding = 12, sampled / 20_000
        memory = parameters * (16 + 2) / 8 + 2 * 28_000 * 3584 * 28 * 2
    training = 12 * parameters * trained / (8 * 989e12 * 0.30)
    hours = 300 * (decoding + rewards + training) / 3600
    return {
        "memory of a GPU that trains, GB": f"{memory / 1e9:.0f}"
        if size == "1.5b"
        else f"{round(memory / 1e9, -1):.0f}",
        "sampled tokens a step, millions": f"{sampled / 1e6:.1f}",
        "sampling, seconds a step": f"{decoding:.0f}",
        "rewards, seconds a step": f"{rewards:.0f}",
        "old and reference log-probabilities, two updates, seconds a step": f"{training:.0f}",
        "300 steps, hours": f"{hours:.0f}",
        "GPU-hours": f"{hours * gpus:.0f}",
    }


def test_estimates_follow_from_their_assumptions():
    table = {}
    for line in SECTION.splitlines():
        if line.startswith("|"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            table[name] = cells
    columns = [(size, method) for size in SIZES for method in METHODS]
    derived = [estimates(*column) for column in columns]
    assert {name: [column[name] for column in derived] for name in derived[0]} == {
        name: table[name] for name in derived[0]
    }
    shares = [1.0, *shares_longer(log_normal(450), 384, 768)]
    branches = [f"{16 * 8 ** (d + 1) * share:,.0f}" for d, share in enumerate(shares)]
    assert f"{branches[0]}, {branches[1]} and {branches[2]} branches" in " ".join(SECTION.split())
    tree, flat, *_ = map(float, table["sampled tokens a step, millions"])
    assert round(tree / flat) == 8 and "eight times as many tokens a step" in SECTION


def test_macro_means_of_the_paper():
    for name, macro in (("GRPO", 32.7), ("TreeRPO", 35.6)):
        cells = re.search(rf"^\| {name} \|(.*)\|$", SECTION, flags=re.MULTILINE)
        *numbers, mean = map(float, cells[1].split("|"))
        assert mean == macro == pytest.approx(fmean(numbers), abs=0.051)


# The commands of the README.


def blocks(text: str) -> list[str]:
    """The code blocks that name no language."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for language, block in found if not language]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without the environment variables before it."""
    for line in "".join(blocks(text)).replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        yield words


def check_launch(words: list[str]) -> None:
    parsed = launch_command_parser().parse_args(words[2:])
    assert Path(parsed.config_file).is_file()
    script_args = parsed.training_script_args
    if parsed.module:
        assert parsed.training_script == "trl.scripts.grpo"
        parser = grpo.make_parser()
    else:
        assert parsed.training_script == "examples/train.py"
        parser = train.make_parser()
    parser.parse_args_and_config([*script_args, "--use_cpu"])


def check_python(words: list[str]) -> None:
    script, arguments = words[1], words[2:]
    assert Path(script).is_file()
    if script == "examples/prepare_data.py":
        prepare_data.make_parser().parse_args(arguments)
    elif arguments[0] == "compare":
        with pytest.raises(FileNotFoundError, match=arguments[1]):
            evaluate.run_comparison(arguments[1:])
    else:
        assert script == "examples/evaluate.py"
        (args,) = TrlParser((evaluate.EvaluationArguments,)).parse_args_and_config(arguments)
        args.check()
        assert (args.num_samples, args.temperature, args.engine) == (8, 0.6, "vllm")
        trained, tree, _ = parse(recipe("treerpo", "1.5b"))
        assert (args.max_completion_length, args.temperature) == (tree.max_completion_length, tree.temperature)
        assert args.reward_funcs == trained.reward_funcs  # the verifier of training
        assert {benchmark.system_prompt for benchmark in evaluate.BENCHMARKS.values()} == {trained.system_prompt}
        assert set(args.dataset_name) == set(evaluate.BENCHMARKS)


def check_server(words: list[str]) -> None:
    """The line of the page on vLLM, with the model and the GPUs."""
    page = (ROOT / "docs" / "scaling.md").read_text().replace("```bash\n", "```\n")
    (block,) = [block for block in blocks(page) if "vllm serve" in block]
    documented = next(commands(f"```\n{block}```\n"))
    assert words[3:5] == ["--tensor-parallel-size", "4"]
    assert words[:2] + words[5:] == documented[:2] + documented[3:]


def test_commands_name_files_and_options_that_exist(monkeypatch):
    """In order: each reads what one before it wrote."""
    monkeypatch.chdir(ROOT)
    kinds = {"accelerate": check_launch, "python": check_python, "vllm": check_server}
    found = list(commands(SECTION))
    for words in found:
        kinds[words[0]](words)
    assert [words[0] for words in found] == [
        "python",
        *["accelerate"] * 3,
        *["python"] * 7,
        "vllm",
        *["accelerate"] * 3,
    ]

    outputs = {parse(recipe(method, "1.5b"))[1].output_dir for method in METHODS}
    models = {words[3] for words in found if words[1] == "examples/evaluate.py" and words[2] != "compare"}
    assert models == {"Qwen/Qwen2.5-Math-1.5B", *outputs}
    written = {words[-1] for words in found if words[-2] == "--output_dir" and "evaluate" in words[1]}
    assert written == {name for words in found if words[2] == "compare" for name in words[3:]}
    used = {name for words in found for name in words if name.startswith("examples/recipes/")}
    assert used == {f"examples/recipes/{name}" for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_launch_line_in_the_header_is_the_readmes(name):
    header = (EXAMPLES / "recipes" / name).read_text().split("\n\n")[0]
    lines = re.findall(r"^#     ((?:[A-Z_]+=|accelerate).*(?:\n#         .*)*)", header, flags=re.MULTILINE)
    words = [shlex.split(line.replace("\\\n#", " ")) for line in lines]
    assert len(words) == (2 if "7b" in name else 1)
    documented = [shlex.split(line) for line in "".join(blocks(SECTION)).replace("\\\n", " ").splitlines()]
    assert all(line in documented for line in words)
    assert f"examples/recipes/{name}" in words[-1]


def test_prepared_data_is_what_the_recipes_read():
    """The command writes what TreeRPO's recipe reads from the Hub, where GRPO's looks for it."""
    (command,) = [words for words in commands(SECTION) if words[1] == "examples/prepare_data.py"]
    args = prepare_data.make_parser().parse_args(command[2:])
    for size in SIZES:
        script, _, _ = parse(recipe("treerpo", size))
        names = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_prompt_column")
        for name in (*names, "dataset_solution_column", "system_prompt", "max_prompt_length"):
            assert getattr(args, name) == getattr(script, name), name
        for method in GRPO:
            assert str(args.output_dir) == parse(recipe(method, size))[0].dataset_name


@pytest.mark.parametrize("name", ["math_train", "math500", "aime24", "minerva", "olympiadbench"])
def test_system_prompt_is_that_of_the_papers_data(name):
    prompts = load_dataset("parquet", data_files=find_data(name), split="train")["prompt"]
    script, _, _ = parse(recipe("treerpo", "1.5b"))
    assert {prompt[0]["content"] for prompt in prompts} == {script.system_prompt}
    assert "\\boxed{{}}" in script.system_prompt


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_readme_names_every_script(name):
    assert f"[{name}]({name})" in README


@pytest.mark.parametrize("name", RECIPES)
def test_readme_names_every_recipe(name):
    assert f"[{name}](recipes/{name})" in README


# From a local file to a model that TRL's own script trained.

SMALL = ["--num_generations", "4", "--max_completion_length", "8", "--per_device_train_batch_size", "4"]
SMALL += ["--steps_per_generation", "2", "--gradient_accumulation_steps", "1", "--max_steps", "2", "--use_cpu"]
SMALL += ["--bf16", "false", "--use_vllm", "false", "--learning_rate", "1e-2", "--logging_steps", "1"]
SMALL += ["--save_steps", "2", "--report_to", "none", "--disable_tqdm", "true", "--output_dir", "out"]
# The recipe's, and one that a random model does not always miss.
SMALL += ["--reward_funcs", "treerpo_trl.rewards.boxed_math_accuracy_reward", "my_rewards.parity_reward"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with rows like MATH's, one of which is too long."""
    rows = [
        {"problem": f"What is {i} + {i}?", "solution": rf"It is $\boxed{{{2 * i}}}$.", "level": 1} for i in range(8)
    ]
    rows.append({"problem": "1 + " * 100, "solution": "$100$", "level": 5})
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def prepare(model: str) -> None:
    """The README's command, with the local file and the small model in place of the Hub's."""
    (command,) = [words for words in commands(SECTION) if words[1] == "examples/prepare_data.py"]
    local = ["--dataset_name", "math.jsonl", "--model_name_or_path", model, "--max_prompt_length", "200"]
    prepare_data.main([*command[2:], *local])


def check_trained(folder: Path, model: str) -> None:
    history = json.loads((folder / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "completions/mean_length" in entry]
    assert [entry["step"] for entry in steps] == [1]  # one generation for the two updates
    assert "rewards/boxed_math_accuracy_reward/mean" in steps[0]
    assert {"entropy", "kl"} <= steps[0].keys()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_prepared_rows_are_those_that_treerpo_trains_on(folder, llama_path, capsys):
    prepare(llama_path)
    assert "Wrote 8 rows with the columns prompt, solution" in capsys.readouterr().out
    prepared = load_dataset("math_prompts", split="train")
    local = ["--dataset_name", "math.jsonl", "--model_name_or_path", llama_path, "--max_prompt_length", "200"]
    own = train.load_data(*parse(recipe("treerpo", "1.5b"), *local), "train")
    assert prepared.column_names == ["prompt", "solution"]
    assert prepared.to_list() == own.select_columns(["prompt", "solution"]).to_list()


def test_prepare_data_needs_a_tokenizer_to_count_with(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["--dataset_name", "x", "--output_dir", "y", "--max_prompt_length", "5"])
    assert "needs --model_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize("size", SIZES)
def test_trls_script_trains_on_prepared_data(folder, llama_path, size):
    prepare(llama_path)
    arguments = ["--config", str(recipe("grpo", size)), "--model_name_or_path", llama_path, *SMALL]
    grpo.main(*grpo.make_parser().parse_args_and_config(arguments))
    check_trained(folder, llama_path)


@pytest.mark.slow
def test_launch_line_of_trls_script(folder, llama_path):
    """The README's launch, under a configuration for the CPU."""
    prepare(llama_path)
    (words,) = [words for words in commands(SECTION) if words[-1] == "examples/recipes/grpo_qwen2.5_math_1.5b.yaml"]
    parsed = launch_command_parser().parse_args(words[2:])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    command += ["--config_file", str(ROOT / "accelerate_configs/single_cpu.yaml"), "-m", parsed.training_script]
    option, config = parsed.training_script_args
    command += [option, str(ROOT / config), "--model_name_or_path", llama_path, *SMALL]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    check_trained(folder, llama_path)
