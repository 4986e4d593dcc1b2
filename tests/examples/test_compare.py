"""The comparison with GRPO: equal budgets, honest statistics, runs that resume, and the script as a user runs it."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import compare_grpo
import compare_report as report
import compare_run
import gradient_snr
import numpy as np
import pytest
from chain_arithmetic import make_dataset
from compare_grpo import choose, parse_options, tuning_runs
from compare_plan import Budget, Method, Run, check_settings, expected_tokens, is_complete, read_records
from compare_run import Recorder
from compare_workload import Workload, built_in
from places import ROOT
from scipy import stats

from treerpo_trl.growth import Backend, TreeShape, grow
from treerpo_trl.tree import Segment


class CoinBackend(Backend):
    """Ends a segment after each token with probability 0.1."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def extend(self, trees, wave):
        return [[self.segment(most) for _ in range(wave.num_children)] for most in wave.max_tokens]

    def segment(self, max_tokens):
        for length in range(1, max_tokens + 1):
            if self.rng.random() < 0.1:
                return Segment((1,) * length, True)
        return Segment((1,) * max_tokens, False)


@pytest.mark.parametrize("branching", [(5,), (2, 2, 2), (4, 2)])
def test_expected_tokens_are_those_of_grown_trees(branching):
    shape = TreeShape(branching, -(-20 // len(branching)), 20)
    flat = grow([[0]] * 3000, TreeShape((1,), 20, 20), CoinBackend(0))
    lengths = [tree.num_sampled_tokens for tree in flat]
    trees = grow([[0]] * 1000, shape, CoinBackend(1))
    sampled = np.array([tree.num_sampled_tokens for tree in trees])
    error = 4 * (sampled.std() / math.sqrt(1000) + shape.num_leaves * np.std(lengths) / math.sqrt(3000))
    assert expected_tokens(shape, lengths) == pytest.approx(sampled.mean(), abs=error)


def test_a_flat_tree_costs_its_leaves():
    assert expected_tokens(Method("grpo", (), 8).shape(30), [10, 20]) == 8 * 15


def test_prompts_a_step_by_budget():
    tree, flat = Method("t", (2, 2)).shape(20), Method("g", (), 8).shape(20)
    tokens, leaves, prompts = Budget("tokens", 1e5, 2400), Budget("leaves", 1e5, 64), Budget("prompts", 1e3, 9)
    assert tokens.prompts_per_step(tree, expected_tokens(tree, [20] * 4)) == 2400 // (2 * 10 + 4 * 10)
    assert tokens.prompts_per_step(flat, expected_tokens(flat, [20] * 4)) == 2400 // 160
    assert (leaves.prompts_per_step(tree, 60), leaves.prompts_per_step(flat, 160)) == (16, 8)
    assert (prompts.prompts_per_step(tree, 60), prompts.prompts_per_step(flat, 160)) == (9, 9)


def make_run(**changes):
    return replace(Run(Workload(), Method("m"), Budget("tokens", 1000, 100), 1e-3, 0, "test"), **changes)


@pytest.mark.parametrize(("tokens", "step", "spent"), [(940, 10, False), (960, 10, True), (1000, 10, True)])
def test_training_ends_at_the_step_closest_to_the_budget(tokens, step, spent):
    recorder = Recorder(make_run(), Path("unused"), 8, 1)
    recorder.tokens = tokens
    assert recorder.is_spent(step) is spent


def test_welch_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.02, 5), rng.normal(0.5, 0.05, 7)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    delta, low, high = report.welch(a, b)
    assert (delta, low, high) == pytest.approx((a.mean() - b.mean(), expected.low, expected.high))
    _, wider_low, wider_high = report.welch(a, b, extra_variance=0.01)
    assert wider_low < low and wider_high > high


def make_curve(pass_at_1, tokens=(0, 100, 200), length=10.0, scores=(0.0, 1.0)):
    final = {"pass_at_1": pass_at_1[-1], "mean_length": length, "tokens": tokens[-1], "cpu_seconds": 1.0}
    columns = {name: np.array(tokens, float) for name in ("tokens", "seconds", "cpu_seconds")}
    return report.Curve(
        **columns, pass_at_1=np.array(pass_at_1), mean_length=np.array([length] * len(tokens)),
        problem_scores=np.array(scores), metrics=[], final=final,
    )  # fmt: skip


def test_parity_is_the_share_of_the_others_tokens():
    flat = [make_curve([0.2, 0.3, 0.4])]
    assert report.parity([make_curve([0.2, 0.4, 0.5])], flat) == pytest.approx(0.5)
    assert report.parity([make_curve([0.2, 0.3, 0.5])], flat) == pytest.approx(0.75)
    assert report.parity([make_curve([0.2, 0.3, 0.39])], flat) is None
    assert report.parity(flat, flat) == pytest.approx(1.0)


def test_equal_cost_is_that_of_the_cheaper():
    cheap = [make_curve([0.2, 0.4, 0.5 + noise], tokens=(0, 50, 100)) for noise in (0, 0.02)]
    dear = [make_curve([0.2, 0.3 + noise, 0.6], tokens=(0, 100, 200)) for noise in (0, 0.02)]
    delta, low, high = report.difference_at_equal_cost(cheap, dear)
    assert delta == pytest.approx(0.51 - 0.31)
    assert low < delta < high
    assert report.difference_at_equal_cost(dear, cheap)[0] == pytest.approx(-delta)


def test_summary_of_two_methods():
    tree = [make_curve([0.2, 0.5, 0.6 + noise], length=8.0) for noise in (0, 0.02)]
    flat = [make_curve([0.2, 0.4, 0.5 + noise], length=10.0, tokens=(0, 100, 202)) for noise in (0, 0.02)]
    summary = report.compare(tree, flat)
    assert summary["delta_pass_at_1"] == pytest.approx(0.1)
    low, high = summary["delta_pass_at_1_ci"]
    assert low < 0.1 < high
    assert summary["length_ratio"] == pytest.approx(0.8)
    assert summary["token_mismatch"] == pytest.approx(2 / 202)
    assert summary["seeds"] == 2


def test_the_interval_covers_the_truth():
    """Over many studies of five seeds, the 95% interval holds the true difference about as often as it says."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        a, b = rng.normal(0.53, 0.02, 5), rng.normal(0.5, 0.01, 5)
        _, low, high = report.welch(a, b)
        covered += low <= 0.03 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_best_method_and_rate_are_chosen_by_their_mean(tmp_path):
    runs = tuning_runs(make_run(), [Method("a"), Method("b")], [1e-3, 1e-2], [0, 1])
    assert all(run.split == "validation" for run in runs)
    scores = {("a", 1e-3): (0.1, 0.9), ("a", 1e-2): (0.6, 0.6), ("b", 1e-3): (0.2, 0.2), ("b", 1e-2): (0.3, 0.3)}
    for run in runs:
        score = scores[run.method.name, run.learning_rate][run.seed]
        (tmp_path / f"{run.name}.jsonl").write_text(json.dumps({"pass_at_1": score, "final": True}) + "\n")
    method, rate = choose(runs, tmp_path)
    assert (method.name, rate) == ("a", 1e-2)


def test_options_are_yaml():
    assert parse_options(["bf16=true", "beta=0.1", "loss_type=dr_grpo"]) == {
        "bf16": True, "beta": 0.1, "loss_type": "dr_grpo"
    }  # fmt: skip
    with pytest.raises(ValueError, match="'bf16' has no value"):
        parse_options(["bf16"])


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"run": 1}\n{"step": 0}\n{"step": 1, "fi')
    assert read_records(path) == [{"run": 1}, {"step": 0}]
    assert not is_complete(path)


def test_snr_recovers_what_gradients_were_made_of():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=2000)
    direction *= 3 / np.linalg.norm(direction)
    gradients = direction + rng.normal(scale=5 / math.sqrt(2000), size=(400, 2000))  # noise of norm 5
    assert gradient_snr.snr(gradients @ gradients.T) == pytest.approx(3 / 5, rel=0.05)
    noise_only = gradients - direction
    assert gradient_snr.snr(noise_only @ noise_only.T) < 0.1
    result = gradient_snr.compare_snr(gradients, 2 * direction + 2 * noise_only)
    assert result["snr_ratio"] == pytest.approx(1, abs=0.02)  # scale does not matter
    low, high = result["snr_ratio_ci"]
    assert low < 1 < high
    assert result["cosine"] == pytest.approx(1, abs=0.05)


def command(output_dir, *options):
    return [
        sys.executable, "examples/compare_grpo.py", "--task", "chain_arithmetic", "--output_dir", str(output_dir),
        "--per_step", "600", "--total", "2400", "--workers", "1", "--learning_rates", "2e-4", "--tuning_seeds", "9",
        "--seeds", "0", "1", "--num_validation", "16", "--num_test", "32", "--num_evaluations", "2", *options,
    ]  # fmt: skip


def run_script(monkeypatch, capsys, words):
    """A command in this process, which has imported all it needs; its workers are processes all the same. The summary
    that it prints last."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words[1:])
    compare_grpo.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_the_script_compares_and_resumes_after_a_kill(tmp_path, monkeypatch, capsys):
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob("checkpoints/*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.read_text() for path in tmp_path.glob("*.jsonl") if is_complete(path)}
    summary = run_script(monkeypatch, capsys, command(tmp_path))
    for path, text in finished.items():
        assert path.read_text() == text
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["seeds"] == 2
    assert summary["token_mismatch"] < 0.3  # a step is a quarter of this budget
    low, high = summary["delta_pass_at_1_ci"]
    assert -1 <= low <= summary["delta_pass_at_1"] <= high <= 1
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "| TreeRPO | 2 |" in (tmp_path / "table.md").read_text()
    for path in tmp_path.glob("*.jsonl"):
        _, *records = read_records(path)
        steps = [record["step"] for record in records]
        assert steps == sorted(set(steps)) and steps[0] == 0
        assert len(records[-1]["problem_scores"]) == (32 if "-test-" in path.name else 16)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [Budget("leaves", 256, 64), Budget("prompts", 40, 10), Budget("seconds", 2, 600)])
@pytest.mark.parametrize("method", [Method("tree", (2, 2)), Method("wide", (4,)), Method("flat", (), 4)])
def test_the_other_budgets(tmp_path, monkeypatch, budget, method):
    monkeypatch.setattr(compare_run, "CALIBRATION_PROMPTS", 64)
    monkeypatch.setattr(compare_run, "MOST_STEPS", 200)  # for which problems are made beforehand
    workload = built_in("chain_arithmetic", tmp_path, num_validation=16, num_test=16)
    run = Run(workload, method, budget, 2e-4, 0, "test", num_evaluations=2)
    final = read_records(compare_run.execute(run, tmp_path))[-1]
    if budget.kind == "leaves":
        assert final["leaves"] == 256
    elif budget.kind == "prompts":
        assert (final["prompts"], final["step"]) == (40, 4)
    else:
        assert 1 <= final["seconds"] <= 60  # a step on a busy machine may go far beyond its two seconds


def test_a_checkpoint_that_was_cut_short_is_not_taken(tmp_path):
    assert compare_run.last_checkpoint(tmp_path / "none") is None
    for step, state in ((9, "{}"), (10, '{"global_step"'), (11, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert compare_run.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]


def test_a_budget_that_is_not_spent_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_run, "MOST_STEPS", 1)
    workload = built_in("chain_arithmetic", tmp_path, num_validation=4, num_test=4)
    run = Run(workload, Method("flat", (), 4), Budget("seconds", 1000, 200), 2e-4, 0, "test")
    with pytest.raises(RuntimeError, match=r"only \d% of its budget of 1000 seconds in 1 steps"):
        compare_run.execute(run, tmp_path)


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    run = make_run(method=Method("tree", (2, 2)))
    (tmp_path / f"{run.name}.jsonl").write_text(json.dumps({"run": asdict(run)}) + "\n")
    check_settings(run, tmp_path)
    check_settings(replace(run, num_evaluations=3), tmp_path)
    with pytest.raises(ValueError, match=r"budget.total=1000, but now it is 2000; use another output_dir"):
        check_settings(replace(run, budget=Budget("tokens", 2000, 100)), tmp_path)
    with pytest.raises(ValueError, match=r"method.branching=\[2, 2\], but now it is \[4\]"):
        check_settings(replace(run, method=Method("tree", (4,))), tmp_path)


@pytest.mark.slow
def test_any_model_and_dataset(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split, held_out in (("train", False), ("test", True)):
        rows = make_dataset(64, 0, held_out).rename_columns({"prompt": "question", "answer": "gold"})
        rows = rows.map(lambda row: {"answer": row["gold"]}, remove_columns="gold")
        rows.to_parquet(data / f"{split}.parquet")
    options = [
        "--model_name_or_path", "examples/base_model", "--dataset_name", str(data), "--dataset_prompt_column",
        "question", "--reward_funcs", "chain_arithmetic.correctness_reward", "--max_completion_length", "37",
        "--branching_factor", "4", "2", "--workers", "1", "--treerpo_options", "advantage_estimator=centered",
    ]  # fmt: skip
    arguments = command(tmp_path / "out", *options)
    index = arguments.index("--task")
    summary = run_script(monkeypatch, capsys, arguments[:index] + arguments[index + 2 :])
    assert summary["methods"]["TreeRPO"][0] == "treerpo-4x2"
    assert 0.1 < summary["pass_at_1_before"] < 0.5


@pytest.mark.parametrize("options", [[], ["--task", "countdown", "--model_name_or_path", "m", "--dataset_name", "d",
                                          "--reward_funcs", "accuracy_reward"],
                                     ["--model_name_or_path", "m", "--dataset_name", "d"]])  # fmt: skip
def test_a_task_or_a_model_is_needed(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_grpo.py", *options])
    with pytest.raises(SystemExit) as error:
        compare_grpo.main()
    assert error.value.code == 2
    assert "--task" in capsys.readouterr().err.splitlines()[-1]
