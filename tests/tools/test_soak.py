"""A short run of `soak.py`: nothing is left behind by a step."""

import pytest
from soak import soak, take_count


@pytest.mark.slow
def test_steps_leave_no_tensor_cache_file_or_thread_behind(tmp_path):
    caches = take_count(0).caches  # that other tests of this process may hold
    report = soak(60, str(tmp_path))
    assert report["steps"] == 60 and report["is_finite"]
    assert report["different_trees"] > 10
    for name in ("tensors", "files", "threads"):
        low, high = report[name]
        assert low == high, f"{name} range from {low} to {high}"
    assert report["caches"] == [caches, caches]
    assert report["memory_growth"] < 0.02
