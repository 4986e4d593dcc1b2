"""Constraints for pip that hold every package at the oldest version of pyproject.toml, or at none: the newest.

python tests/tools/version_bounds.py oldest|newest
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


NOT_HERE = {"torch", "bitsandbytes"}  # other builds than for CPUs; what installs them says which version


def oldest() -> list[str]:
    """`name==version` for the least version of each package that is needed or that an extra used in tests needs."""
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = map(Requirement, [*project["dependencies"], *extras["deepspeed"], *extras["math"]])
    return [
        f"{requirement.name}=={specifier.version}"
        for requirement in requirements
        for specifier in requirement.specifier
        if specifier.operator == ">=" and requirement.name not in NOT_HERE
    ]


if __name__ == "__main__":
    print("\n".join(oldest() if sys.argv[1] == "oldest" else []))
