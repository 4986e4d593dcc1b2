"""examples/evaluate.py measures a model, goes on after a kill, compares two runs, and explains mistakes."""

import importlib.util
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType

import benchmarks
import datasets
import evaluate_report
import pytest
import torch
import train
from byte_llama import make_byte_tokenizer, save_tiny_llama
from datasets import Dataset
from paper_data import find_data
from peft import LoraConfig, PeftModel, get_peft_model
from places import ROOT
from transformers import AutoModelForCausalLM


def load_script() -> ModuleType:
    """The script under a name of its own: as `evaluate` it would be what others get for Hugging Face's package."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "examples" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evaluate = load_script()
# Rewards that a random model does not always miss; one of them kills the process in its third call.
MY_REWARDS = '''"""Rewards of 0 or 1."""

import os
import signal

calls = 0


def parity_reward(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"])) % 2) for completion in completions]


def mortal_reward(completions, **kwargs):
    global calls
    calls += 1
    if os.environ.get("KILL") and calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return parity_reward(completions)
'''
NUM_ROWS = 7
RUN = {
    "model_name_or_path": "model",
    "dataset_name": "rows.parquet",
    "dataset_prompt_column": "prompt",
    "dataset_solution_column": "reward_model.ground_truth",
    "reward_funcs": "my_rewards.parity_reward",
    "num_samples": 3,
    "max_completion_length": 8,
    "batch_size": 4,
    "output_dir": "out",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny random model in `model`, and adapters on it in `adapters`."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "model")
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), lora)
    adapted.save_pretrained(folder / "adapters")
    return folder


def make_rows(count: int = NUM_ROWS) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is ${i}+{i}$?"}],
                "reward_model": {"ground_truth": [f"{2 * i}\n"]},
            }
            for i in range(count)
        ]
    )


@pytest.fixture
def folder(models, tmp_path, monkeypatch) -> Path:
    """A folder to run in, with models, rows and a module of rewards."""
    (tmp_path / "model").symlink_to(models / "model")
    (tmp_path / "adapters").symlink_to(models / "adapters")
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    make_rows().to_parquet(tmp_path / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def command_line(options: dict) -> list[str]:
    words = []
    for key, value in options.items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def run(**options) -> dict:
    """What the command line does, without the seconds that a new process takes; the summary."""
    words = command_line({**RUN, **options})
    evaluate.main(*evaluate.make_parser().parse_args_and_config(words))
    return json.loads((Path(options.get("output_dir", RUN["output_dir"])) / "summary.json").read_text())


def launch(words: list[str], **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": "hf", **environment}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples/evaluate.py"), *words],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()][1:]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.fixture
def say(monkeypatch):
    """Puts texts into the model's mouth: those of each problem in turn."""

    def set_texts(*texts_of_problems: list[str]) -> None:
        tokenizer = make_byte_tokenizer()
        texts = itertools.cycle(chain(*texts_of_problems))

        def sampler(prompt_ids, seed):
            ids = [tokenizer(next(texts))["input_ids"] for _ in prompt_ids]
            return ids, [True] * len(ids)

        monkeypatch.setattr(evaluate, "load_sampler", lambda *_: sampler)

    return set_texts


@pytest.mark.parametrize("words", [(), ("--num_samples", "2")])
def test_what_is_missing_is_told_with_the_usage(capsys, words):
    with pytest.raises(SystemExit) as exit_info:
        evaluate.make_parser().parse_args_and_config(words)
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: evaluate.py --model_name_or_path MODEL")
    assert "--model_name_or_path: a model of the Hub" in said


def test_help_tells_of_compare(capsys):
    with pytest.raises(SystemExit):
        evaluate.make_parser().parse_args_and_config(["--help"])
    text = capsys.readouterr().out
    assert "evaluate.py compare FIRST SECOND" in text and "paired test" in text
    assert "--temperature" in text


