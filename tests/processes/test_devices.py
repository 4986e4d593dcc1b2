"""Every tensor is made where the model is: runs on a device that, like an accelerator, takes no CPU tensors."""

import json
import os
import subprocess
import sys

import device_run
import pytest
import torch
from places import PROCESSES, ROOT


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the runs wrote."""
    folder = tmp_path_factory.mktemp("devices")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(PROCESSES / "device_run.py"), str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_the_device_refuses_what_an_accelerator_does(folder):
    assert json.loads((folder / "refused.json").read_text()) == list(device_run.REFUSED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_an_accelerator_refuses_the_same():
    assert device_run.find_refused(torch.accelerator.current_accelerator()) == list(device_run.REFUSED)


@pytest.mark.parametrize("name", device_run.SCENARIOS)
def test_a_run_mixes_no_devices_and_gives_the_numbers_of_the_cpu(folder, name):
    expected, got = json.loads((folder / f"{name}.json").read_text()).values()
    for outcome in (expected, got):
        assert isinstance(outcome, dict), outcome
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
