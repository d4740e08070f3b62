"""Outlives a run of the tests, and ends what a run that was killed could not: its processes, its folder.

Every process of a run inherits `RUN`, which names the run's folder. The guard is a process of its own (``python
guard.py FOLDER``), in a session of its own, so that what is sent to the run's group does not reach it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN = "ENVSHIP_TEST_RUN"
"""Variable that names the folder of the run."""
POLL_S = 0.05
ATTEMPTS = 60
QUIET_S = 0.5
"""For so long nobody must be seen: a process that is just being started shows no variables."""


def start_guard(folder: str) -> subprocess.Popen[bytes]:
    """A guard of *folder*, and of the processes that inherit its name from now on, until its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, folder], stdin=subprocess.PIPE, start_new_session=True
    )


def marked(mark: str) -> dict[int, str]:
    """Processes with *mark* (``NAME=value``) among their variables: their command lines. Empty without ``/proc``."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:  # empty: a zombie, whose parent is about to fetch it
                    found[int(folder.name)] = command
    return found


def _guard(folder: str) -> None:
    sys.stdin.buffer.read()
    last_seen = time.monotonic()
    while time.monotonic() < last_seen + QUIET_S:
        for pid in marked(f"{RUN}={folder}"):
            last_seen = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    for _ in range(ATTEMPTS):  # pip, for one, does not inherit the mark, and ends a moment after whoever asked for it
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(QUIET_S)
    sys.exit(f"the folder {folder} of a run of the tests cannot be removed")


if __name__ == "__main__":
    _guard(sys.argv[1])
