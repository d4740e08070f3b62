"""Which file system a path lies on, and whether other machines may see it as well."""

from __future__ import annotations

import os
from pathlib import Path

NETWORK_FILE_SYSTEMS = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "panfs", "pvfs2"),
        *("orangefs", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.ceph", "fuse.juicefs", "wekafs"),
    )
)
"""Where locks are slow or missing, and many small files are a burden: no place for a store that nobody asked for."""

LOCAL_FILE_SYSTEMS = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "tmpfs", "overlay")
)
"""What is mounted by one machine at a time. Anything else may be shared: new network file systems have new names."""


def file_system_of(path: Path, mount_table: str | None = None) -> str:
    """Type of the file system that *path* lies (or would lie) on, as Linux names it; empty where that is unknown.

    *mount_table* stands for ``/proc/self/mountinfo``.
    """
    if mount_table is None:
        try:
            mount_table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return ""
    real = os.path.realpath(path) + "/"
    best, kind = "", ""
    for line in mount_table.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        point = fields[4].replace("\\040", " ").rstrip("/") + "/"
        # A later mount on the same point hides the earlier one.
        if real.startswith(point) and len(point) >= len(best):
            best, kind = point, right.split(" ")[0]
    return kind


def is_local(path: Path) -> bool:
    """Whether nothing but this machine can have *path* mounted now."""
    return file_system_of(path) in LOCAL_FILE_SYSTEMS
