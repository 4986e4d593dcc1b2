"""Two CPU processes over gloo: whole trees on each, one model on both, packed rows as dense ones."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(model_path, output_dir, prefix_sharing: str) -> list[dict]:
    """What each process saw. A hang is a failure after four minutes."""
    output_dir.mkdir()
    command = [*LAUNCH, "tests/distributed_run.py", model_path, str(output_dir), prefix_sharing]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((output_dir / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def runs(model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    return {sharing: run(model_path, path / sharing, sharing) for sharing in ("true", "false")}


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["true", "false"])
def test_processes_hold_the_same_model_and_different_trees(runs, sharing):
    first, second = runs[sharing]
    assert first["processes"] == second["processes"] == 2
    assert first["shares"] == second["shares"] == (sharing == "true")
    assert first["parameters"] == second["parameters"]
    assert first["prompts"] != second["prompts"]
    assert first["scored"] != second["scored"]  # so the processes did not have equal work
    assert all(first["calls"] + second["calls"])  # no trajectory was scored twice
    losses = [log["loss"] for log in first["logs"]]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_packed_rows_train_as_dense_ones(runs):
    shared, dense = runs["true"][0], runs["false"][0]
    for name, value in dense["parameters"].items():
        assert shared["parameters"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    for packed, plain in zip(shared["logs"], dense["logs"], strict=True):
        for name in ("loss", "reward", "kl", "entropy", "tree/nodes", "tree/trained_tokens"):
            assert packed[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), name
