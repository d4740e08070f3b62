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


def descriptors() -> dict[str, str]:
    """What every open descriptor of this process refers to. Empty where there is no ``/proc``."""
    found = {}
    try:
        numbers = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return found
    for number in numbers:
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the one that listed the others
            continue
    return found


def children() -> dict[int, str]:
    """Children of this process, those too that have ended and were not waited for."""
    return {child.pid: f"{child.status()} {child.name()}" for child in psutil.Process().children(recursive=True)}


def threads() -> dict[int, str]:
    return {thread.ident or 0: thread.name for thread in threading.enumerate()}


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails the test if it leaves a process (or a zombie), a descriptor or a thread behind."""
    looks = (children, descriptors, threads)
    before = [set(look()) for look in looks]
    yield
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        gc.collect()
        left = [{k: v for k, v in look().items() if k not in old} for look, old in zip(looks, before, strict=True)]
        if not any(left):
            return
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(POLL_S)
