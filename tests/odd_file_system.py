"""A file system of its own, with oddities: a folder, seen through FUSE by this program.

``python -m tests.odd_file_system FOLDER POINT KIND ODDITY…`` serves FOLDER at POINT until that is unmounted. In the
kernel's table of mounts it is a ``fuse.KIND``. Its oddities, any number of them:

- ``ignores-case``: one place for all names that differ in case only, as on a Mac or on Windows;
- ``locks=WORD``: ``real`` ones, which whoever sees FOLDER by another mount sees as well; or an error such as ``ENOLCK``
  in the place of each. Without it, the kernel keeps locks to itself: no other mount sees them;
- ``fails=OPERATION:ERROR:PATTERN``: as long as there is a file FOLDER.ailing, each ``read``, ``write``, ``fsync`` or
  ``fsyncdir`` (what OPERATION says) of a file with a path in which the pattern is found ends with that error. Files
  that are newer than FOLDER.ailing can be read: they lie elsewhere on the disk;
- ``read-only``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mfusepy


class OddFileSystem(mfusepy.Operations):  # type: ignore[misc]
    """Passes everything on to *folder*, but for its oddities."""

    use_ns = True

    def __init__(self, folder: str, oddities: list[str]) -> None:
        self._folder = folder
        self._ignores_case = "ignores-case" in oddities
        given = dict(oddity.split("=", 1) for oddity in oddities if "=" in oddity)
        self._failing: tuple[str, int, str] | None = None
        if "fails" in given:
            operation, name, pattern = given["fails"].split(":", 2)
            self._failing = operation, getattr(errno, name), pattern
        if "locks" in given:
            self.flock = (
                self._real_flock if given["locks"] == "real" else _failing_flock(getattr(errno, given["locks"]))
            )

    def _at(self, path: str) -> str:
        """Where *path* lies in the folder."""
        here = self._folder
        for part in path.strip("/").split("/") if path != "/" else ():
            here = os.path.join(here, self._name_in(here, part))
        return here

    def _fail_if_ailing(self, operation: str, path: str, fh: int) -> None:
        if self._failing is None or operation != self._failing[0] or not re.search(self._failing[2], path):
            return
        with contextlib.suppress(FileNotFoundError):
            since_ns = os.stat(f"{self._folder}.ailing").st_mtime_ns
            if operation != "read" or os.fstat(fh).st_ctime_ns < since_ns:
                raise OSError(self._failing[1], os.strerror(self._failing[1]))

    def _name_in(self, folder: str, name: str) -> str:
        if self._ignores_case and not os.path.lexists(os.path.join(folder, name)):
            try:
                return next((other for other in os.listdir(folder) if other.casefold() == name.casefold()), name)
            except OSError:
                return name
        return name

    # -- what there is

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._at(path))
        times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
        names = ("mode", "nlink", "uid", "gid", "size", "blocks", "ino")
        return {**times, **{f"st_{name}": getattr(found, f"st_{name}") for name in names}}

    def readdir(self, path: str, fh: int) -> Iterator[tuple[str, dict[str, int], int]]:
        for name in (".", "..", *os.listdir(self._at(path))):
            found = os.lstat(os.path.join(self._at(path), name))
            yield name, {"st_ino": found.st_ino, "st_mode": found.st_mode}, 0

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._folder)
        names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax")
        return {f"f_{name}": getattr(found, f"f_{name}") for name in names}

    # -- changing it

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def symlink(self, target: str, source: str) -> None:
        os.symlink(source, self._at(target))

    def link(self, target: str, source: str) -> None:
        os.link(self._at(source), self._at(target), follow_symlinks=False)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._at(old), self._at(new))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._at(path), uid, gid, follow_symlinks=False)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._at(path), ns=times, follow_symlinks=False)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._at(path) if fh is None else fh, length)

    # -- files that are open

    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags & ~(os.O_APPEND | os.O_EXCL))

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._fail_if_ailing("read", path, fh)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._fail_if_ailing("write", path, fh)
        return os.pwrite(fh, data, offset)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        self._fail_if_ailing("fsync", path, fh)
        os.fsync(fh)

    def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
        self._fail_if_ailing("fsyncdir", path, fh)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def _real_flock(self, path: str, fh: int, operation: int) -> int:
        try:
            fcntl.flock(fh, operation)
        except BlockingIOError:
            return -errno.EWOULDBLOCK
        return 0


def _failing_flock(code: int) -> Callable[[str, int, int], int]:
    return lambda path, fh, operation: -code


def main() -> None:
    folder, point, kind, *oddities = sys.argv[1:]
    options: dict[str, Any] = {"foreground": True, "fsname": folder, "subtype": kind, "ro": "read-only" in oddities}
    # One thread: nothing here waits, and whoever asks for a lock in vain asks again.
    options |= {"nothreads": True, "allow_other": True, "default_permissions": True, "errors": "surrogateescape"}
    # Nothing is remembered of what another mount may change, and two names of a file are one file.
    options |= {"use_ino": True, "attr_timeout": 0, "entry_timeout": 0, "hard_remove": True}
    mfusepy.FUSE(OddFileSystem(folder, oddities), point, **options)


if __name__ == "__main__":
    main()
