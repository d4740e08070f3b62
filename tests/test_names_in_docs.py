"""Every test and file of tests that the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(CHECKOUT / "docs").glob("*.md"), CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md"])


@pytest.fixture(scope="module")
def defined() -> set[str]:
    """Names of all test functions."""
    sources = (path.read_text(encoding="utf-8") for path in (CHECKOUT / "tests").glob("test_*.py"))
    return {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path, defined: set[str]) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\b(test_\w+)\b(?!\.py)", text)) - defined == set()
    for name in re.findall(r"\b(?:tests/)?((?:\w+/)*test_\w+\.py)", text):
        assert (CHECKOUT / "tests" / name).exists(), name
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (CHECKOUT / name).exists(), name


def test_the_note_on_hostile_content_names_a_test_in_each_row() -> None:
    """But where it says that there is none."""
    text = (CHECKOUT / "docs/hostile-content.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| tried", "| ---"))]
    assert len(rows) > 50
    for row in rows:
        last = row.rstrip("| ").rpartition("|")[2].strip()
        assert "test_" in last or last in ("none", "the same"), row
