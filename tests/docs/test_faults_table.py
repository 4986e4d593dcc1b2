"""The tables of faults in the documentation name tests that there are."""

import re

from places import ROOT


def test_every_row_has_a_test_that_exists():
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| Fault |")]
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    there_are = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, f"this row has no test: {row}"
        assert set(named) <= there_are, f"there is no {sorted(set(named) - there_are)}"
