from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import distributed
import pytest

from tests.cluster import eventually
from tests.environments import EVERY_KIND, PLACEHOLDER, environment_of, package_of, tiny_environment
from tests.filesystems import needs_mount, tmpfs
from worker_bootstrap import blueprint, ready_mark, relocated_code, scratch, verify
from worker_bootstrap import materialise as module
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import (
    ChunkMissing,
    EnvironmentMissing,
    EnvshipError,
    ManifestInvalid,
    MaterialiseError,
    PrefixTooLong,
    StoreError,
    StoreFull,
)
from worker_bootstrap.layout import WRITTEN_AT_NS
from worker_bootstrap.lock import Lease
from worker_bootstrap.materialise import materialise, read_error
from worker_bootstrap.store import Store

if TYPE_CHECKING:
    from envship.environment import Environment

CODE = str(Path(module.__file__).parents[1])
STUB = "import sys; sys.path.insert(0, sys.argv.pop(1)); from worker_bootstrap.materialise import main; main()"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def command(store: Store, environment_id: str, *more: str) -> list[str]:
    return [sys.executable, "-c", STUB, CODE, str(store.layout.root), environment_id, *more]


def assert_nothing_left(store: Store) -> None:
    assert list(store.layout.tmp.iterdir()) == []


def test_every_kind_of_entry_arrives(store: Store) -> None:
    prefix = materialise(store, tiny_environment(store))
    here = os.fsencode(prefix)
    assert (prefix / "bin/tool").read_bytes() == b"#!" + here + b"/bin/python\nprint('hello')\n"
    assert stat.S_IMODE((prefix / "bin/tool").stat().st_mode) == 0o755
    assert os.readlink(prefix / "bin/alias") == "tool"
    assert (prefix / "bin/tool-1").samefile(prefix / "bin/tool")
    library = (prefix / "lib/libx.so").read_bytes()
    assert library.startswith(b"\x7fELF\0" + here + b"/lib:" + here + b"/x\0\0")
    assert len(library) == len(EVERY_KIND["lib/libx.so"][0])  # type: ignore[arg-type,index]
    assert library.endswith(b"\0tail\0")
    assert (prefix / "lib/data/large.bin").read_bytes() == EVERY_KIND["lib/data/large.bin"]
    assert stat.S_IMODE((prefix / "lib/data/large.bin").stat().st_mode) == 0o644
    assert (prefix / "lib/empty").read_bytes() == b""
    assert (prefix / "lib/nothing-inside").is_dir()
    assert (prefix / "share/naïve name\nwith newline.txt").read_bytes() == b"text"
    assert_nothing_left(store)


def test_modes_do_not_depend_on_the_umask(store: Store) -> None:
    environment_id = tiny_environment(store)
    before = os.umask(0o077)
    try:
        prefix = materialise(store, environment_id)
    finally:
        os.umask(before)
    assert stat.S_IMODE(prefix.stat().st_mode) == 0o755
    assert stat.S_IMODE((prefix / "lib").stat().st_mode) == 0o755
    assert stat.S_IMODE((prefix / "lib/empty").stat().st_mode) == 0o644


def test_a_name_that_is_no_utf8_survives(store: Store) -> None:
    name = os.fsdecode(b"caf\xe9")
    prefix = materialise(store, tiny_environment(store, {name: b"x"}))
    assert os.listdir(os.fsencode(prefix)) == [b"caf\xe9"]


def test_a_second_call_builds_nothing(store: Store) -> None:
    environment_id = tiny_environment(store)
    prefix = materialise(store, environment_id)
    inode = prefix.stat().st_ino
    shutil.rmtree(store.layout.chunks)  # nothing to build from
    assert materialise(store, environment_id) == prefix
    assert prefix.stat().st_ino == inode


def test_a_prefix_that_somebody_removed_is_built_again(store: Store) -> None:
    environment_id = tiny_environment(store)
    shutil.rmtree(materialise(store, environment_id))
    assert store.built(environment_id) is None
    materialise(store, environment_id)
    assert list(verify.damaged_files(store, environment_id)) == []


