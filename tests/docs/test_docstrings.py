"""Documentation is complete: every public name says what it is for, every option what it does."""

import ast
import dataclasses
import re
from collections.abc import Iterator

import pytest
from places import ROOT
from trl import GRPOConfig

from treerpo_trl import TreeRPOConfig


FILES = sorted([*(ROOT / "treerpo_trl").rglob("*.py"), *(ROOT / "examples").glob("*.py")])
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public_definitions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes and functions of a module, and public methods of these classes; not what functions hold."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{owner}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{owner}{node.name}.")


def undocumented(source: str) -> list[str]:
    module = ast.parse(source)
    names = [name for name, node in public_definitions(module.body) if not ast.get_docstring(node)]
    return names if ast.get_docstring(module) else ["the module", *names]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_every_public_name_has_a_docstring(path):
    assert undocumented(path.read_text()) == []


def test_a_missing_docstring_is_found():
    source = "class A:\n    '''A.'''\n    def f(self): ...\n    def _g(self): ...\ndef h():\n    def inner(): ...\n"
    assert undocumented(source) == ["the module", "A.f", "h"]


def test_every_option_is_described_where_trl_users_look():
    """In the docstring, with its default, and in the help of the command line."""
    upstream = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    own = [field for field in dataclasses.fields(TreeRPOConfig) if field.name not in upstream]
    assert {"branching_factor", "log_trees"} <= {field.name for field in own}
    docstring, page = TreeRPOConfig.__doc__, (ROOT / "docs" / "options.md").read_text()
    for field in own:
        assert f"\n        {field.name} (" in docstring, f"{field.name} is not in TreeRPOConfig's docstring"
        assert field.metadata.get("help"), f"{field.name} has no help"
        assert f"`{field.name}`" in page, f"{field.name} is not in docs/options.md"


def as_value(text):
    """What a default's text says, in Python or as a bare word."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def test_the_docstring_names_the_defaults():
    """Those that are derived from others are in the table of docs/options.md."""
    described = re.findall(r"\n        (\w+) \(.*, defaults to [^`]*`(.+?)`\):", TreeRPOConfig.__doc__)
    assert {"advantage_estimator", "prune_threshold", "log_trees"} <= {name for name, _ in described}
    fields = {field.name: field for field in dataclasses.fields(TreeRPOConfig)}
    for name, text in described:
        field = fields[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        expected = [as_value(text)] if name == "branching_factor" else as_value(text)
        assert default == expected, f"{name}: {default!r}, and the docstring says {text}"


def test_the_page_of_options_names_the_defaults():
    """Every row of the table of parameters against a configuration that was given nothing."""
    page = (ROOT / "docs" / "options.md").read_text()
    table = page.split("| Parameter | Default | Meaning |\n")[1].split("\n\n")[0].splitlines()[1:]
    config = TreeRPOConfig("out", bf16=False, report_to="none")
    compared = []
    for row in table:
        names, defaults = (re.findall(r"`([^`]+)`", cell) for cell in row.split(" | ")[:2])
        for name, text in zip(names, defaults, strict=False):  # behind the value stands what it is derived from
            if text not in vars(config):
                default = getattr(config, name)
                expected = [as_value(text)] * config.max_depth if name == "branching_factor" else as_value(text)
                assert default == expected, f"{name}: {default!r}, and docs/options.md says {text}"
                compared.append(name)
    assert len(compared) >= 15
