"""A short run of `soak.py`: nothing is left behind by a step."""

import json
import os
import subprocess
import sys

import pytest
from places import ROOT


@pytest.mark.slow
def test_steps_leave_no_tensor_cache_file_or_thread_behind():
    """In a process of its own: what other tests have left open may be closed meanwhile."""
    command = [sys.executable, str(ROOT / "tests" / "tools" / "soak.py"), "--steps", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    start = result.stdout.rfind("{\n")
    assert start >= 0, result.stderr[-3000:]
    report = json.loads(result.stdout[start:])
    assert report["steps"] == 60 and report["is_finite"]
    assert report["different_trees"] > 10
    for name in ("tensors", "files", "threads"):
        low, high = report[name]
        assert low == high, f"{name} range from {low} to {high}"
    assert report["caches"] == [0, 0]
    assert report["memory_growth"] < 0.02