def test_one_that_is_ready_in_a_read_only_store_is_used_in_place(tmp_path: Path) -> None:
    staged = Store(tmp_path / "staged")
    environment_id = tiny_environment(staged)
    prefix = materialise(staged, environment_id)
    own = Store(tmp_path / "own", [tmp_path / "staged"])
    assert materialise(own, environment_id) == prefix
    assert list(own.layout.envs.iterdir()) == []


def test_chunks_of_a_read_only_store_are_built_here(tmp_path: Path) -> None:
    staged = Store(tmp_path / "staged")
    environment_id = tiny_environment(staged)
    own = Store(tmp_path / "own", [tmp_path / "staged"])
    assert materialise(own, environment_id) == own.layout.prefix(environment_id)
    assert list(staged.layout.envs.iterdir()) == []


def test_progress_ends_at_the_total(store: Store) -> None:
    seen: list[tuple[int, int]] = []
    environment_id = tiny_environment(store)
    materialise(store, environment_id, report=lambda done, total: seen.append((done, total)))
    total = store.read_manifest(environment_id).size_bytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# -- what must not happen


def test_an_unknown_environment(store: Store) -> None:
    with pytest.raises(EnvironmentMissing):
        materialise(store, EnvironmentId("0" * 64))


def test_a_missing_chunk_leaves_nothing_and_can_be_repaired(store: Store) -> None:
    environment_id = tiny_environment(store)
    digest = store.read_manifest(environment_id).packages[0].chunks[3].digest
    data = store.read_chunk(digest)
    next(store.layout.chunks.glob(f"*/{digest}.*")).unlink()
    with pytest.raises(ChunkMissing) as caught:
        materialise(store, environment_id)
    assert caught.value.digest == digest
    assert store.built(environment_id) is None
    assert_nothing_left(store)
    store.write_chunk(data)
    assert materialise(store, environment_id).is_dir()


def test_a_damaged_chunk_is_dropped_and_reads_as_missing(store: Store) -> None:
    environment_id = tiny_environment(store)
    digest = store.read_manifest(environment_id).packages[0].chunks[1].digest
    path = next(store.layout.chunks.glob(f"*/{digest}.*"))
    path.write_bytes(b"damaged")
    with pytest.raises(ChunkMissing):
        materialise(store, environment_id)
    assert not path.exists()


def test_content_that_is_not_what_the_listing_says(store: Store) -> None:
    package = package_of(store, {"a": b"what it is", "b": b"fine"})
    other = package_of(store, {"a": b"other stuff"[:10], "b": b"fine"})
    lying = package._replace(chunks=other.chunks)
    with pytest.raises(ManifestInvalid, match="'a' has the digest"):
        materialise(store, environment_of(store, [lying]).id)
    assert_nothing_left(store)


def test_a_prefix_longer_than_a_binary_files_placeholder(tmp_path: Path) -> None:
    store = Store(tmp_path / ("x" * 200) / ("y" * 100))
    environment_id = tiny_environment(store)
    with pytest.raises(PrefixTooLong) as caught:
        materialise(store, environment_id)
    assert caught.value.path == "lib/libx.so"
    assert caught.value.room_bytes == len(PLACEHOLDER)
    assert_nothing_left(store)


def test_a_path_below_a_file_of_another_package_is_refused(store: Store) -> None:
    packages = [package_of(store, {"lib/a": b"1"}, "one"), package_of(store, {"lib/a/b": b"2"}, "two")]
    with pytest.raises(ManifestInvalid, match="'lib/a' has entries below it"):
        materialise(store, environment_of(store, packages).id)


def test_a_full_disk_is_found_out_before_writing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MARGIN_BYTES", 1 << 60)
    with pytest.raises(StoreFull) as caught:
        materialise(store, tiny_environment(store))
    assert caught.value.needed_bytes > caught.value.free_bytes
    assert_nothing_left(store)


@pytest.mark.skipif(os.getuid() != 0, reason="needs to mount a small file system")
def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is left; and with room again the same call succeeds."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        staged = Store(tmp_path / "staged")
        environment_id = tiny_environment(staged, {f"{i:03}": os.urandom(50_000) for i in range(80)}, 100_000)
        store = Store(small / "store", [tmp_path / "staged"])
        monkeypatch.setattr(module, "_check_room", lambda *_: None)
        with pytest.raises(StoreFull):
            materialise(store, environment_id)
        assert_nothing_left(store)
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        assert len(list(materialise(store, environment_id).iterdir())) == 80
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -- many at once, and the killed


