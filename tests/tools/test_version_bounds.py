"""The versions that pyproject.toml allows are those that tests run with."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from places import ROOT
from version_bounds import oldest


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if "==" in line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_pinned_versions_are_allowed_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in (ROOT / "constraints.txt", ROOT / "tests/tools/vllm_constraints.txt"):
        pinned = pins(path)
        for requirement in map(Requirement, project["dependencies"]):
            assert requirement.specifier.contains(pinned[requirement.name]), f"{requirement} in {path.name}"


def test_vllm_runs_with_the_oldest_trl_and_transformers():
    least = dict(line.split("==") for line in oldest())
    for name in ("transformers", "trl"):
        assert pins(ROOT / "tests/tools/vllm_constraints.txt")[name] == f"{least[name]}.0"
