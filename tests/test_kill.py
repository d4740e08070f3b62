"""Kill -9 at random points of everything that writes: what is left is the old or the new, and can be gone on from.

Each of the (seeded) runs is followed by a look at every chunk and every file, and by the same work once more, to its
end. `tests.killing` and `tests.killing_packs` are the programs that do it; 249 runs in ``make test``, ten times as many
in ``make test-all``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .filesystems import in_memory

WORKS = {"load": 30, "save": 30, "fetch": 40, "build": 40, "mend": 30, "stage": 40, "evict": 30}
"""How often each is killed: at each kind of step that it has, and then as often at what decides as anywhere."""
PACK_RUNS = 9


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Who is killed does not need a disk for it."""
    with in_memory(tmp_path) as found:
        yield found


def tried(program: str, *arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{program}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def assert_old_or_new(outcome: dict[str, Any], runs: int) -> None:
    """Nothing was left by halves, and it was killed at each kind of step that the work has."""
    assert outcome["problems"] == []
    assert len(outcome["killed_at"]) > runs * 0.8, outcome
    assert set(outcome["kinds"]) <= set(outcome["killed_at"]), outcome


@pytest.mark.parametrize(("work", "runs"), WORKS.items())
def test_killed_anywhere_it_leaves_the_old_or_the_new(work: str, runs: int, folder: Path) -> None:
    outcome = tried("killing", folder, work, 1, runs)
    assert_old_or_new(outcome, runs)
    assert any("by a helper" in kind for kind in outcome["kinds"]) == (work in ("fetch", "build", "stage"))


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("work", "runs"), WORKS.items())
def test_killed_anywhere_many_times(work: str, runs: int, folder: Path) -> None:
    assert_old_or_new(tried("killing", folder, work, 2, runs * 10), runs * 10)


@pytest.mark.heavy
@pytest.mark.parametrize("runs", [PACK_RUNS, pytest.param(90, marks=pytest.mark.timeout(1800))])
def test_a_pack_that_is_killed_leaves_no_half_environment(venv: Path, folder: Path, runs: int) -> None:
    assert_old_or_new(tried("killing_packs", folder, venv, 3, runs), runs)


@pytest.mark.parametrize(
    ("work", "wrong_way"),
    [
        pytest.param("build", "mark before building", marks=pytest.mark.heavy),
        pytest.param("evict", "remove before unmarking", marks=pytest.mark.heavy),
        ("load", "publish in place"),
        pytest.param("save", "overwrite the bundle", marks=pytest.mark.heavy),
        pytest.param("mend", "mend in place", marks=pytest.mark.heavy),
    ],
)
def test_wrong_ways_are_found_out(work: str, wrong_way: str, folder: Path) -> None:
    """Each of the runs looks before it is done again, so that what the next one heals does not pass for whole."""
    outcome = tried("killing", folder, work, 1, 30, "--wrong-way", wrong_way)
    assert [problem for problem in outcome["problems"] if "done again" not in problem] != []


@pytest.mark.heavy
def test_a_wrong_way_to_pack_is_found_out(venv: Path, folder: Path) -> None:
    outcome = tried("killing_packs", folder, venv, 3, 6, "--wrong-way", "write the manifest before the chunks")
    assert [problem for problem in outcome["problems"] if "done again" not in problem] != []
