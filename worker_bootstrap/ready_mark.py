"""The mark that says: this environment is built, and nothing of it is missing.

It is written last, and nothing is synced for it: gigabytes would have to wait for the disk, and ``syncfs`` waits for
what everybody else writes, too. Instead the mark names the boot that it was made in. As long as the machine runs, what
was written is what is read, whoever dies; after a crash of the machine the mark is not valid, and
`worker_bootstrap.materialise` looks at every file before it marks the environment again. A *durable* mark, for stores
that other machines use, is synced, and valid for ever.
"""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path

from worker_bootstrap.durable import content_of, publish, sync_file_system, sync_folder
from worker_bootstrap.mounts import is_local

SIZE_LIMIT_BYTES = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def boot_id() -> str | None:
    """A name for the time since the machine started; None where the system has none."""
    raw = content_of(_BOOT_ID, 100)
    return raw.decode("ascii", "replace").strip() or None if raw else None


@functools.cache
def booted_at() -> float:
    """When the machine started, in seconds since the epoch by its clock of now; infinity where that is not known."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return math.inf
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def is_valid(path: Path, *, durable: bool = False) -> bool:
    """Whether the mark at *path* is there, whole, and of this boot or durable (with *durable*, the latter only)."""
    raw = content_of(path, SIZE_LIMIT_BYTES)
    if not raw:
        return False
    try:
        made_in = json.loads(raw)["boot_id"]
    except (ValueError, KeyError, TypeError):
        return False
    return made_in is None or (made_in == boot_id() and not durable)


def write(path: Path, tmp: Path, *, durable: bool) -> None:
    """Mark an environment; *durable*: once everything on its file system is on disk.

    A machine that cannot name its boots, and a store that other machines may be using, get durable marks only.
    """
    made_in = None if durable or not is_local(tmp) else boot_id()
    if made_in is None:
        sync_file_system(tmp)
    publish(path, json.dumps({"boot_id": made_in}).encode(), tmp, sync=made_in is None)


def remove(path: Path) -> None:
    """Take a mark away, before anything of the environment is; after a crash of the machine it must not be back."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_folder(path.parent)
