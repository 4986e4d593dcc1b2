"""The changes that the mutation check makes: small, different from each other, and still Python."""

import pytest
from mutate import EQUIVALENT, PACKAGE, TESTS, TESTS_OF, equivalents, mutants_of


CODE = '''
"""A docstring with 1."""

__all__ = ["halve"]


def halve(x: "1 + 1" = 2.0) -> "1 + 1":
    """Another with 0."""
    if x < 0 and not y:
        raise ValueError(f"{x + 1} is below 0")
    y[1:] = max(x, key=any)
    return -x
'''
MUTANTS = {
    "def halve(x: '1 + 1'=2.0) -> '1 + 1':": ["def halve(x: '1 + 1'=4.0) -> '1 + 1':"],
    "if x < 0 and (not y):": [
        "if not (x < 0 and (not y)):",
        "if x < 0 or not y:",
        "if x <= 0 and (not y):",
        "if x < 1 and (not y):",
        "if x < 0 and y:",
    ],
    "raise ValueError(f'{x + 1} is below 0')": ["pass"],
    "y[1:] = max(x, key=any)": [
        "pass",
        "y[:] = max(x, key=any)",
        "y[2:] = max(x, key=any)",
        "y[0:] = max(x, key=any)",
        "y[1:] = max(x)",
        "y[1:] = min(x, key=any)",
        "y[1:] = max(x, key=all)",
    ],
    "return -x": ["return None", "return x"],
}


def test_golden_mutants_leave_annotations_docstrings_and_messages_alone():
    expected = [f"halve: {before}  ->  {after}" for before, changes in MUTANTS.items() for after in changes]
    assert [mutant.change for mutant in mutants_of("credit.values", CODE)] == expected


@pytest.mark.parametrize("module", TESTS_OF)
def test_all_mutants_compile_and_differ(module):
    mutants = mutants_of(module)
    assert len({mutant.source for mutant in mutants}) == len(mutants) > 0
    for mutant in mutants:
        compile(mutant.source, module, "exec", dont_inherit=True)


@pytest.mark.parametrize("room", ["credit", "prefix_sharing"])
def test_every_module_of_a_room_has_its_tests(room):
    modules = {f"{room}.{path.stem}" for path in PACKAGE.glob(f"{room}/*.py")}
    assert modules - {f"{room}.__init__"} <= TESTS_OF.keys()
    assert all((TESTS / name).exists() for names in TESTS_OF.values() for name in names)


def test_equivalent_mutants_are_still_mutants():
    for module in EQUIVALENT:
        changes = [mutant.change for mutant in mutants_of(module)]
        assert {change: changes.count(change) for change in equivalents(module)} == dict.fromkeys(
            equivalents(module), 1
        )
