"""The paper's data, where they are at hand: the package must not carry them."""

import os
from pathlib import Path

import pytest
from places import ROOT


DATA = Path(os.environ.get("TREERPO_DATA", ROOT.parent / "shared" / "data"))


def find_data(name: str) -> str:
    """The parquet file of that name; the test is skipped if there is none."""
    path = DATA / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"no {name}.parquet in {DATA}; set TREERPO_DATA to the folder that holds it")
    return str(path)
