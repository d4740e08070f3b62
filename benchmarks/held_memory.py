"""Memory that stays with a virtual machine: some give free pages back to their host, and pay when they are used again.

What writes many files then takes as long as it takes the host to find memory for them (seconds for each GiB), whoever
writes them, and the next one takes less: whatever was measured first looks slow. Only free blocks of 2 MiB are given
back, so a lattice of pages that are in use, one in each such block, keeps all that lies between.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import psutil

FEATURES = "/sys/bus/virtio/drivers/virtio_balloon"
REPORTING_BIT = 5
"""VIRTIO_BALLOON_F_REPORTING (linux/virtio_balloon.h)."""
STEP_BYTES = 512 << 10
"""One page in use for so many bytes: several for each block, as pages do not always come in order."""
SHARE = 0.7
"""Of the memory that is available."""


def gives_back(folder: Path = Path(FEATURES)) -> bool:
    """Whether this machine tells its host of free pages."""
    for features in folder.glob("virtio*/features"):
        if features.read_text()[REPORTING_BIT : REPORTING_BIT + 1] == "1":
            return True
    return False


@contextlib.contextmanager
def held(size_bytes: int | None = None) -> Iterator[int]:
    """For the block, keep *size_bytes* of free memory here; gives what is kept. By default, most of what is available.

    Nothing happens where memory is not given back. Takes as long as it takes the host to provide it.
    """
    if size_bytes is None:
        size_bytes = int(SHARE * psutil.virtual_memory().available) if gives_back() else 0
    size_bytes -= size_bytes % STEP_BYTES
    if not size_bytes:
        yield 0
        return
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as lattice:
        lattice.madvise(mmap.MADV_NOHUGEPAGE)
        some = b"\1" * STEP_BYTES
        for start in range(0, size_bytes, STEP_BYTES):
            lattice[start : start + STEP_BYTES] = some
        for start in range(0, size_bytes, STEP_BYTES):
            lattice.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, STEP_BYTES - mmap.PAGESIZE)
        yield size_bytes