@pytest.mark.slow
def test_command_line_measures_and_compares(folder, monkeypatch, capsys):
    Dataset.from_dict({"question": ["1+1=", "2+2="], "gold": ["2", "4"]}).to_json(folder / "more.jsonl")
    options = {**RUN, "dataset_name": "more.jsonl", "dataset_prompt_column": "question"}
    options |= {"dataset_solution_column": "gold", "system_prompt": "Add."}
    finished = launch(command_line(options))
    assert finished.returncode == 0, finished.stderr
    assert "Pass@1" in finished.stdout and "more" in finished.stdout and "maj@3" in finished.stdout
    assert "6/6" in finished.stderr  # the progress bar
    summary = json.loads(finished.stdout.splitlines()[-1])
    assert summary == json.loads((folder / "out/summary.json").read_text())
    records = read("out/more.jsonl")
    assert [(record["problem"], record["sample"]) for record in records] == [divmod(i, 3) for i in range(6)]
    assert summary["more"]["pass_at_1"] == pytest.approx(mean(record["reward"] for record in records))

    run(**{**options, "output_dir": "other", "seed": 1})
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "compare", "out/more.jsonl", "other/more.jsonl"])
    runpy.run_path(str(ROOT / "examples/evaluate.py"), run_name="__main__")
    compared = capsys.readouterr().out
    assert "Difference" in compared
    numbers = json.loads(compared.splitlines()[-1])["more"]
    others = read("other/more.jsonl")
    assert numbers["difference"] == pytest.approx(mean(r["reward"] for r in others) - summary["more"]["pass_at_1"])


def test_numbers_are_those_of_the_responses(folder):
    summary = run(pass_at_k=[1, 2, 3])["rows"]
    records = read("out/rows.jsonl")
    groups = [records[start : start + 3] for start in range(0, 3 * NUM_ROWS, 3)]
    assert len(groups) == NUM_ROWS
    assert 0 < summary["pass_at_1"] < 1
    assert summary["pass_at_1"] == pytest.approx(mean(record["reward"] for record in records))
    assert summary["pass_at_1_interval"][0] < summary["pass_at_1"] < summary["pass_at_1_interval"][1]
    for k in (2, 3):
        expected = mean(
            mean(any(record["reward"] for record in drawn) for drawn in itertools.combinations(group, k))
            for group in groups
        )
        assert summary[f"pass_at_{k}"] == pytest.approx(expected)
    assert summary["mean_length"] == pytest.approx(mean(record["length"] for record in records))
    assert summary["mean_length_correct"] == pytest.approx(mean(r["length"] for r in records if r["reward"]))
    assert summary["truncated"] == pytest.approx(mean(not record["finished"] for record in records))
    assert all(record["length"] == 8 for record in records if not record["finished"])
    assert summary["num_problems"] == NUM_ROWS and summary["num_unscored"] == 0


def test_verifier_and_majority(folder, say):
    """The verifier is training's. An answer in another form is the same one; a response without one has no vote."""
    no = "I do not know."
    say(
        [r"\boxed{0}", r"\boxed{0}", r"\boxed{1}"],  # right answer: 0
        [r"\boxed{\frac{4}{2}}", r"\boxed{2}", r"\boxed{3}"],  # 2
        [r"\boxed{5}", r"\boxed{5}", r"\boxed{4}"],  # 4
        [no, r"\boxed{6}", no],  # 6
        [no, no, no],
        [r"\boxed{10}", r"\boxed{11}", no],  # 10, a tie
        [r"\boxed{12}", r"\boxed{12.0}", r"\boxed{12}"],  # 12
    )
    summary = run(reward_funcs="accuracy_reward", dataset_solution_column="reward_model.ground_truth")["rows"]
    assert summary["pass_at_1"] == pytest.approx((2 + 2 + 1 + 1 + 0 + 1 + 3) / 21)
    assert summary["pass_at_3"] == pytest.approx(6 / 7)
    assert summary["majority_at_3"] == pytest.approx((1 + 1 + 0 + 1 + 0 + 0.5 + 1) / 7)


