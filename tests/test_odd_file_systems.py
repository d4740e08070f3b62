"""Stores on file systems with oddities of their own: locks that fail, disks that go bad, a network in between.

Served by `tests.odd_file_system`, so that the kernel itself gives the answers: nothing in the processes that are tested
knows of it. Names that differ in case only are in `tests.test_hostile_content`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from envship.environment import Environment
from worker_bootstrap import ready_mark
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import ChunkMissing, EnvironmentMissing, MaterialiseError, StoreError
from worker_bootstrap.location import open_store
from worker_bootstrap.lock import Lease
from worker_bootstrap.materialise import materialise
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.stock import needed_elsewhere
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files

from .environments import EVERY_KIND, tiny_environment
from .filesystems import needs_mount, odd

pytestmark = needs_mount
TOOL = {"bin/tool*": b"#!/bin/sh\necho it runs\n", "lib/data": b"data" * 100}


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """The folder that is seen through an odd file system: the disk, or the server."""
    folder = tmp_path / "lower"
    folder.mkdir()
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    packed = Store(tmp_path / "packed")
    environment_id = tiny_environment(packed, TOOL)
    return Environment(packed.read_manifest(environment_id), packed).save(tmp_path / "it.envship")


def envship(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "envship.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# -- locks


@pytest.mark.parametrize(
    ("oddities", "kind", "said"),
    [
        (["locks=ENOLCK"], "odd", "without locks (No locks available)"),
        (["locks=ENOSYS"], "odd", "without locks (Function not implemented)"),
        (["locks=EOPNOTSUPP"], "odd", "without locks (Operation not supported)"),
        ([], "sshfs", "no other machine sees its locks"),
    ],
)
def test_a_store_where_locks_do_not_work_is_refused(
    tmp_path: Path, lower: Path, oddities: list[str], kind: str, said: str
) -> None:
    with odd(tmp_path / "point", lower, *oddities, kind=kind) as point:
        with pytest.raises(StoreError) as caught:
            open_store(point / "store", read_only=[])
        assert said in str(caught.value) and "ENVSHIP_STORE" in str(caught.value)


MACHINE = """
import os, subprocess, sys
from pathlib import Path
from tests.filesystems import odd
with odd(Path(sys.argv[1]), Path(sys.argv[2]), "locks=real", kind="juicefs") as point:
    print("mounted", flush=True)
    sys.stdin.readline()
    from worker_bootstrap.lock import Lease
    from worker_bootstrap.materialise import materialise
    from worker_bootstrap.store import Store
    store, seen = Store(point / "store"), []
    prefix = materialise(store, sys.argv[3], report=lambda done, total: seen.append(done == total))
    lease = Lease(store.lease(sys.argv[3]))
    lease.hold()
    assert store.built(sys.argv[3]) == prefix
    ran = subprocess.run([prefix / "bin/tool"], capture_output=True, check=True, text=True).stdout.strip()
    print(ran, "built" if any(seen) else "found", flush=True)
    sys.stdin.readline()
    lease.release()
