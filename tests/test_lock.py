from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from worker_bootstrap import lock as lock_module
from worker_bootstrap.errors import StoreBusy, StoreError
from worker_bootstrap.lock import Lease, Lock, passed_on
from worker_bootstrap.store import Store

from .filesystems import needs_mount, remount, tmpfs

HOLD_LOCK = "import sys; from pathlib import Path; from worker_bootstrap.lock import Lock; "
HOLD_LOCK += "Lock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
HOLD_LEASE = "import sys, os; from pathlib import Path; from worker_bootstrap.lock import Lease; "
HOLD_LEASE += "Lease(Path(sys.argv[1])).hold(); "
NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as two users")
WAIT = "print('held', flush=True); sys.stdin.read()"


class Holder:
    """A process that runs *program*, once it has said so."""

    def __init__(self, program: str, *arguments: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"held\n"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that every user can get to, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="envship-lock-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_nobody(work: Callable[[], None]) -> None:
    """Do *work* in a fork of this process that is another user."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- locks


def test_another_process_is_kept_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "x.lock"
    with Holder(HOLD_LOCK, path) as holder, pytest.raises(StoreBusy) as caught:
        Lock(path, timeout_s=0.1).acquire()
    assert caught.value.holder == f"process {holder.process.pid}"


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with Holder(HOLD_LOCK, path) as holder:
        holder.kill()
        with Lock(path, timeout_s=0):
            pass


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most = 0

    def work() -> None:
        nonlocal most
        with Lock(tmp_path / "x.lock"):
            inside.append(1)
            time.sleep(0.002)  # room for a second one, were it let in
            most = max(most, len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_lock_can_be_taken_again_after_release(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "x.lock", timeout_s=0)
    for _ in range(2):
        with lock, pytest.raises(StoreBusy):
            Lock(tmp_path / "x.lock", timeout_s=0).acquire()
    lock.release()


def test_a_child_does_not_inherit_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with Lock(path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with Lock(path, timeout_s=0):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "x.lock").symlink_to(target)
    with pytest.raises(OSError):
        Lock(tmp_path / "x.lock").acquire()
    assert target.read_text() == "precious"


def test_a_failed_attempt_leaves_no_descriptor_open(tmp_path: Path) -> None:
    with Lock(tmp_path / "x.lock"):
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            with pytest.raises(StoreBusy):
                Lock(tmp_path / "x.lock", timeout_s=0).acquire()
        assert len(os.listdir("/dev/fd")) == before


@needs_mount
def test_where_nothing_can_be_written_a_lock_can_be_shared_and_not_be_ones_own(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mounted", "size=1m") as mounted:
        path = mounted / "locks/x.lock"
        with Lock(path):
            pass
        remount(mounted, "ro")
        for _ in range(2):
            with pytest.raises(StoreError, match=f"the store {mounted} cannot be written to .*Read-only"):
                Lock(path).acquire()
        with Lock(path, shared=True), Lock(path, shared=True):
            pass
        with pytest.raises(StoreError, match="ENVSHIP_STORE"):
            Lock(mounted / "locks/new.lock", shared=True).acquire()


def test_who_waits_for_long_says_once_what_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock_module, "SILENT_S", 0.0)
    path = tmp_path / "x.lock"
    with Holder(HOLD_LOCK, path) as holder, pytest.raises(StoreBusy):
        Lock(path, timeout_s=0.2).acquire()
    assert caplog.messages == [f"waiting for {path}, which process {holder.process.pid} has locked"]


@as_root
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nobody_else_can_hold_a_lock(everybodys: Path, umask: int) -> None:
    """Who may open a file for reading may lock it. Those that were made readable are no more, once they are used."""
    readable = everybodys / "store/locks/old.lock"
    before = os.umask(umask)
    try:
        store = Store(everybodys / "store")
        readable.touch()
        readable.chmod(0o644)
        with Lock(readable), store.adding():
            pass
    finally:
        os.umask(before)
    everybodys.joinpath("store").chmod(0o755)

    def try_it() -> None:
        assert len(list(store.layout.locks.iterdir())) == 4
        for path in store.layout.locks.iterdir():
            with pytest.raises(PermissionError):
                os.open(path, os.O_RDONLY)
            for shared in (True, False):
                with pytest.raises(StoreError, match="cannot be written to"):
                    Lock(path, timeout_s=0, shared=shared).acquire()
        assert Store(everybodys / "store").host_id == store.host_id, "it can still be read"

    as_nobody(try_it)


# -- leases


def test_several_hold_one_lease(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    assert Lease(path).is_free()
    with Holder(HOLD_LEASE + WAIT, path) as one:
        with Holder(HOLD_LEASE + WAIT, path):
            one.kill()
            assert not Lease(path).is_free()
        assert Lease(path).is_free()


@as_root
def test_a_lease_that_another_user_keeps_to_himself_is_done_without(
    everybodys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only in a store of somebody else: in one of ours it is being evicted."""
    monkeypatch.setattr(lock_module, "LEASE_TIMEOUT_S", 0.1)
    path = everybodys / "lease"
    assert Lease(path).is_free()

    def try_it() -> None:
        lease, handle = Lease(path), os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        lease.hold()
        assert caplog.messages and caplog.messages[0].startswith(f"no lease on {path}")
        os.close(handle)
        lease.hold()
        assert not Lease(path).is_free()

    as_nobody(try_it)
    with Lease(path).claimed(), pytest.raises(StoreBusy):
        Lease(path).hold()


PASS_ON = "from worker_bootstrap.lock import passed_on\nwith passed_on() as leases: "


def test_a_lease_ends_with_exec(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    program = HOLD_LEASE + "sys.stdout.flush(); os.execv('/bin/sh', ['sh', '-c', 'echo held; exec cat'])"
    with Holder(program, path):
        assert Lease(path).is_free()


def test_a_lease_that_is_passed_on_survives_exec(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    program = HOLD_LEASE + "sys.stdout.flush()\n" + PASS_ON + "os.execv('/bin/sh', ['sh', '-c', 'echo held; exec cat'])"
    with Holder(program, path):
        assert not Lease(path).is_free()
    assert Lease(path).is_free()


def test_a_lease_is_not_passed_on_after_an_exec_that_failed(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease")
    lease.hold()
    with passed_on() as leases:
        assert [os.get_inheritable(handle) for handle in leases] == [True]
    assert [os.get_inheritable(handle) for handle in leases] == [False]
    lease.release()
    with passed_on() as leases:
        assert leases == []


def test_a_process_may_hold_several_that_it_took_itself(tmp_path: Path) -> None:
    one, two = Lease(tmp_path / "one"), Lease(tmp_path / "two")
    one.hold()
    one.hold()
    two.hold()
    assert not one.is_free() and not two.is_free()
    one.release()
    assert one.is_free() and not two.is_free()
    two.release()
    two.release()
    assert two.is_free()


def test_an_ordinary_child_does_not_hold_the_lease(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease")
    lease.hold()
    child = subprocess.Popen(["sleep", "60"])
    try:
        lease.release()
        wait_until(lease.is_free)
    finally:
        child.kill()
        child.wait()