def test_responses_without_a_reward_or_an_answer_are_left_out():
    """Two problems of three responses; of the second only two have a reward, so draws of three are of the first."""
    rewards, answers = [1.0, 0.0, 1.0, 1.0, 0.0, None], [None, "7", "5", "5", "7", "5"]
    records = [
        {
            "problem": i // 3,
            "sample": i % 3,
            "text": "",
            "length": 4,
            "finished": True,
            "reward": reward,
            "answer": answer,
        }
        for i, (reward, answer) in enumerate(zip(rewards, answers, strict=True))
    ]
    numbers = evaluate_report.measure(records, 3, [2, 3])
    assert numbers["pass_at_1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert numbers["pass_at_3"] == 1
    assert numbers["majority_at_3"] == 0.5  # one vote each way
    assert numbers["pass_at_2"] == 1
    assert numbers["majority_at_2"] == pytest.approx((mean([0, 1, 0.5]) + 0.5) / 2)
    assert numbers["num_unscored"] == 0


def test_any_of_several_right_answers_counts_and_gold_lists_are_wrapped(folder, say):
    answers = [["0.01\n", "0.02\n"], ["4", "4\n"], [r"$\frac{1}{2}$"], ["$69$,$84$"], [r"\frac 12"]]
    rows = [{"prompt": [{"role": "user", "content": "?"}], "gold": gold} for gold in answers]
    Dataset.from_list(rows).to_parquet("rows.parquet")
    say([r"\boxed{0.01}"], [r"\boxed{4}"], [r"\boxed{0.5}"], [r"\boxed{84, 69}"], [r"\boxed{\frac{1}{3}}"])
    run(reward_funcs="accuracy_reward", dataset_solution_column="gold", num_samples=1, batch_size=5)
    assert [record["reward"] for record in read("out/rows.jsonl")] == [1, 1, 1, 1, 0]
    say([r"\boxed{0.02}"], [r"\boxed{5}"], [r"\boxed{0.25}"], [r"\boxed{69}"], [r"\boxed{\frac{1}{2}}"])
    run(reward_funcs="accuracy_reward", dataset_solution_column="gold", num_samples=1, batch_size=2, output_dir="b")
    assert [record["reward"] for record in read("b/rows.jsonl")] == [1, 0, 0, 0, 1]


def test_reward_functions_see_the_columns_once_a_right_answer():
    seen = {}

    def reward(prompts, completions, solution, level, trainer_state, **kwargs):
        seen.update(prompts=prompts, completions=completions, solution=solution, level=level)
        return [0.0, None, 0.5, None]

    best = benchmarks.any_of_solutions(reward)
    scores = best(
        prompts=["p", "q", "r"], completions=["x", "y", "z"], level=[1, 2, 3], trainer_state=None,
        solutions=[["$1$", "$2$"], ["$3$"], ["$4$"]], solution=[["$1$", "$2$"], ["$3$"], ["$4$"]],
    )  # fmt: skip
    assert scores == [0.0, 0.5, None]
    assert seen == {
        "prompts": ["p", "p", "q", "r"], "completions": ["x", "x", "y", "z"], "level": [1, 1, 2, 3],
        "solution": ["$1$", "$2$", "$3$", "$4$"],
    }  # fmt: skip
    assert best.__name__ == "reward"


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(folder, capsys):
    options = {**RUN, "reward_funcs": "my_rewards.mortal_reward"}
    killed = launch(command_line(options), KILL="1")
    assert killed.returncode == -9, killed.stderr
    assert len(read("out/rows.jsonl")) == 8  # two batches
    with open("out/rows.jsonl", "a") as file:
        file.write('{"problem": 2, "sample": 2, "te')  # as if it had been killed within a line
    resumed = run(**options)
    assert "8/21" in capsys.readouterr().err
    whole = run(reward_funcs="my_rewards.mortal_reward", output_dir="whole")
    assert Path("out/rows.jsonl").read_bytes() == Path("whole/rows.jsonl").read_bytes()
    assert resumed == whole


def test_resuming_after_any_byte_gives_the_same_file(folder):
    summary = run()
    whole = Path("out/rows.jsonl").read_bytes()
    header = whole.index(b"\n") + 1
    lines = [header + len(b"".join(whole[header:].splitlines(keepends=True)[:count])) for count in (0, 3, 4, 20)]
    for end in [*lines, lines[1] + 5, lines[2] - 1, lines[3] + 1, len(whole) - 1]:
        Path("out/rows.jsonl").write_bytes(whole[:end])
        assert run() == summary
        assert Path("out/rows.jsonl").read_bytes() == whole


def test_a_complete_run_is_only_summed_up(folder, monkeypatch):
    run()
    monkeypatch.setattr(evaluate, "load_sampler", lambda *_: pytest.fail("the model was loaded"))
    assert run(pass_at_k=[2])["rows"]["pass_at_2"] > 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", 0.5, "temperature: 1.0 / 0.5"),
        ("num_samples", 2, "num_samples: 3 / 2"),
        ("batch_size", 5, "batch_size: 4 / 5"),
        ("seed", 1, "seed: 0 / 1"),
        ("model_name_or_path", "adapters", "model_name_or_path: 'model' / 'adapters'"),
        ("system_prompt", "Be brief.", "system_prompt: None / 'Be brief.'"),
        ("reward_funcs", "my_rewards.mortal_reward", "reward_funcs: .*parity_reward.* / .*mortal_reward"),
    ],
)
def test_a_file_of_other_settings_is_refused(folder, option, value, message):
    run()
    before = Path("out/rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"rows.jsonl was made with other settings .*{message}"):
        run(**{option: value})
    assert Path("out/rows.jsonl").read_bytes() == before


def test_a_file_without_responses_holds_to_no_settings(folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluate, "load_sampler", lambda *_: 1 / 0)
        run(seed=1)
    assert Path("out/rows.jsonl").exists()
    assert run(seed=2)


def test_a_file_of_other_problems_or_weights_is_refused(folder):
    run()
    make_rows(8).select(range(1, 8)).to_parquet("rows.parquet")
    with pytest.raises(ValueError, match=r"problems: '.*' / '.*'"):
        run()
    make_rows().to_parquet("rows.parquet")
    assert run()
    original = Path("model").resolve()
    Path("model").unlink()
    model = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained("model")
    make_byte_tokenizer().save_pretrained("model")
    with pytest.raises(ValueError, match=r"model_files: '.*' / '.*'"):
        run()
    Path("out/rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="no file of responses"):
        run()


def test_adapters_are_loaded_on_their_base_model(folder):
    run(model_name_or_path="adapters")
    assert read("out/rows.jsonl")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "adapters").merge_and_unload(
    ).save_pretrained("merged")  # fmt: skip
    make_byte_tokenizer().save_pretrained("merged")
    run(model_name_or_path="merged", output_dir="merged-out")
    run(output_dir="base-out")
    texts = [[record["text"] for record in read(f"{name}/rows.jsonl")] for name in ("out", "merged-out", "base-out")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("base", "message"), [(None, "names no base model"), ("/no/such/model", "/no/such/model")])
def test_adapters_without_base(folder, base, message):
    own = folder / "own"
    own.mkdir()
    for path in Path("adapters").iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=f"'own'.*{message}.*set base_model_name_or_path"):
        run(model_name_or_path="own")
    assert run(model_name_or_path="own", base_model_name_or_path="model")


