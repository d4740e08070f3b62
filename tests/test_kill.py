"""Kill -9 at random points of everything that writes: what is left is the old or the new, and can be gone on from.

Each of the (seeded) runs is followed by a look at every chunk and every file, and by the same work once more, to its
end. `tests.killing` is the program that does it; 76 runs in ``make test``, ten times as many in ``make test-all``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKS = ("load", "save", "build", "mend", "stage", "evict")
RUNS = 12


def tried(folder: Path, work: str, seed: int, runs: int, *more: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.killing", folder, work, str(seed), str(runs), *more],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.mark.parametrize("work", WORKS)
def test_killed_anywhere_it_leaves_the_old_or_the_new(work: str, tmp_path: Path) -> None:
    outcome = tried(tmp_path, work, 1, RUNS)
    assert outcome["problems"] == []
    assert outcome["kills"] > RUNS * 0.8, outcome


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("work", WORKS)
def test_killed_anywhere_many_times(work: str, tmp_path: Path) -> None:
    outcome = tried(tmp_path, work, 2, RUNS * 10)
    assert outcome["problems"] == []
    assert outcome["kills"] > RUNS * 8, outcome


@pytest.mark.parametrize("runs", [4, pytest.param(40, marks=[pytest.mark.heavy, pytest.mark.timeout(1800)])])
def test_a_pack_that_is_killed_leaves_no_half_environment(venv: Path, tmp_path: Path, runs: int) -> None:
    outcome = tried(tmp_path, "pack", 3, runs, venv)
    assert outcome["problems"] == []
    assert outcome["kills"] > 0, outcome
