"""Locks that the kernel drops when their holder dies: one builder per environment, and leases of those who run from it.

Plain ``flock`` and nothing else. ``filelock`` was considered: it has no shared lock that outlives an ``exec``, which
a lease is, and exclusive locks alone do not pay for a dependency on machines that may lack it. Lock files are never
removed: removing one while somebody waits for it makes two holders. Whether the locks of a file system exclude anybody
is tried (`check_locks`), not believed.

Whoever may read a file may lock it. So files of locks are their owner's alone: nobody else has to wait for a build, and
could keep others waiting. Those of leases are for everybody who runs from the environment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from worker_bootstrap.durable import make_folder, unusable_error
from worker_bootstrap.errors import StoreBusy, StoreError
from worker_bootstrap.mounts import locks_are_local

logger = logging.getLogger("envship.store")

POLL_INTERVAL_S = 0.05
"""``flock`` cannot wait with a limit, so waiting is asking again; 50 waiters at this pace cost nothing."""
LEASE_TIMEOUT_S = 10.0
"""Only eviction holds a lease file exclusively, and only until the prefix has been renamed."""
TRY_TIMEOUT_S = 10.0
SILENT_S = 3.0
"""Whoever waits for longer says what for."""
LOCK_MODE = 0o600
LEASE_MODE = 0o644
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Answers for who may not write to a file, or not there; the second, for anybody where a file is immutable."""


class Lock:
    """A lock on *path*, held by this object until released or until the process dies.

    Parameters
    ----------
    path
        The lock file; made if it is not there, with its folder.
    timeout_s
        How long to wait for another holder; None waits for ever.
    shared
        Keep out only those who want it for themselves.

    Notes
    -----
    Excludes other objects in the same process as well, in any thread. Not reentrant. Children started by `subprocess`
    do not inherit it; children made by a bare ``fork`` do, and keep it until they end. Where the file can only be read,
    a lock can be shared, and not be one's own: its holder wants to write.
    """

    def __init__(self, path: Path, timeout_s: float | None = None, *, shared: bool = False) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.shared = shared
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        StoreBusy
            If somebody else held it for all of ``timeout_s``.
        StoreError
            If the file system has no locks, or the store cannot be written to.
        """
        assert self._handle is None, "not reentrant"
        try:
            handle = _open(self.path, LOCK_MODE, may_only_read=self.shared)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            raise unusable_error(error, self.path.parent.parent) from error
        try:
            kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
            if not _lock(handle, kind, self.timeout_s, self.path):
                raise StoreBusy(str(self.path), self.timeout_s, _holder(handle))
            # Only for the message of those who wait in vain: the lock itself is the kernel's. So a full disk may lack
            # the room for it, where somebody has come to make some.
            with contextlib.suppress(OSError):
                if _is_writable(handle):
                    os.ftruncate(handle, 0)
                if not self.shared:
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

    It ends with the process, or with the interpreter that an ``exec`` replaces, unless it is `passed_on`.

    Parameters
    ----------
    path
        ``store.lease(environment_id)``; made if it is not there, with its folder. In a store of somebody else it is
        opened for reading, which is enough for a shared lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def hold(self) -> None:
        """Hold the lease from now on, and note when.

        Raises
        ------
        StoreBusy
            If the environment is being evicted. In a store of somebody else, where any user may hold it like that for
            as long as he likes, there is no lease then, and a word in the log: whether to evict is the owner's
            decision, and he can see who runs.
        OSError
            If it lies in a store of somebody else who made no file for it.

        Notes
        -----
        Idempotent. Whoever holds a lease has to look *afterwards* whether the environment is still built.
        """
        if self._handle is not None:
            return
        handle = _open(self.path, LEASE_MODE)
        is_ours = _is_writable(handle)
        try:
            if not _lock(handle, fcntl.LOCK_SH, LEASE_TIMEOUT_S, self.path):
                raise StoreBusy(str(self.path), LEASE_TIMEOUT_S, "an eviction")
        except StoreError as error:
            os.close(handle)
            if is_ours:
                raise
            # On a read-only mount without locks, too: nobody evicts there.
            logger.log(
                logging.WARNING if isinstance(error, StoreBusy) else logging.INFO,
                "no lease on %s: %s",
                self.path,
                error,
            )
            return
        try:
            with contextlib.suppress(OSError):  # in a store of somebody else
                os.utime(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        _own_leases.add(handle)

    def release(self) -> None:
        """End the lease; does nothing if it is not held."""
        if self._handle is not None:
            os.close(self._handle)
            _own_leases.discard(self._handle)
            self._handle = None

    def is_free(self) -> bool:
        """Whether nobody held the lease a moment ago, this object included."""
        with self.claimed() as free:
            return free

    @contextlib.contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether nobody holds the lease; if so, nobody can for as long as the block lasts."""
        handle = _open(self.path, LEASE_MODE)
        try:
            yield _lock(handle, fcntl.LOCK_EX, 0, self.path)
        finally:
            os.close(handle)


