"""Which file system a path lies on, and whether other machines may see it, and its locks, as well."""

from __future__ import annotations

import os
import re
from pathlib import Path

NETWORK_FILE_SYSTEMS = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "panfs", "pvfs2"),
        *("orangefs", "glusterfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.juicefs", "wekafs"),
        *("fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse"),
    )
)
"""Where locks are slow or missing, and many small files are a burden: no place for a store that nobody asked for."""

LOCAL_LOCKS = frozenset(("nolock", "local_lock=all", "local_lock=flock", "localflock", "localflocks", "nobrl"))
"""Options that leave ``flock`` to the one machine that it is called on: of NFS (nfs(5)), Lustre (mount.lustre(8)), GFS2
and OCFS2 (gfs2(5), ocfs2(7)), CIFS (mount.cifs(8))."""

LOCAL_LOCK_FILE_SYSTEMS = frozenset(("gpfs", "fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse"))
"""Where ``flock`` is so whatever the options: GPFS has only ``fcntl`` locks between machines, the others have none, and
Linux keeps locks that a FUSE program does not ask for to itself."""

LOCAL_FILE_SYSTEMS = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "tmpfs", "overlay")
)
"""What is mounted by one machine at a time. Anything else may be shared: new network file systems have new names."""


_ESCAPE = re.compile(r"\\([0-7]{3})")
"""How the table writes space, tab, newline, backslash and ``#`` (Linux, ``fs/proc_namespace.c``)."""


def file_system_of(path: Path, mount_table: str | None = None) -> str:
    """Type of the file system that *path* lies (or would lie) on, as Linux names it; empty where that is unknown.

    *mount_table* stands for ``/proc/self/mountinfo``.
    """
    return _mount_of(path, mount_table)[0]


def locks_are_local(path: Path, mount_table: str | None = None) -> bool:
    """Whether *path* lies on a file system that other machines may see, where none of them sees our locks."""
    kind, options = _mount_of(path, mount_table)
    if kind in LOCAL_LOCK_FILE_SYSTEMS:
        return True
    return kind not in LOCAL_FILE_SYSTEMS and not LOCAL_LOCKS.isdisjoint(options)


def _mount_of(path: Path, mount_table: str | None) -> tuple[str, list[str]]:
    """Type and options of the innermost mount."""
    if mount_table is None:
        try:
            mount_table = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
        except OSError:
            return "", []
    real = os.path.realpath(path) + "/"
    best, kind = "", ""
    options: list[str] = []
    for line in mount_table.split("\n"):
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        point = _ESCAPE.sub(lambda escape: chr(int(escape[1], 8)), fields[4]).rstrip("/") + "/"
        # A later mount on the same point hides the earlier one.
        if real.startswith(point) and len(point) >= len(best):
            best = point
            kind, *_, flags = right.split(" ")
            options = flags.split(",")
    return kind, options


def is_local(path: Path) -> bool:
    """Whether nothing but this machine can have *path* mounted now."""
    return file_system_of(path) in LOCAL_FILE_SYSTEMS
