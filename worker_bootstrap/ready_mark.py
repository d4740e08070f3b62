"""The mark that says: this environment is built, and nothing of it is missing.

It is written last, and nothing is synced for it: gigabytes would have to wait for the disk, and ``syncfs`` waits for
what everybody else writes, too. Instead the mark names the boot that it was made in. As long as the machine runs, what
was written is what is read, whoever dies; after a crash of the machine the mark is not valid, and
`worker_bootstrap.materialise` looks at every file before it marks the environment again. A *durable* mark, for stores
that other machines use, is synced, and valid for ever.

It also names the prefix that the environment was built for. A store that was moved, copied or restored to another place
holds files that name the old one: there the mark is not valid either.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from pathlib import Path

from worker_bootstrap.durable import content_of, publish, sync_file_system, sync_folder
from worker_bootstrap.mounts import is_local

logger = logging.getLogger("envship.store")

SIZE_LIMIT_BYTES = 32 << 10
"""Room for the longest path, each character of it as ``\\uXXXX``."""
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


def is_valid(path: Path, prefix: Path, *, durable: bool = False) -> bool:
    """Whether the mark at *path* is there, whole, for *prefix*, and of this boot or durable.

    With *durable*, the latter only.
    """
    made_in, built_at = _read(path)
    is_of_now = made_in is None or (made_in == boot_id() and not durable)
    return built_at is not None and is_of_now and _is_same(built_at, prefix)


def is_of(path: Path, prefix: Path) -> bool:
    """Whether the mark at *path*, of whatever boot, says that its environment was built for *prefix*."""
    _, built_at = _read(path)
    return built_at is not None and _is_same(built_at, prefix)


def _read(path: Path) -> tuple[object, str | None]:
    """The boot in which an environment was marked, and the prefix that it was built for, None if nothing says."""
    try:
        mark = json.loads(content_of(path, SIZE_LIMIT_BYTES) or b"")
        built_at = mark["prefix"]
        return mark["boot_id"], built_at if isinstance(built_at, str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, None


def _is_same(built_at: str, prefix: Path) -> bool:
    """Whether what names *built_at* gets to *prefix*: under the same name, or by a link or a mount that leads there."""
    if built_at == str(prefix):
        return True
    try:
        if os.path.samefile(built_at, prefix):
            return True
    except (OSError, ValueError):
        pass
    logger.info("%s is not used as it is: it was built for %s", prefix, built_at)
    return False


def write(path: Path, prefix: Path, tmp: Path, *, durable: bool) -> None:
    """Mark an environment at *prefix*; *durable*: once everything on its file system is on disk.

    A machine that cannot name its boots, and a store that other machines may be using, get durable marks only.
    """
    made_in = None if durable or not is_local(tmp) else boot_id()
    if made_in is None:
        sync_file_system(tmp)
    mark = {"boot_id": made_in, "prefix": str(prefix)}
    publish(path, json.dumps(mark).encode(), tmp, sync=made_in is None)


def remove(path: Path) -> None:
    """Take a mark away, before anything of the environment is; after a crash of the machine it must not be back."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_folder(path.parent)