def test_several_datasets_and_their_macro_mean(folder):
    make_rows(12).select(range(9, 12)).to_parquet("few.parquet")
    summary = run(dataset_name=["rows.parquet", "few.parquet"])
    assert list(summary) == ["rows", "few", "macro mean"]
    for key in ("pass_at_1", "pass_at_3", "mean_length", "truncated"):
        assert summary["macro mean"][key] == pytest.approx((summary["rows"][key] + summary["few"][key]) / 2)
    alone = run(dataset_name="few.parquet", output_dir="alone")
    assert alone["few"] == summary["few"]  # whatever else was evaluated before it
    low, high = summary["macro mean"]["pass_at_1_interval"]
    assert low < summary["macro mean"]["pass_at_1"] < high


def write_run(path: str, rewards: list[list[float | None]], lengths: list[list[int]], **settings) -> None:
    """A file of responses made by hand."""
    Path(path).parent.mkdir(exist_ok=True)
    count = len(rewards[0])
    header = {"num_samples": count, "num_responses": count * len(rewards), "problems": "p", "dataset_name": "d"}
    lines = [{"settings": header | settings}]
    for index, (reward, length) in enumerate(zip(chain(*rewards), chain(*lengths), strict=True)):
        problem, sample = divmod(index, count)
        lines.append({"problem": problem, "sample": sample, "text": "", "length": length, "finished": True})
        lines[-1] |= {"reward": reward, "answer": None}
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_comparison_is_paired_over_problems(folder, capsys):
    write_run("a/x.jsonl", [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [None, None]], [[10, 30], [20, 20], [30, 50], [9, 9]])
    b = [[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    write_run("b/x.jsonl", b, [[5, 15], [10, 10], [15, 25], [9, 9]], temperature=0.5, model_name_or_path="b")
    evaluate_report.run_comparison(["a/x.jsonl", "b/x.jsonl"])
    output = capsys.readouterr()
    assert output.err == "Note: the runs differ also in temperature: 'unset' / 0.5\n"
    numbers = json.loads(output.out.splitlines()[-1])["x"]
    assert numbers["pass_at_1"] == pytest.approx([0.5, 2.5 / 3])
    assert numbers["difference"] == pytest.approx(1 / 3)
    assert numbers["difference_interval"] == pytest.approx([0, 0.5])
    assert numbers["p_value"] == pytest.approx(2 / 4)  # two problems differ, by 1/2 each
    assert numbers["length_ratio"] == pytest.approx(0.5)
    assert numbers["length_ratio_interval"] == pytest.approx([0.5, 0.5])
    assert numbers["num_problems"] == 3  # the fourth is unscored in one run


def test_comparison_of_folders_has_a_macro_mean(folder, capsys):
    for name, reward in (("a", 0.0), ("b", 1.0)):
        write_run(f"{name}/x.jsonl", [[reward]] * 4, [[10]] * 4)
        write_run(f"{name}/y.jsonl", [[0.5]] * 2, [[10 + 10 * reward]] * 2)
    evaluate_report.run_comparison(["a", "b"])
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(numbers) == ["x", "y", "macro mean"]
    assert numbers["macro mean"]["difference"] == pytest.approx(0.5)
    assert numbers["macro mean"]["p_value"] == pytest.approx(2 / 16)
    assert numbers["macro mean"]["length_ratio"] == pytest.approx(15 / 10)


def test_runs_that_cannot_be_compared(folder):
    write_run("a/x.jsonl", [[0.0]], [[1]])
    write_run("b/x.jsonl", [[0.0]], [[1]], problems="q", dataset_name="e")
    write_run("c/x.jsonl", [[0.0]], [[1]], num_responses=5)
    write_run("d/y.jsonl", [[None]], [[1]])
    for words, message in (
        (["a/x.jsonl", "b/x.jsonl"], "x.jsonl is of d .* of e .*not the same problems"),
        (["a/x.jsonl", "c/x.jsonl"], "c/x.jsonl holds 1 of 5 responses"),
        (["a/x.jsonl", "d/y.jsonl"], "no problem that both scored"),
        (["a", "d"], "no .jsonl files of the same name"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_report.run_comparison(words)
    with pytest.raises(FileNotFoundError, match=r"no file or folder e/x.jsonl"):
        evaluate_report.run_comparison(["a/x.jsonl", "e/x.jsonl"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "math5000"}, "no benchmark 'math5000'.*math500, aime24, minerva, olympiadbench"),
        ({"dataset_name": ["rows.parquet", "more/rows.jsonl"]}, "rows, rows; each name may be there once"),
        ({"engine": "jax"}, "engine is 'jax'; use one of transformers, vllm"),
        ({"pass_at_k": [2, 4]}, "pass_at_k is 4, but num_samples is 3"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dataset_prompt_column": "question"}, "dataset_prompt_column is 'question'.*prompt, reward_model"),
        ({"dataset_solution_column": "reward_model.gold"}, "'reward_model.gold'.*ground_truth"),
        ({"reward_funcs": "accuracy"}, "no reward function 'accuracy'"),
    ],
)
def test_mistakes_are_explained(folder, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not Path("out").exists()


def test_missing_files_models_and_answers(folder):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*missing.parquet"):
        run(dataset_name="missing.parquet")
    with pytest.raises(FileNotFoundError, match=r"model_name_or_path is './nope', but there is no folder"):
        run(model_name_or_path="./nope")
    with pytest.raises(ValueError, match="model_name_or_path is not set"):
        evaluate.main(evaluate.EvaluationArguments())
    make_rows().select([]).to_parquet("rows.parquet")
    with pytest.raises(ValueError, match=r"split 'train' of 'rows.parquet' has no rows"):
        run()
    Dataset.from_dict({"prompt": ["1+1="], "gold": [" "]}).to_parquet("rows.parquet")
    with pytest.raises(ValueError, match=r"' '.*each row needs a right answer"):
        run(dataset_solution_column="gold")
    Dataset.from_dict({"prompt": ["1+1="], "gold": ["2"]}).to_parquet("rows.parquet")
    with pytest.raises(ValueError, match=r"accuracy_reward reads chat messages.*system_prompt"):
        run(dataset_solution_column="gold", reward_funcs="accuracy_reward")


# A row of each benchmark as the Hub has it.
HUB_ROWS = {
    "math500": {"problem": "P", "solution": "Long. $\\boxed{2}$", "answer": "2", "level": 1},
    "aime24": {"id": 60, "problem": "P", "solution": "Long.", "answer": "204"},
    "minerva": {"question": "P", "answer": "9.6"},
    "olympiadbench": {
        "question": "P",
        "solution": ["Long."],
        "final_answer": ["$69$,$84$"],
        "is_multiple_answer": True,
    },
}


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_named_benchmarks(folder, name, monkeypatch):
    asked = []
    monkeypatch.setattr(
        benchmarks, "load_split", lambda *args, **kwargs: asked.append(args) or Dataset.from_list([HUB_ROWS[name]])
    )
    benchmark = benchmarks.find_benchmark(name, "other", "other", "other", None)
    (problem,) = benchmarks.load_problems(benchmark, None, ["accuracy_reward"])
    assert asked[0][0].count("/") == 1 and asked[0][2] in ("test", "train")
    assert [message["role"] for message in problem["prompt"]] == ["system", "user"]
    assert "\\boxed" in problem["prompt"][0]["content"] and problem["prompt"][1]["content"] == "P"
    expected = {"math500": "$2$", "aime24": "$204$", "minerva": "$9.6$", "olympiadbench": "$69$,$84$"}
    assert problem["solutions"] == [expected[name]]
    without = benchmarks.find_benchmark(name, None, None, None, "")
    (problem,) = benchmarks.load_problems(without, None, [])
    assert [message["role"] for message in problem["prompt"]] == ["user"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_rows", "num_right", "num_boxed"),
    [("math500", 500, 492, 500), ("aime24", 30, 30, 30), ("minerva", 272, 272, 272), ("olympiadbench", 675, 672, 672)],
)
@pytest.mark.parametrize("reward", ["accuracy_reward", "boxed_math_accuracy_reward"])
def test_verifier_accepts_the_right_answers_of_the_benchmarks(name, num_rows, num_right, num_boxed, reward):
    r"""TRL's misses what LaTeX takes but math-verify, which reads responses strictly, does not (\frac43)."""
    benchmark = benchmarks.find_benchmark(find_data(name), None, "prompt", "reward_model.ground_truth", None)
    problems = benchmarks.load_problems(benchmark, None, [reward])
    assert len(problems) == num_rows
    (verifier,) = map(benchmarks.any_of_solutions, train.load_reward_funcs(train.TreeRPOScriptArguments(
        reward_funcs=[reward])))  # fmt: skip
    solutions = [problem["solutions"] for problem in problems]
    answers = [several[0].replace("\\$", "").replace("$", "") for several in solutions]
    completions = [[{"role": "assistant", "content": f"So it is $\\boxed{{{answer}}}$."}] for answer in answers]
    rewards = verifier(completions=completions, solutions=solutions)
    assert sum(score == 1 for score in rewards) >= (num_boxed if reward.startswith("boxed") else num_right)
    assert not any(math.isnan(score or 0) for score in rewards)
