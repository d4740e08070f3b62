"""Scratch: what lies in a store's ``tmp`` while somebody makes it, and what those left there who died.

Whoever makes something there removes it, or moves it to its place. What is left of others is found by its age, or by a
name that says that nobody is at work on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path

from worker_bootstrap.layout import Layout

STALE_S = 24 * 3600
"""What nobody touched for that long belongs to processes that died."""
EVICTED = "evicted-"
"""Begins the names of what is on its way out: whoever comes across it may remove it."""


def abandoned(layout: Layout, *beginnings: str) -> list[os.DirEntry[str]]:
    """What is stale in ``tmp``, and what has a name with one of *beginnings*.

    By the time of the last change of the entry itself: what is finished has been given another time of modification.
    """
    before = time.time() - STALE_S
    found = []
    with os.scandir(layout.tmp) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.name.startswith(beginnings) or entry.stat(follow_symlinks=False).st_ctime < before:
                    found.append(entry)
    return found


def sweep(layout: Layout, *beginnings: str) -> None:
    """Remove what is `abandoned`, as far as that can be done."""
    for entry in abandoned(layout, *beginnings):
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def set_aside(prefix: Path, aside: Path) -> None:
    """Move *prefix* to *aside*, in ``tmp``: half removed, it must not lie where a whole one is expected.

    The overlay of a container moves no folder that came with its image: such a one is removed where it lies, for which
    it has to have lost its ready mark before.
    """
    try:
        os.rename(prefix, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.rmtree(prefix)
