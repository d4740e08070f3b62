"""Many processes, one store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from worker_bootstrap import lock, mounts
from worker_bootstrap import materialise as module
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import StoreError
from worker_bootstrap.location import open_store
from worker_bootstrap.lock import Lease, Lock, holders
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files
from worker_bootstrap.writer import ALONE_FILES

from .environments import tiny_environment

CODE = str(Path(module.__file__).parents[1])
BUILD_AND_RUN = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from worker_bootstrap.lock import Lease
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store
store, name = Store(Path(sys.argv[2])), sys.argv[3]
def report(done, total):
    if done == total:
        os.write(int(sys.argv[4]), b"b")
prefix = materialise(store, name, report=report)
Lease(store.lease(name)).hold()
assert store.built(name)
print(subprocess.run([prefix / "bin/tool"], capture_output=True, check=True).stdout.decode(), end="")
"""


def test_fifty_processes_build_one_environment_once_and_all_run_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    files = {f"lib/{i:04}": b"%d" % i * 50 for i in range(300)}
    environment_id = tiny_environment(store, {**files, "bin/tool*": b"#!/bin/sh\necho it runs\n"}, 1000)
    reading, writing = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD_AND_RUN, CODE, store.layout.root, environment_id, str(writing)],
            stdout=subprocess.PIPE,
            pass_fds=[writing],
        )
        for _ in range(50)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    os.close(writing)
    with os.fdopen(reading, "rb") as built:
        assert built.read() == b"b"
    assert outputs == [b"it runs\n"] * 50
    assert list(damaged_files(store, environment_id)) == []
    assert list(store.layout.tmp.iterdir()) == []


BUILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from worker_bootstrap.materialise import main; main()"
HOLD = "import sys; from pathlib import Path; from worker_bootstrap.lock import Lock; "
HOLD += "Lock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"


def test_who_waits_goes_on_when_the_builder_is_killed(tmp_path: Path) -> None:
    """Nobody has to find the lock stale, remove it, or wait for a timeout."""
    store = Store(tmp_path / "store")
    environment_id = tiny_environment(store)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.layout.lock(environment_id)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert holders(store.layout.lock(environment_id)) == [holder.pid]
    waiting = _waiting(store, environment_id)
    holder.kill()
    holder.communicate()
    answer = json.loads(waiting.communicate(timeout=60)[0].splitlines()[-1])
    assert answer == {"prefix": str(store.layout.prefix(environment_id))}


BUILD_WITHOUT_END = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store
from worker_bootstrap.writer import Writer
write_run = Writer._write_run
def write_and_stay(self, run):
    write_run(self, run)
    os.write(1, b"%d\\n" % os.getpid())  # in one piece: two share the pipe
    time.sleep(300)
Writer._write_run = write_and_stay
materialise(Store(Path(sys.argv[2])), sys.argv[3], processes=2)
"""


def test_who_waits_goes_on_when_a_builder_with_helpers_is_killed(tmp_path: Path) -> None:
    """They have inherited its lock, and end with it, in the middle of their work."""
    store = Store(tmp_path / "store")
    files = {f"lib/{i:04}": b"%d" % i * 50 for i in range(ALONE_FILES * 4)}
    environment_id = tiny_environment(store, files, 1000)
    path = store.layout.lock(environment_id)
    arguments = CODE, store.layout.root, environment_id
    builder = subprocess.Popen([sys.executable, "-c", BUILD_WITHOUT_END, *arguments], stdout=subprocess.PIPE)
    assert builder.stdout is not None
    helpers = [int(builder.stdout.readline()) for _ in range(2)]
    assert len({builder.pid, *helpers}) == 3
    assert all(_opened(pid, path) for pid in helpers)
    waiting = _waiting(store, environment_id)
    builder.kill()
    builder.communicate()
    answer = json.loads(waiting.communicate(timeout=60)[0].splitlines()[-1])
    assert answer == {"prefix": str(store.layout.prefix(environment_id))}
    assert not any(_opened(pid, path) for pid in helpers)
    assert list(damaged_files(store, environment_id)) == []
    assert list(store.layout.tmp.iterdir()) == []


def _waiting(store: Store, environment_id: EnvironmentId) -> subprocess.Popen[bytes]:
    """A build in another process that has come to wait for the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, CODE, store.layout.root, environment_id],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while not _opened(process.pid, store.layout.lock(environment_id)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    assert process.poll() is None
    return process


def _opened(pid: int, path: Path) -> bool:
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{name}") == str(path) for name in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


# -- file systems whose locks do not work

OPEN = "import sys; sys.path.insert(0, sys.argv[1]); from worker_bootstrap.location import open_store; "
OPEN += "from worker_bootstrap.errors import StoreError\n"
OPEN += "try:\n    open_store(sys.argv[2], read_only=[]); print('opened')\n"
OPEN += "except StoreError as error:\n    print(error)\n"

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-qq", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs strace, and to be allowed to trace",
)