"""


def test_machines_that_share_a_store_on_a_network_see_each_others_locks(tmp_path: Path, lower: Path) -> None:
    """Three of them, each with its own mount at the same place: one builds, all run, and nobody takes it from them."""
    environment_id = tiny_environment(Store(lower / "store"), {**TOOL, **{f"lib/{i:03}": b"x" for i in range(200)}})
    point = tmp_path / "point"
    point.mkdir()
    command = ["unshare", "--mount", sys.executable, "-c", MACHINE, point, lower, environment_id]
    root = Path(__file__).parents[1]
    machines = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)
    ]
    try:
        assert [_line(machine) for machine in machines] == ["mounted"] * 3
        for machine in machines:
            _next(machine)
        assert sorted(map(_line, machines)) == ["it runs built", "it runs found", "it runs found"]
        assert not os.path.ismount(point)
        assert not Lease(Store(lower / "store").layout.lease(environment_id)).is_free()
    finally:
        for machine in machines:
            machine.communicate(timeout=60)
    assert [machine.returncode for machine in machines] == [0] * 3
    assert Lease(Store(lower / "store").layout.lease(environment_id)).is_free()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _next(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


# -- a server in between


def test_a_cache_folder_on_a_network_is_no_place_for_a_store(tmp_path: Path, lower: Path) -> None:
    program = "from worker_bootstrap.location import default_root; print(default_root())"
    with odd(tmp_path / "home", lower, kind="sshfs") as home:
        environ = {name: value for name, value in os.environ.items() if name not in ("ENVSHIP_STORE", "XDG_CACHE_HOME")}
        command = [sys.executable, "-c", program]
        told = subprocess.run(
            command, env={**environ, "HOME": str(home)}, capture_output=True, text=True, check=True
        ).stdout
    assert told.strip() == f"/var/tmp/envship-{os.getuid()}"


def test_a_staged_store_that_a_server_exports_read_only_is_run_in_place(
    tmp_path: Path, lower: Path, bundle: Path
) -> None:
    """Without locks, too, and without asking the server for every file: what is missing there shows when it is used."""
    point = tmp_path / "apps"
    with odd(point, lower, "locks=real", kind="juicefs"):
        told = json.loads(envship("stage", bundle, "--store", point / "store", "--json").stdout)
    environment_id = EnvironmentId(told["id"])
    with odd(point, lower, "read-only", "locks=ENOLCK", kind="juicefs"):
        with pytest.raises(StoreError, match=r"Read-only file system|without locks"):
            open_store(point / "store", read_only=[])
        store = open_store(tmp_path / "own", read_only=[point / "store"])
        prefix = materialise(store, environment_id)
        assert str(prefix) == told["prefix"] and prefix.is_relative_to(point)
        assert subprocess.run([prefix / "bin/tool"], capture_output=True, check=True).stdout == b"it runs\n"
        Lease(store.lease(environment_id)).hold()  # says that there is none, and goes on
        assert store.missing(store.read_manifest(environment_id).chunks) == []
        (lower / "store" / prefix.relative_to(point / "store") / "lib/data").unlink()
        assert sound_prefix(store, environment_id) == prefix
        (lower / "store" / prefix.relative_to(point / "store") / "bin").rename(lower / "bin")
        assert materialise(store, environment_id).is_relative_to(tmp_path / "own")


def test_a_read_only_store_whose_server_is_away_takes_nothing_along(tmp_path: Path, lower: Path) -> None:
    """Neither when it is opened nor later; what is in the others is found."""
    staged = tiny_environment(Store(tmp_path / "staged"), TOOL)
    tiny_environment(Store(lower / "store"))
    others = [tmp_path / "point/store", tmp_path / "staged"]
    with odd(tmp_path / "point", lower, kind="juicefs") as point:
        before = open_store(tmp_path / "own", others)
        assert len(before.environments()) == 2
        (server,) = (child for child in psutil.Process().children() if str(point) in child.cmdline())
        server.kill()
        server.wait()
        try:
            for store in (before, open_store(tmp_path / "own", others)):
                assert store.environments() == [staged]
                assert needed_elsewhere(store) == set(store.read_manifest(staged).chunks)
                assert materialise(store, staged).is_relative_to(tmp_path / "own")
            with pytest.raises(StoreError, match=f"the store {point}/store cannot be written to .*not connected"):
                open_store(point / "store")
        finally:
            subprocess.run(["umount", "--lazy", str(point)], check=True)


def test_what_is_built_where_other_machines_see_it_is_on_disk_before_it_counts(
    tmp_path: Path, lower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have boots of their own."""
    with odd(tmp_path / "point", lower, "locks=real", kind="juicefs") as point:
        store = Store(point / "store")
        environment_id = tiny_environment(store, TOOL)
        prefix = materialise(store, environment_id)
        monkeypatch.setattr(ready_mark, "boot_id", lambda: "that of another machine")
        assert store.built(environment_id) == prefix


# -- a disk that goes bad


@pytest.fixture
def ailing(lower: Path) -> Iterator[Callable[[], None]]:
    """From when it is called on, what an odd file system is told to fail does."""
    mark = lower.with_name("lower.ailing")
    yield mark.touch
    mark.unlink(missing_ok=True)


