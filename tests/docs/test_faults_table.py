"""The table of faults in CONTRIBUTING.md names tests that there are."""

import re

from places import ROOT


def test_every_row_has_a_test_that_exists():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Faults\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| **")][1:]
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    there_are = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, f"this row has no test: {row}"
        assert set(named) <= there_are, f"there is no {sorted(set(named) - there_are)}"
