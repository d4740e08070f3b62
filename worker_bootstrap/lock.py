"""Locks that the kernel drops when their holder dies: one builder per environment, and leases of those who run from it.

Plain ``flock`` and nothing else. ``filelock`` was considered: it has no shared lock that outlives an ``exec``, which
a lease is, and exclusive locks alone do not pay for a dependency on machines that may lack it. Lock files are never
removed: removing one while somebody waits for it makes two holders.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from worker_bootstrap.errors import StoreBusy, StoreError

POLL_INTERVAL_S = 0.05
"""``flock`` cannot wait with a limit, so waiting is asking again; 50 waiters at this pace cost nothing."""
LEASE_TIMEOUT_S = 10.0
"""Only eviction holds a lease file exclusively, and only while it looks whether it may."""


class Lock:
    """An exclusive lock on *path*, held by this object until released or until the process dies.

    Parameters
    ----------
    path
        The lock file; made if it is not there, with its folder.
    timeout_s
        How long to wait for another holder; None waits for ever.

    Notes
    -----
    Excludes other objects in the same process as well, in any thread. Not reentrant. Children started by `subprocess`
    do not inherit it; children made by a bare ``fork`` do, and keep it until they end.
    """

    def __init__(self, path: Path, timeout_s: float | None = None) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        StoreBusy
            If somebody else held it for all of ``timeout_s``.
        StoreError
            If the file system has no locks.
        """
        assert self._handle is None, "not reentrant"
        handle = _open(self.path)
        try:
            if not _lock(handle, fcntl.LOCK_EX, self.timeout_s, self.path):
                raise StoreBusy(str(self.path), self.timeout_s, _holder(handle))
            # Only for the message of those who wait in vain: the lock itself is the kernel's.
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def release(self) -> None:
        """Give the lock up; does nothing if it is not held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Lease:
    """A shared lock on *path* that says: somebody runs from this environment.

    It is held by the process itself and survives ``exec``, so there is no moment between an old interpreter and a new
    one in which the environment looks unused. It ends with the process.

    Parameters
    ----------
    path
        ``layout.lease(environment_id)``; made if it is not there, with its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def hold(self) -> None:
        """Hold the lease from now on; leases inherited through ``exec`` from an earlier environment end.

        Raises
        ------
        StoreBusy
            If the environment is being evicted.

        Notes
        -----
        Idempotent. Whoever holds a lease has to look *afterwards* whether the environment is still built.
        """
        if self._handle is not None:
            return
        handle = _open(self.path)
        if not _lock(handle, fcntl.LOCK_SH, LEASE_TIMEOUT_S, self.path):
            os.close(handle)
            raise StoreBusy(str(self.path), LEASE_TIMEOUT_S, "an eviction")
        os.set_inheritable(handle, True)
        self._handle = handle
        _own_leases.add(handle)
        _end_inherited(self.path.parent)

    def release(self) -> None:
        """End the lease; does nothing if it is not held."""
        if self._handle is not None:
            os.close(self._handle)
            _own_leases.discard(self._handle)
            self._handle = None

    def is_free(self) -> bool:
        """Whether nobody held the lease a moment ago, this object included."""
        handle = _open(self.path)
        try:
            return _lock(handle, fcntl.LOCK_EX, 0, self.path)
        finally:
            os.close(handle)


_own_leases: set[int] = set()
"""File descriptors of the leases that this interpreter took itself, as opposed to inherited ones."""


def _end_inherited(folder: Path) -> None:
    """Close leases in *folder* that the interpreter before this one left open across ``exec``."""
    leases = set()
    with contextlib.suppress(OSError):
        leases = {(entry.stat().st_dev, entry.inode()) for entry in os.scandir(folder)}
    for name in os.listdir("/dev/fd"):
        handle = int(name)
        if handle in _own_leases:
            continue
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
            found = os.fstat(handle)
            if (found.st_dev, found.st_ino) in leases:
                os.close(handle)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)


def _lock(handle: int, kind: int, timeout_s: float | None, path: Path) -> bool:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if deadline is not None and time.monotonic() >= deadline:
                return False
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise StoreError(
                    f"{path} lies on a file system without locks ({error.strerror}). Put the store on a local disk "
                    "(ENVSHIP_STORE)."
                ) from error
            raise
        time.sleep(POLL_INTERVAL_S)


def _holder(handle: int) -> str:
    pid = os.pread(handle, 20, 0).decode("ascii", "replace")
    return f"process {pid}" if pid else "another process"
