"""The launch configurations are those that TRL ships, and the CPU ones differ from them only where they must."""

from pathlib import Path

import pytest
import trl
import yaml
from places import ROOT


OURS = ROOT / "accelerate_configs"
THEIRS = Path(trl.__file__).parent / "accelerate_configs"
# Ours -> TRL's, and the values in which ours differ.
SHARED = {
    "single_gpu": ("single_gpu", {"num_processes": 1}),  # TRL's says 8, which accelerate ignores
    "multi_gpu": ("multi_gpu", {}),
    "deepspeed_zero1": ("zero1", {"deepspeed_config": {"gradient_accumulation_steps": None}}),  # the trainer's
    "deepspeed_zero2": ("zero2", {}),
    "deepspeed_zero3": ("zero3", {}),
    "fsdp1": ("fsdp1", {}),
    "fsdp2": ("fsdp2", {}),
}
CPU = ["multi", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", SHARED)
def test_they_are_trls(name):
    theirs, different = SHARED[name]
    expected = read(THEIRS / f"{theirs}.yaml")
    for key, value in different.items():
        expected[key] = {**expected[key], **value} if isinstance(value, dict) else value
        if isinstance(value, dict):
            expected[key] = {option: setting for option, setting in expected[key].items() if setting is not None}
    assert read(OURS / f"{name}.yaml") == expected


@pytest.mark.parametrize("name", CPU)
def test_those_for_cpus_differ_where_they_must(name):
    gpu = read(OURS / f"{'multi_gpu' if name == 'multi' else name}.yaml")
    cpu = read(OURS / f"{name}_cpu.yaml")
    expected = {**gpu, "num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    expected.pop("gpu_ids", None)
    assert cpu == expected


def test_every_configuration_is_checked():
    names = {path.stem for path in OURS.glob("*.yaml")}
    assert names == {*SHARED, *(f"{name}_cpu" for name in CPU), "single_cpu"}