def holders(path: Path) -> list[int]:
    """PIDs of the processes that took a lock on *path*, as far as the kernel tells. Only for messages."""
    try:
        found = os.stat(path)
        table = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    rows = [line.split() for line in table.splitlines() if " -> " not in line]
    return sorted({int(row[4]) for row in rows if len(row) > 5 and row[5] == inode and int(row[4]) > 0})


def check_locks(folder: Path) -> None:
    """Try whether locks in *folder* exclude anybody. In that of somebody else there are none to be had.

    Raises
    ------
    StoreError
        If the file system has no locks, grants one to two at once, or keeps them from other machines that see it.
    """
    if locks_are_local(folder):
        raise StoreError(
            f"{folder} is mounted so that no other machine sees its locks (its file system has none between machines, "
            "or an option says so: nolock, local_lock, localflock, nobrl), so a store on it cannot be shared. Put the "
            "store on a local disk (ENVSHIP_STORE), or mount it with locks."
        )
    path = folder / "try.lock"
    try:
        one, two = _open(path, LOCK_MODE), _open(path, LOCK_MODE)
    except PermissionError:
        if os.path.lexists(path):  # and its owner's
            return
        raise
    try:
        # Shared against exclusive: of two who try this at the same time, neither takes the other for a broken lock.
        if _lock(one, fcntl.LOCK_SH, TRY_TIMEOUT_S, path) and _lock(two, fcntl.LOCK_EX, 0, path):
            raise StoreError(
                f"the file system of {folder} grants one lock to two at once, so a store on it cannot be shared. Put "
                "the store on a local disk (ENVSHIP_STORE), or mount the file system with locks."
            )
    finally:
        os.close(one)
        os.close(two)


_own_leases: set[int] = set()
"""Descriptors of the leases that this process holds."""


@contextlib.contextmanager
def passed_on() -> Iterator[list[int]]:
    """In the block, an ``exec`` leaves the leases of this process open; gives their descriptors.

    So there is no moment between an old interpreter and a new one in which the environment of either looks unused.
    Whoever runs then closes them when it holds a lease of its own and does not want to go back.
    """
    leases = sorted(_own_leases)
    try:
        for lease in leases:
            os.set_inheritable(lease, True)
        yield leases
    finally:
        for lease in leases:
            os.set_inheritable(lease, False)


def _open(path: Path, mode: int, *, may_only_read: bool = True) -> int:
    """A descriptor of the lock file *path*, made if it is not there; for reading, if it cannot be written to.

    One of ours has *mode* afterwards, whatever the umask, and whoever made it.
    """
    handle = _open_any(path, mode, may_only_read)
    found = os.fstat(handle)
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != mode:
        with contextlib.suppress(OSError):  # on a read-only mount
            os.fchmod(handle, mode)
    return handle


def _open_any(path: Path, mode: int, may_only_read: bool) -> int:
    common = os.O_CLOEXEC | os.O_NOFOLLOW
    flags = common | os.O_RDWR | os.O_CREAT
    try:
        return os.open(path, flags, mode)
    except FileNotFoundError:
        make_folder(path.parent)
        return os.open(path, flags, mode)
    except OSError as error:
        if error.errno not in REFUSALS or not may_only_read:
            raise
        refused = error
    try:
        handle = os.open(path, common | os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise refused from None  # that it cannot be made is what there is to say
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StoreError(f"{path} is no file that could be locked")
    return handle


def _is_writable(handle: int) -> bool:
    return fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def _lock(handle: int, kind: int, timeout_s: float | None, path: Path) -> bool:
    began = time.monotonic()
    is_told = False
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            waited_s = time.monotonic() - began
            if timeout_s is not None and waited_s >= timeout_s:
                return False
            if waited_s >= SILENT_S and not is_told:
                is_told = True
                pids = ", ".join(map(str, holders(path)))
                logger.warning(
                    "waiting for %s, which %s has locked", path, f"process {pids}" if pids else "another one"
                )
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
