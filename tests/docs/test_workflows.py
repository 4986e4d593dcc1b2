"""What runs on GitHub: the files parse, and what they call exists."""

import re

import pytest
import yaml
from places import ROOT


GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
TARGETS = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def commands(workflow: dict) -> list[str]:
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_exists(path):
    workflow = yaml.safe_load(path.read_text())
    called = commands(workflow)
    for line in called:
        words = line.split()
        assert words[0] != "make" or set(words[1:]) <= set(TARGETS), line
        assert not words[0].startswith(".") or (ROOT / words[0]).exists(), line
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more says so
    assert all("timeout-minutes" in job or "publish" in name for name, job in workflow["jobs"].items())


def test_every_supported_python_is_tested():
    workflow = yaml.safe_load((GITHUB / "workflows" / "tests.yml").read_text())
    tested = workflow["jobs"]["fast"]["strategy"]["matrix"]["python"]
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert tested == classifiers


def test_the_version_of_a_release_is_in_the_changelog():
    """As the release workflow reads it; a development version has no section yet."""
    text = (ROOT / "treerpo_trl" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"', text, flags=re.MULTILINE)
    assert "dev" in version or f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_parse_and_ask_for_versions(path):
    form = yaml.safe_load(path.read_text())
    fields = {field.get("id") for field in form.get("body", [])}
    assert path.stem != "bug" or {"what", "code", "versions"} <= fields