def test_ten_processes_build_once(store: Store) -> None:
    environment_id = tiny_environment(store, {f"{i:04}": b"%d" % i * 50 for i in range(500)})
    processes = [
        subprocess.Popen(command(store, environment_id), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        for _ in range(10)
    ]
    told = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    answers = [json.loads(lines[-1]) for lines in told]
    assert answers == [{"prefix": str(store.layout.prefix(environment_id))}] * 10
    assert sum(len(lines) > 1 for lines in told) == 1, "only who builds tells of progress"
    assert [process.returncode for process in processes] == [0] * 10
    assert list(verify.damaged_files(store, environment_id)) == []
    assert_nothing_left(store)


def test_threads_of_one_process_build_once(store: Store) -> None:
    environment_id = tiny_environment(store)
    built: list[int] = []

    def report(done_bytes: int, total_bytes: int) -> None:
        if done_bytes == total_bytes:
            built.append(threading.get_ident())

    with ThreadPoolExecutor(8) as pool:
        found = {pool.submit(materialise, store, environment_id, report=report) for _ in range(8)}
    assert {future.result() for future in found} == {store.layout.prefix(environment_id)}
    assert len(built) == 1


class StuckBuild:
    """A build in a process of its own that stands still in the middle: the disk never gives it one of its chunks."""

    def __init__(self, store: Store) -> None:
        self.environment_id = tiny_environment(store, {f"{i:03}": b"%03d" % i * 40 for i in range(60)})
        digest = store.read_manifest(self.environment_id).packages[0].chunks[-1].digest
        self.process = subprocess.Popen(
            [sys.executable, "-c", STUCK_STUB, *command(store, self.environment_id)[3:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "STUCK": digest},
        )

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


STUCK_STUB = """
import os, sys, threading
sys.path.insert(0, sys.argv.pop(1))
from worker_bootstrap.materialise import main
from worker_bootstrap.store import Store
read = Store.read_unverified
def hang(store, digest):
    if digest == os.environ["STUCK"]:
        threading.Event().wait()
    return read(store, digest)
Store.read_unverified = hang
main()
"""


@pytest.fixture
def stuck(store: Store) -> Iterator[StuckBuild]:
    build = StuckBuild(store)
    try:
        eventually(lambda: len(list(store.layout.tmp.glob("build-*/*"))) >= 20, "some of its files are there")
        assert build.process.poll() is None
        yield build
    finally:
        build.close()


def test_a_killed_build_counts_for_nothing_and_is_swept(store: Store, stuck: StuckBuild) -> None:
    stuck.close()
    assert store.built(stuck.environment_id) is None
    assert list(store.layout.tmp.iterdir()) != []
    materialise(store, stuck.environment_id)
    assert list(verify.damaged_files(store, stuck.environment_id)) == []
    assert_nothing_left(store)


def test_a_build_ends_when_its_parent_is_gone(stuck: StuckBuild) -> None:
    assert stuck.process.poll() is None
    assert stuck.process.stdin is not None
    stuck.process.stdin.close()
    stuck.process.stdin = None
    assert stuck.process.wait(20) == 1


def test_renamed_but_not_marked_ready_is_built_again(store: Store) -> None:
    """The moment between the last two steps of a build: what lies there may not all be on disk."""
    environment_id = tiny_environment(store)
    prefix = materialise(store, environment_id)
    store.layout.ready(environment_id).unlink()
    (prefix / "lib/empty").write_bytes(b"not empty")
    materialise(store, environment_id)
    assert (prefix / "lib/empty").read_bytes() == b""


@pytest.fixture
def restart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the machine seem to have been started anew."""
    return lambda: monkeypatch.setattr(ready_mark, "boot_id", lambda: "another boot")


def test_after_a_restart_of_the_machine_whole_environments_are_kept(store: Store, restart: Callable[[], None]) -> None:
    environment_id = tiny_environment(store)
    prefix = materialise(store, environment_id)
    inode = prefix.stat().st_ino
    restart()
    assert store.built(environment_id) is None
    assert materialise(store, environment_id) == prefix == store.built(environment_id)
    assert prefix.stat().st_ino == inode


@pytest.mark.parametrize("lost", [b"", b"tex"])
def test_after_a_restart_of_the_machine_what_was_not_on_disk_is_built_again(
    store: Store, restart: Callable[[], None], lost: bytes
) -> None:
    environment_id = tiny_environment(store)
    path = materialise(store, environment_id) / "share/naïve name\nwith newline.txt"
    path.write_bytes(lost)
    restart()
    materialise(store, environment_id)
    assert path.read_bytes() == b"text"
    assert_nothing_left(store)


def test_after_a_restart_of_the_machine_a_durable_build_counts_as_it_is(
    store: Store, restart: Callable[[], None]
) -> None:
    environment_id = tiny_environment(store)
    prefix = materialise(store, environment_id, durable=True)
    restart()
    assert store.built(environment_id) == prefix


def test_what_is_built_already_can_be_made_durable(store: Store, restart: Callable[[], None]) -> None:
    environment_id = tiny_environment(store)
    materialise(store, environment_id)
    prefix = materialise(store, environment_id, durable=True)
    restart()
    assert store.built(environment_id) == prefix


def test_where_other_machines_may_see_the_store_it_counts_for_them(
    store: Store, restart: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have another boot id, and would build it anew under the processes that run from it."""
    monkeypatch.setattr(ready_mark, "is_local", lambda path: False)
    environment_id = tiny_environment(store)
    prefix = materialise(store, environment_id)
    restart()
    assert store.built(environment_id) == prefix


@pytest.mark.parametrize("mark", [b"", b"{", b"[]", b"{}"])
def test_a_mark_that_is_not_whole_is_none(store: Store, mark: bytes) -> None:
    environment_id = tiny_environment(store)
    prefix = materialise(store, environment_id)
    store.layout.ready(environment_id).write_bytes(mark)
    assert store.built(environment_id) is None
    assert materialise(store, environment_id) == prefix == store.built(environment_id)


def test_what_others_left_long_ago_is_swept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.layout.tmp / "build-0000000000000000-x").mkdir()
    (store.layout.tmp / "file").write_bytes(b"")
    monkeypatch.setattr(scratch, "STALE_S", -1.0)
    materialise(store, tiny_environment(store))
    assert list(store.layout.tmp.iterdir()) == []


def test_what_others_have_just_finished_stays_whatever_time_it_was_given(store: Store) -> None:
    """As a build has, that is about to be moved to its place, and a file that is to replace a damaged one."""
    folder, file = store.layout.tmp / "build-0000000000000000-x", store.layout.tmp / "file"
    folder.mkdir()
    file.write_bytes(b"")
    for path in (folder, file):
        os.utime(path, ns=(WRITTEN_AT_NS, WRITTEN_AT_NS))
    materialise(store, tiny_environment(store))
    assert set(store.layout.tmp.iterdir()) == {folder, file}


@needs_mount
@pytest.mark.parametrize("why", ["the disk is full", "something is mounted there"])
def test_an_environment_that_processes_run_from_stays_where_it_cannot_be_mended(tmp_path: Path, why: str) -> None:
    with contextlib.ExitStack() as stack:
        store = Store(stack.enter_context(tmpfs(tmp_path / "mount", "size=40m")) / "store")
        environment_id = tiny_environment(store, {**EVERY_KIND, "lib/large/data": os.urandom(9 << 20)}, 1 << 20)
        prefix = materialise(store, environment_id)
        lease = Lease(store.layout.lease(environment_id))
        lease.hold()
        stack.callback(lease.release)
        with contextlib.ExitStack() as trouble:
            if why == "the disk is full":
                (prefix / "lib" / "large" / "data").unlink()
                rest = tmp_path / "mount" / "rest"
                with contextlib.suppress(OSError), open(rest, "wb", buffering=0) as file:
                    while file.write(b"x" * 4096):
                        pass
                trouble.callback(rest.unlink)
                error: type[EnvshipError] = StoreFull
            else:
                trouble.enter_context(tmpfs(prefix / "lib" / "large", "size=20m"))
                error = MaterialiseError
            with pytest.raises(error):
                materialise(store, environment_id)
            assert (prefix / "bin" / "tool").is_file()
        assert materialise(store, environment_id) == prefix
        assert list(verify.damaged_files(store, environment_id)) == []
    assert not (tmp_path / "mount" / "store").exists()


# -- the process of its own


def test_the_process_reports_and_exits_with_0(store: Store) -> None:
    environment_id = tiny_environment(store)
    done = subprocess.run(command(store, environment_id), capture_output=True, stdin=subprocess.DEVNULL, check=True)
    progress, *_, result = [json.loads(line) for line in done.stdout.splitlines()]
    assert 0 < progress["done_bytes"] <= progress["total_bytes"] == store.read_manifest(environment_id).size_bytes
    assert result == {"prefix": str(store.layout.prefix(environment_id))}


def test_an_error_crosses_the_process_boundary(store: Store) -> None:
    environment_id = tiny_environment(store)
    digest = store.read_manifest(environment_id).packages[0].listing.digest
    next(store.layout.chunks.glob(f"*/{digest}.*")).unlink()
    done = subprocess.run(command(store, environment_id), capture_output=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 1
    error = read_error(json.loads(done.stdout.splitlines()[-1])["error"])
    assert isinstance(error, ChunkMissing)
    assert error.digest == digest


def test_an_unexpected_error_is_told_too(store: Store) -> None:
    done = subprocess.run(command(store, "no id"), capture_output=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 1
    error = read_error(json.loads(done.stdout.splitlines()[-1])["error"])
    assert isinstance(error, MaterialiseError) and "ValueError" in str(error)


def test_a_store_that_cannot_be_used_is_told_as_such(store: Store) -> None:
    store.layout.host_id.unlink()
    shutil.rmtree(store.layout.locks)
    store.layout.locks.write_text("a file where a folder should be")
    done = subprocess.run(command(store, "0" * 64), capture_output=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 1
    error = read_error(json.loads(done.stdout.splitlines()[-1])["error"])
    assert isinstance(error, StoreError) and "File exists" in str(error)


@pytest.mark.parametrize("raw", [None, {}, {"type": "os", "values": []}, {"type": "StoreFull", "values": [1, 2, 3, 4]}])
def test_an_error_that_is_none_of_ours_reads_as_a_plain_one(raw: object) -> None:
    assert type(read_error(raw)) is EnvshipError


# -- real ones


def test_a_packed_environment_runs_from_its_new_prefix(
    packed: Environment, client_store: Store, tmp_path: Path
) -> None:
    store = Store(tmp_path / "host", [client_store.layout.root])
    prefix = materialise(store, packed.id)
    program = "import sys, distributed, numpy, onlyhere; print(sys.prefix, numpy.__file__)"
    done = subprocess.run([prefix / "bin/python", "-c", program], capture_output=True, text=True, check=True)
    root, file = done.stdout.split()
    assert Path(root) == prefix
    assert prefix in Path(file).parents
    script = subprocess.run([prefix / "bin/dask", "--version"], capture_output=True, text=True, check=True)
    assert distributed.__version__ in script.stdout
    assert list(verify.damaged_files(store, packed.id)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_every_folder_has_its_time_also_where_byte_code_was_made_last(
    processes: int, packed: Environment, client_store: Store, tmp_path: Path
) -> None:
    """Or each quick look would look more closely at those."""
    store = Store(tmp_path / "host", [client_store.layout.root])
    prefix = materialise(store, packed.id, processes=processes)
    listings = blueprint.read_listings(packed.manifest, store.read_chunk)
    entries = (entry for listing in listings for entry in listing.entries)
    modules = relocated_code.modules_without_code(entries, packed.manifest.python)
    made = [prefix / module for module in modules]
    assert made
    assert all(list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc")) for path in made)
    folders = [prefix, *(path for path in prefix.rglob("*") if path.is_dir() and not path.is_symlink())]
    assert [path for path in folders if path.stat().st_mtime_ns != WRITTEN_AT_NS] == []