@needs_strace
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("error=ENOLCK", "without locks (No locks available)"),
        ("error=ENOSYS", "without locks (Function not implemented)"),
        ("error=EOPNOTSUPP", "without locks (Operation not supported)"),
        ("retval=0", "grants one lock to two at once"),  # as a mount that has locks in name only
    ],
)
def test_a_file_system_whose_locks_do_not_work_is_refused(tmp_path: Path, fault: str, said: str) -> None:
    """The kernel's answers are replaced: nothing in this process knows of it."""
    trace = ["strace", "-f", "-qq", "-o", tmp_path / "trace", "-e", "trace=flock", "-e", f"inject=flock:{fault}"]
    program = [sys.executable, "-c", OPEN, CODE, tmp_path / "store"]
    told = subprocess.run([*trace, *program], capture_output=True, text=True, check=True).stdout
    assert said in told
    assert "ENVSHIP_STORE" in told
    told = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert told == "opened\n"


@pytest.mark.parametrize(
    ("options", "local"),
    [
        ("nfs4 srv:/home rw,vers=4.2,local_lock=none", False),
        ("nfs srv:/home rw,vers=3,nolock,addr=10.0.0.1", True),
        ("nfs srv:/home rw,vers=3,local_lock=all", True),
        ("nfs srv:/home rw,vers=3,local_lock=flock", True),
        ("nfs srv:/home rw,vers=3,local_lock=posix", False),
        ("lustre mgs:/fs rw,localflock", True),
        ("lustre mgs:/fs rw,flock", False),
        ("cifs //server/home rw,nobrl", True),
        ("cifs //server/home rw", False),
        ("gfs2 /dev/vdb rw,localflocks", True),
        ("gpfs home rw", True),
        ("fuse.sshfs server:/home rw", True),
        ("fuse.juicefs JuiceFS:home rw", False),
        ("ext4 /dev/vda rw", False),
    ],
)
def test_mounts_whose_locks_no_other_machine_sees_are_known(options: str, local: bool) -> None:
    kind, source, flags = options.split()
    table = f"22 1 254:0 / / rw - ext4 /dev/vda rw\n30 22 0:30 / /home rw,relatime - {kind} {source} {flags}\n"
    assert mounts.locks_are_local(Path("/home/me/store"), table) is local


def test_a_store_on_such_a_mount_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "locks_are_local", lambda path: True)
    with pytest.raises(StoreError, match="no other machine sees"):
        open_store(tmp_path / "store", read_only=[])


def test_trying_the_locks_disturbs_nobody(tmp_path: Path) -> None:
    """Also when many try at once: a lock that somebody else tries must not look like one that is broken."""
    program = "import sys; from pathlib import Path; from worker_bootstrap.lock import check_locks\n"
    program += "for _ in range(200): check_locks(Path(sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {CODE!r})\n" + program, tmp_path]
        )
        for _ in range(6)
    ]
    assert [process.wait(60) for process in processes] == [0] * 6


# -- shared locks


def test_shared_locks_keep_out_only_exclusive_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with Lock(path, 0, shared=True), Lock(path, 0, shared=True), Lease(path).claimed() as free:
        assert not free
    with Lease(path).claimed() as free:
        assert free
