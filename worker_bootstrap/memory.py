"""How full the memory is that this process may use: the machine's, or that of its control group, as in a container."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

GROUPS = Path("/sys/fs/cgroup")


class _Version(NamedTuple):
    """Where one version of control groups tells of memory, below `GROUPS`. Source: the kernel's admin guide."""

    folder: str
    limit: str
    usage: str
    reclaimable: str


_VERSIONS = (
    _Version(".", "memory.max", "memory.current", "inactive_file"),
    _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def used_percent() -> float:
    """Percent of the memory in use, of the machine or of the control group, whichever is fuller."""
    groups = [_of_group(version) for version in _VERSIONS]
    return max([float(psutil.virtual_memory().percent), *(percent for percent in groups if percent is not None)])


def _of_group(version: _Version) -> float | None:
    """None without a limit; cached files that the kernel gives up first do not count."""
    folder = GROUPS / version.folder
    try:
        limit = int((folder / version.limit).read_text())
        usage = int((folder / version.usage).read_text())
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = int(rows.get(version.reclaimable, 0))
    except (OSError, ValueError):  # "max" is no number
        return None
    return 100.0 * max(0, usage - reclaimable) / limit if limit else None
