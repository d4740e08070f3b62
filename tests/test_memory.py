"""How full the memory is, of the machine and of its control group."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from worker_bootstrap import memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the kernel's, still empty."""
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


def test_without_a_control_group_it_is_the_machines(groups: Path) -> None:
    assert memory.used_percent() == pytest.approx(psutil.virtual_memory().percent, abs=10)


def test_a_group_without_a_limit_does_not_count(groups: Path) -> None:
    write(groups, max="max\n", current="1000000\n", stat="anon 1000000\ninactive_file 0\n")
    assert memory.used_percent() == pytest.approx(psutil.virtual_memory().percent, abs=10)


def test_a_group_that_is_nearly_full(groups: Path) -> None:
    write(groups, max="1000000\n", current="995000\n", stat="anon 990000\ninactive_file 5000\n")
    assert memory.used_percent() == 99.0


def test_files_that_the_kernel_keeps_for_later_do_not_count(groups: Path) -> None:
    write(groups, max="1000000\n", current="999000\n", stat="anon 10\ninactive_file 998000\n")
    assert memory.used_percent() == pytest.approx(psutil.virtual_memory().percent, abs=10)


def test_the_first_version_of_control_groups(groups: Path) -> None:
    write(groups / "memory", limit_in_bytes="1000\n", usage_in_bytes="980\n", stat="cache 20\ntotal_inactive_file 0\n")
    assert memory.used_percent() == 98.0


@pytest.mark.parametrize("damage", ["", "many\n", "-\n"])
def test_what_cannot_be_read_is_passed_over(groups: Path, damage: str) -> None:
    write(groups, max=damage, current="1\n", stat="")
    assert memory.used_percent() == pytest.approx(psutil.virtual_memory().percent, abs=10)
