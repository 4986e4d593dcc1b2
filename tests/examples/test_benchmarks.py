"""The benchmark scripts run, and what they say of tokens and memory is right."""

import json
import sys
from typing import Any

import benchmark_memory
import benchmark_rewards
import benchmark_speed
import gpu_check
import pytest

from treerpo_trl.growth import TreeShape
from treerpo_trl.growth.memory import most_cached_tokens


SMALL = ["--hidden_size", "64", "--num_layers", "1", "--segment_length", "4", "--prompt_length", "6", "--repeats", "2"]


def run(module, words, monkeypatch, capsys) -> Any:
    """What the last line of a script says."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *words])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_speed(monkeypatch, capsys):
    found = run(benchmark_speed, ["--shapes", "2x2x2", "4x2", *SMALL], monkeypatch, capsys)
    assert found["train_ratio"].keys() == {"2x2x2", "4x2"}
    # Eight rows of 6 + 12 tokens, the last of which predicts nothing; in the tree, each branch computes one twice.
    assert found["rho"]["2x2x2"] == pytest.approx(8 * 17 / (17 + 4 * 4 + 2 * 8 + 12), rel=0.2)
    assert all(ratio > 0 for figure in found.values() for ratio in figure.values())


def test_speed_with_several_prompts_and_early_ends(monkeypatch, capsys):
    words = ["--shapes", "2x2", "--num_prompts", "3", "--mean_length", "4", *SMALL]
    full = run(benchmark_speed, ["--shapes", "2x2", "--num_prompts", "3", *SMALL], monkeypatch, capsys)
    found = run(benchmark_speed, words, monkeypatch, capsys)
    assert 1 < found["rho"]["2x2"] != full["rho"]["2x2"]


def test_rewards(monkeypatch, capsys):
    words = ["--num_prompts", "4", "--max_frontier_rows", "4", "--shares", "0", "4", *SMALL]
    found = run(benchmark_rewards, words, monkeypatch, capsys)
    assert [(one["kind"], one["share"]) for one in found] == [
        ("waits", 0.0), ("waits", 4.0), ("computes", 0.0), ("computes", 4.0),
    ]  # fmt: skip
    assert all(one["seconds"]["in_turn"] > 4 * one["sampling"]["in_turn"] for one in found if one["share"])


def test_the_bound_of_caches():
    shape = TreeShape((8, 8, 8), segment_length=4, max_completion_length=11)
    # 2 trees: 16, 128 and 1024 rows, of 10 + 4, 10 + 8 and 10 + 11 tokens.
    assert most_cached_tokens(shape, 2, 10, max_rows=5000) == 16 * 14 + 128 * 18 + 1024 * 21
    assert most_cached_tokens(shape, 2, 10, max_rows=64) == 16 * 14 + 64 * 18 + 64 * 21
    assert most_cached_tokens(shape, 100, 10, max_rows=64) == 64 * (14 + 18 + 21)
    assert most_cached_tokens(shape, 1000, 10, max_rows=64) == most_cached_tokens(shape, 8, 10, max_rows=64)


@pytest.mark.slow
def test_memory(monkeypatch, capsys):
    """With more rows at a time there is more in memory."""
    words = ["--shape", "4x4x2", "--num_trees", "2", "--segment_length", "8", "--prompt_length", "16"]
    few, many = run(benchmark_memory, [*words, "--max_frontier_rows", "8", "64"], monkeypatch, capsys)
    assert few["bound"] == benchmark_memory.BYTES_PER_TOKEN * 8 * (24 + 32 + 40)
    assert many["bound"] == benchmark_memory.BYTES_PER_TOKEN * (8 * 24 + 32 * 32 + 64 * 40)
    assert many["peak"] > 1.3 * few["peak"]


def test_the_check_of_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    """Its own numbers say that shared prefixes are exact; a check that fails does not stop the others."""

    def fail(size, lengths):
        raise RuntimeError("no memory left")

    monkeypatch.setitem(gpu_check.CHECKS, "speed", fail)
    path = tmp_path / "check.json"
    words = ["--output", str(path), "--steps", "2", "--checks", "exact", "speed", "training"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    with pytest.raises(SystemExit, match="1 checks failed"):
        gpu_check.main()
    found = json.loads(path.read_text())
    exact, training = found["exact tiny"], found["training tiny"]
    assert exact["log_probs_float32"] < 1e-5 and exact["gradient"] < 1e-5 and exact["gradient_has_same_bits_again"]
    assert exact["log_probs_bf16"] < 2 * exact["log_probs_bf16_dense"] < 0.01
    assert found["speed tiny"] == {"failed": "RuntimeError: no memory left"}
    assert training["TreeRPO: losses are finite"] and training["GRPO: seconds"] > 0
    assert "no memory left" in capsys.readouterr().out
