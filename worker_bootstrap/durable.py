"""Files that appear whole or not at all, and what is needed to make them survive a power cut."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import tempfile
from pathlib import Path
from typing import Callable

from worker_bootstrap.errors import StoreError, StoreFull

logger = logging.getLogger("envship.store")

BROKEN = frozenset((errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO)))
"""Answers of a disk, or a file system, that has lost the bytes of a file."""


def publish(path: Path, data: bytes | memoryview, tmp: Path, *, sync: bool) -> None:
    """Write *data* to *path* so that readers see all of it or nothing; *tmp* is on the same file system.

    With *sync*, the file and its directory are on disk when this returns.
    """
    handle, name = tempfile.mkstemp(dir=tmp)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        make_folder(path.parent)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Make the folder *path*, if it is not there, with *mode*, and what is missing above it with 755.

    The umask has no say: what it takes away keeps other users from a store that is for them, and what it leaves would
    let them write to it. What is there already stays as it is.
    """
    try:
        os.mkdir(path, mode)
    except FileNotFoundError:
        if path.parent.is_dir():  # as an automounter, and /proc, answer to what they do not have
            raise
        make_folder(path.parent)
        make_folder(path, mode)
        return
    except OSError:  # also of a read-only mount, whether or not the folder is there
        if not path.is_dir():
            raise
        return
    os.chmod(path, mode)


def sync_folder(path: Path) -> None:
    """Make renames in the folder *path* survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def full_error(error: OSError, path: Path) -> StoreFull | None:
    """`StoreFull` if *error* says that there is no room (blocks, inodes or quota) in the store at *path*, else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    room = os.statvfs(path)
    # A quota or the inodes may be used up while blocks are free: then the number of free bytes would mislead.
    free_bytes = room.f_bavail * room.f_frsize
    return StoreFull(str(path), 0, free_bytes if error.errno == errno.ENOSPC and room.f_favail else None)


def unusable_error(error: OSError, root: Path) -> StoreError:
    """What to say where *error* came up in writing to the store at *root*."""
    with contextlib.suppress(OSError):  # it may not even be there
        if (full := full_error(error, root)) is not None:
            return full
    return StoreError(
        f"the store {root} cannot be written to ({error.filename or 'a file'}: {error.strerror or error}). Mend that, "
        "or name another folder (ENVSHIP_STORE)."
    )


def sync_file_system(path: Path) -> None:
    """Write everything on the file system of *path* to disk: one call where there are thousands of files.

    Takes as long as the disk, for what others have written as well.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "syncfs"):
            os.sync()
        elif libc.syncfs(handle) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(handle)


def _open_at_once(path: str, flags: int) -> int:
    """A pipe in the place of a file would otherwise be waited for until somebody writes to it: for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def content_of(path: Path, limit_bytes: int, broken: Callable[[Path], None] | None = None) -> bytes | None:
    """At most ``limit_bytes + 1`` bytes of a file; None if it is gone or cannot be read.

    *broken* is called with *path* if its bytes are lost: nobody will read them again.

    Raises
    ------
    OSError
        If this process may not open more files: that says nothing about this one.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            return file.read(min(size_bytes, limit_bytes) + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        logger.warning("%s cannot be read: %s", path, error)
        if error.errno in BROKEN and broken is not None:
            broken(path)
        return None
