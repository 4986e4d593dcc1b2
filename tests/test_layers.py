"""The architecture, executable: a module imports only from modules above it."""

import ast
import sys
from pathlib import Path

import pytest
from places import ROOT


PACKAGE = ROOT / "treerpo_trl"
STANDARD = set(sys.stdlib_module_names)
# Room or module -> what it may import besides the standard library. Everything named `treerpo_trl.*` stands above it.
MAY_IMPORT = {
    "tree": set(),
    "growth": {"treerpo_trl.tree", "accelerate", "torch", "transformers", "trl"},
    "credit": {"treerpo_trl.tree", "numpy"},
    "rows": {"treerpo_trl.tree", "treerpo_trl.growth", "treerpo_trl.credit", "torch", "trl"},
    "prefix_sharing": {"torch", "transformers"},
    "running": {"accelerate", "peft", "safetensors", "torch", "transformers"},
    "views": {"treerpo_trl.tree", "treerpo_trl.growth", "treerpo_trl.credit", "pyarrow", "rich"},
    "reporting": {
        "treerpo_trl.tree",
        "treerpo_trl.growth",
        "treerpo_trl.credit",
        "treerpo_trl.views",
        "accelerate",
        "huggingface_hub",
        "transformers",
    },
    "evaluation": {"numpy", "torch", "tqdm", "transformers", "trl"},
    "checks": {"treerpo_trl.credit", "treerpo_trl.reporting", "datasets", "peft", "torch", "transformers", "trl"},
    "treerpo_config": {"treerpo_trl.checks", "trl"},
    "trainers": {
        "treerpo_trl.tree",
        "treerpo_trl.growth",
        "treerpo_trl.credit",
        "treerpo_trl.running",
        "treerpo_trl.checks",
        "accelerate",
        "datasets",
        "torch",
        "transformers",
        "trl",
    },
}
TRAINER = {f"treerpo_trl.{name}" for name in MAY_IMPORT} | {"accelerate", "datasets", "torch", "transformers", "trl"}
# What users import by these names lies in a room.
PUBLIC_PLACES = {
    "adapters": {"treerpo_trl.checks"},
    "callbacks": {"treerpo_trl.reporting"},
    "checkpoints": {"treerpo_trl.running"},
    "statistics": {"treerpo_trl.evaluation"},
}
# Nothing of ours rests on these.
BESIDE = {
    "plan": {
        "treerpo_trl.checks",
        "treerpo_trl.growth",
        "treerpo_trl.treerpo_config",
        "rich",
        "torch",
        "transformers",
    },
    "rewards": {"trl"},
}
ALLOWED = {**MAY_IMPORT, "treerpo_trainer": TRAINER, **PUBLIC_PLACES, **BESIDE, "__init__": {"treerpo_trl"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The module, or the folder, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Modules a file imports: top-level names of others, `treerpo_trl.x` of ours."""
    package = ["treerpo_trl", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
    return {".".join(name.split(".")[: 2 if name.startswith("treerpo_trl.") else 1]) for name in found}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_only_go_up(path):
    layer = layer_of(path)
    assert layer in ALLOWED, (
        f"{path.name} has no place in the layout; give it one in this table and in docs/developing.md"
    )
    own = f"treerpo_trl.{layer}"
    allowed = ALLOWED[layer] | STANDARD | {own}
    extra = {
        name
        for name in imports_of(path)
        if name not in allowed and not (layer == "__init__" and name.startswith("treerpo_trl"))
    }
    assert not extra, f"{path.name} may not import {sorted(extra)}"


def test_the_list_has_no_cycles():
    order = list(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        above = {f"treerpo_trl.{other}" for other in order[: order.index(name)]}
        assert {module for module in allowed if module.startswith("treerpo_trl")} <= above


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_every_file_says_what_it_is_for_and_keeps_to_one_purpose(path):
    source = path.read_text()
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring and docstring.splitlines()[0].strip()
    limit = 400 if path.name == "treerpo_trainer.py" else 300
    assert len(source.splitlines()) <= limit


def test_what_was_in_a_module_is_in_its_package():
    """Code that imports from `treerpo_trl.credit` goes on working."""
    from treerpo_trl import credit

    names = (
        "ESTIMATORS ROUNDING UNIT_INTERVAL_ESTIMATORS VALUE_ROUNDING ScoredTree assign back_up bernoulli_std centered"
    )
    names += " check_reward find_reward_fault group_std is_kept treerpo"
    assert set(names.split()) <= set(credit.__all__) and all(hasattr(credit, name) for name in credit.__all__)


@pytest.mark.parametrize("name", PUBLIC_PLACES)
def test_a_public_place_holds_nothing_of_its_own(name):
    """It only names what users import from it, so that it stays where the documentation says."""
    body = ast.parse((PACKAGE / f"{name}.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr, ast.ImportFrom, ast.Assign]


def test_the_public_names():
    import treerpo_trl

    assert sorted(treerpo_trl.__all__) == ["Node", "Tree", "TreeRPOConfig", "TreeRPOTrainer"]
