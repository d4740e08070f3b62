"""What a run of the tests leaves that was killed: the guard ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .cluster import eventually
from .guard import RUN, marked, start_guard

RUN_OF_TESTS = """
import subprocess, sys, time
from tests.guard import RUN, start_guard

start_guard(sys.argv[1])
survivor = subprocess.Popen(["sleep", "600"], env={RUN: sys.argv[1]}, stdout=subprocess.DEVNULL, start_new_session=True)
print(survivor.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_what_inherited_the_folders_name_and_removes_the_folder(tmp_path: Path) -> None:
    """And nothing else: not what belongs to another run."""
    folder, other = tmp_path / "run", tmp_path / "other"
    (folder / "lab").mkdir(parents=True)
    other.mkdir()
    guard = start_guard(str(folder))
    processes = [subprocess.Popen(["sleep", "600"], env={RUN: str(run)}) for run in (folder, other)]
    try:
        time.sleep(0.2)  # what the guard would do before the run has ended
        assert folder.exists()
        guard.communicate()
        assert processes[0].wait(10) == -signal.SIGKILL
        assert guard.returncode == 0
        assert not folder.exists()
        assert processes[1].poll() is None
        assert other.exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_run_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", RUN_OF_TESTS, folder],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        survivor = int(run.stdout.readline())
        os.kill(run.pid, signal.SIGKILL)
    eventually(lambda: not folder.exists(), "the folder is removed")
    assert survivor not in marked(f"{RUN}={folder}")
