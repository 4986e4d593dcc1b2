"""The documentation hangs together: its length, its links, its pages, and what PyPI and the site make of it."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml
from places import ROOT


DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
OUTSIDE = ["README.md", "CONTRIBUTING.md", "examples/README.md", "examples/results/paper_credit/README.md"]
# In docs/, `make docs` checks every link.
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#([^)\s]+))?\)")


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_minutes():
    assert 800 <= len(README.split()) <= 1300


@pytest.mark.parametrize("file", OUTSIDE)
def test_links_outside_of_the_site_lead_somewhere(file):
    links = LINK.findall((ROOT / file).read_text())
    assert links
    for path, anchor in links:
        target = (ROOT / file).parent / path
        assert target.exists(), f"{file} links to {path}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{file} links to {path}#{anchor}; there is no such heading"


def test_every_page_has_a_place_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = re.findall(r"[\w-]+\.md", str(navigation))
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_readme_is_whole_on_pypi():
    """PyPI knows no files of the repository: every link and every picture is an address there."""
    text = runpy.run_path(str(ROOT / "hatch_build.py"))["with_addresses"](README, REPOSITORY)
    assert LINK.findall(README) and not LINK.findall(text)
    assert f"({REPOSITORY}/raw/main/docs/assets/tree.png)" in text
    assert f"({REPOSITORY}/blob/main/docs/results.md)" in text


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    as_markdown = runpy.run_path(str(DOCS / "docstrings.py"))["as_markdown"]
    text = """
What it does, see [`TreeRPOConfig`] and [`~trl.GRPOTrainer`].

Args:
    first, second,
    third:
        What they are.
    steps (`int`, *optional*, defaults to `1`): How many.

        - `1`: one.

Returns:
    A number.
"""
    expected = """
What it does, see [`TreeRPOConfig`][treerpo_trl.TreeRPOConfig] and [`GRPOTrainer`](GRPO).

**Args**

- `first`, `second`, `third`:
    What they are.

- `steps` (`int`, *optional*, defaults to `1`): How many.

    - `1`: one.

**Returns**

A number."""
    grpo = "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOTrainer"
    assert as_markdown(text) == expected.replace("(GRPO)", f"({grpo})")
