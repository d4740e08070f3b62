"""Whether a test leaves something behind in its own process: a child, a file descriptor, a thread."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

SETTLE_TIMEOUT_S = 5.0
"""Threads and descriptors of an event loop that was closed go a moment later."""
POLL_S = 0.02
KEPT_THREADS = ("Dask-Offload", "Profile")
"""Dask starts them once for the life of the process."""


def descriptors() -> dict[int, str]:
    """What every open descriptor of this process refers to. Empty where there is no ``/proc``."""
    found: dict[int, str] = {}
    try:
        numbers = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return found
    for number in numbers:
        try:
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the one that listed the others
            continue
    return found


def children() -> dict[int, str]:
    """Children of this process, those too that have ended and were not waited for.

    Not theirs: where one is left, it is named itself, and a cluster that was there before starts processes as it likes.
    """
    return {child.pid: f"{child.status()} {child.name()}" for child in psutil.Process().children()}


def threads() -> dict[int, str]:
    """Threads of this process, without those that Dask keeps."""
    running = [thread for thread in threading.enumerate() if not thread.name.startswith(KEPT_THREADS)]
    return {thread.ident or 0: thread.name for thread in running}


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails the test if it leaves a process (or a zombie), a descriptor or a thread behind."""
    before = set(_all())
    yield
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        gc.collect()
        left = {what: detail for what, detail in _all().items() if what not in before}
        if not left:
            return
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(POLL_S)


def _all() -> dict[tuple[str, int], str]:
    looks = {"process": children, "descriptor": descriptors, "thread": threads}
    return {(kind, number): detail for kind, look in looks.items() for number, detail in look().items()}