def test_a_chunk_that_the_disk_cannot_read_any_more_is_dropped_and_comes_again(
    tmp_path: Path, lower: Path, ailing: Callable[[], None]
) -> None:
    with odd(tmp_path / "point", lower, "fails=read:EIO:/chunks/", "locks=real") as point:
        store = Store(point / "store")
        environment_id = tiny_environment(store, EVERY_KIND)
        chunks = {digest: store.read_chunk(digest) for digest in store.read_manifest(environment_id).chunks}
        _later(lower, ailing)
        lacking = None
        for _ in range(len(chunks) + 1):
            try:
                materialise(store, environment_id)
                break
            except ChunkMissing as error:
                assert error.digest != lacking
                lacking = error.digest
                assert store.missing([lacking]) == [lacking]
                store.write_chunk(chunks[lacking])
        assert lacking is not None
        assert list(damaged_files(store, environment_id)) == []
        assert store.lost(chunks) == []


def test_a_manifest_that_the_disk_cannot_read_any_more_is_dropped_and_comes_again(
    tmp_path: Path, lower: Path, ailing: Callable[[], None]
) -> None:
    with odd(tmp_path / "point", lower, "fails=read:EIO:/manifests/", "locks=real") as point:
        store = Store(point / "store")
        environment_id = tiny_environment(store, TOOL)
        manifest = store.read_manifest(environment_id)
        assert store.environments() == [environment_id]
        _later(lower, ailing)
        with pytest.raises(EnvironmentMissing):
            materialise(store, environment_id)
        assert store.environments() == []
        store.write_manifest(manifest)
        materialise(store, environment_id)


def test_built_files_that_the_disk_cannot_read_any_more_are_mended(
    tmp_path: Path, lower: Path, ailing: Callable[[], None]
) -> None:
    with odd(tmp_path / "point", lower, "fails=read:EIO:/envs/", "locks=real") as point:
        store = Store(point / "store")
        environment_id = tiny_environment(store, TOOL)
        prefix = materialise(store, environment_id)
        _later(lower, ailing)
        with pytest.raises(OSError, match="Input/output error"):
            (prefix / "lib/data").read_bytes()
        done = envship("verify", "--store", point / "store")
        assert done.returncode == 1 and "lib/data cannot be read: Input/output error" in done.stdout
        assert envship("verify", "--store", point / "store", "--repair").returncode == 0
        assert (prefix / "lib/data").read_bytes() == b"data" * 100


def test_a_disk_that_fails_to_write_leaves_nothing_that_counts(
    tmp_path: Path, lower: Path, ailing: Callable[[], None]
) -> None:
    with odd(tmp_path / "point", lower, "fails=write:EIO:/build-", "locks=real") as point:
        store = Store(point / "store")
        environment_id = tiny_environment(store, EVERY_KIND)
        ailing()
        with pytest.raises(MaterialiseError, match="Input/output error"):
            materialise(store, environment_id)
        assert store.built(environment_id) is None
        assert not os.path.lexists(store.layout.prefix(environment_id))
        assert list(store.layout.tmp.iterdir()) == []
        lower.with_name("lower.ailing").unlink()
        materialise(store, environment_id)
        assert list(damaged_files(store, environment_id)) == []


@pytest.mark.parametrize("operation", ["fsync", "fsyncdir"])
def test_what_a_disk_did_not_take_is_not_acknowledged(
    tmp_path: Path, lower: Path, bundle: Path, ailing: Callable[[], None], operation: str
) -> None:
    """Not as staged, and no environment of it as there."""
    with odd(tmp_path / "point", lower, f"fails={operation}:EIO:/(tmp/|manifests|ready)", "locks=real") as point:
        Store(point / "store")
        ailing()
        done = envship("stage", bundle, "--store", point / "store")
        assert done.returncode == 1
        assert "Input/output error" in done.stderr and "Traceback" not in done.stderr
        assert os.listdir(lower / "store" / "ready") == []
        lower.with_name("lower.ailing").unlink()
        assert envship("stage", bundle, "--store", point / "store").returncode == 0


def _later(lower: Path, ailing: Callable[[], None]) -> None:
    """Begin to fail what is there, once the clock of files has gone on."""
    newest_ns = max(path.lstat().st_ctime_ns for path in lower.rglob("*"))
    ailing()
    while lower.with_name("lower.ailing").stat().st_mtime_ns <= newest_ns:
        ailing()
