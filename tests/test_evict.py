from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.environments import environment_of, package_of, tiny_environment
from tests.filesystems import needs_mount, overlay, tmpfs
from tests.overtaken import Overtaken
from worker_bootstrap import evict, scratch, verify
from worker_bootstrap.chunk_service import read_chunks
from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.errors import ChunkMissing, EnvironmentMissing, StoreError, StoreFull
from worker_bootstrap.evict import GRACE_S, Kept, collect, plan
from worker_bootstrap.lock import Lease, Lock
from worker_bootstrap.materialise import materialise
from worker_bootstrap.stock import Holding, Holdings, survey
from worker_bootstrap.store import Store

A, B, C = (EnvironmentId(letter * 64) for letter in "abc")
ONE, TWO, THREE = (Digest(digit * 64) for digit in "123")
NOW = 1_000_000.0


def holding(
    name: EnvironmentId,
    used_s_ago: float,
    *chunks: Digest,
    own_bytes: int = 100,
    in_use: bool = False,
    shared: Mapping[int, int] | None = None,
) -> Holding:
    return Holding(name, True, in_use, NOW - used_s_ago, own_bytes, shared or {}, frozenset(chunks))


# -- deciding


def test_nothing_goes_within_the_limit() -> None:
    holdings = Holdings((holding(A, 9e5, ONE), holding(B, 8e5, TWO)), {ONE: 10, TWO: 10}, 0)
    for limit_bytes in (220, None):
        found = plan(holdings, limit_bytes, now=NOW)
        assert (found.evicted, found.kept, found.chunks, found.freed_bytes) == ((), (), frozenset(), 0)
    assert found.size_bytes == 220


def test_what_nobody_used_for_the_longest_time_goes_first_and_no_more_than_needed() -> None:
    holdings = Holdings((holding(A, 7e5), holding(B, 9e5), holding(C, 8e5)), {}, 0)
    assert plan(holdings, 299, now=NOW).evicted == (B,)
    assert plan(holdings, 200, now=NOW).evicted == (B,)
    assert plan(holdings, 199, now=NOW).evicted == (B, C)
    assert plan(holdings, 0, now=NOW).evicted == (B, C, A)


def test_a_chunk_goes_with_the_last_environment_that_names_it() -> None:
    holdings = Holdings((holding(A, 9e5, ONE, TWO), holding(B, 8e5, TWO)), {ONE: 10, TWO: 20, THREE: 5}, 0)
    found = plan(holdings, 130, now=NOW)
    assert found.evicted == (A,)
    assert found.chunks == {ONE, THREE}
    assert found.freed_bytes == 115
    assert plan(holdings, 0, now=NOW, needed_elsewhere=[ONE]).chunks == {TWO, THREE}


def test_a_shared_file_goes_with_the_last_environment_that_links_to_it() -> None:
    shared = {7: 1000}
    holdings = Holdings((holding(A, 9e5, shared=shared), holding(B, 8e5, shared=shared)), {}, 0)
    assert holdings.size_bytes == 1200
    assert plan(holdings, 1100, now=NOW).freed_bytes == 100
    assert plan(holdings, 1099, now=NOW).freed_bytes == 1200


def test_what_may_not_go_is_passed_over_with_the_reason() -> None:
    holdings = Holdings((holding(A, 9e5, in_use=True), holding(B, 8e5), holding(C, 60)), {}, 0)
    found = plan(holdings, 0, now=NOW, keep=[B])
    assert found.evicted == ()
    assert [(kept.environment_id, kept.reason) for kept in found.kept] == [
        (A, "a process runs from it"),
        (B, "it has just been packed or built"),
        (C, "it was used in the last 15 minutes"),
    ]


def test_what_is_being_built_is_passed_over_with_its_process() -> None:
    holdings = Holdings((holding(A, 9e5)._replace(builders=[7]),), {}, 0)
    assert plan(holdings, 0, now=NOW).kept == (Kept(A, "it is being built (process 7)"),)


def test_chunks_that_are_so_new_that_their_manifest_may_come_are_not_counted_as_freed() -> None:
    """Neither those of nobody, nor those of an environment that goes."""
    written_at = {ONE: NOW - GRACE_S - 1, TWO: NOW - 1, THREE: NOW - 1}
    holdings = Holdings((holding(A, 9e5, ONE, THREE),), {ONE: 10, TWO: 20, THREE: 5}, 0, written_at)
    found = plan(holdings, 0, now=NOW)
    assert (found.chunks, found.new_chunks, found.freed_bytes) == ({ONE}, 2, 110)


def test_what_nobody_used_for_too_long_goes_whatever_the_size() -> None:
    holdings = Holdings((holding(A, 9e5), holding(B, 1e5)), {}, 0)
    assert plan(holdings, None, now=NOW, unused_s=2e5).evicted == (A,)


# -- doing it


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def age(store: Store, seconds: float = 10 * GRACE_S) -> None:
    """Let everything in the store be so much older."""
    for path in store.layout.root.rglob("*"):
        if path.is_file() and store.layout.envs not in path.parents:
            found = path.stat()
            os.utime(path, (found.st_atime, found.st_mtime - seconds))


def two(store: Store) -> tuple[EnvironmentId, EnvironmentId]:
    """Two environments with a package in common; the first was used longer ago."""
    common = package_of(store, {"common": b"common" * 100}, "common")
    made = []
    for name in ("old", "new"):
        own = package_of(store, {name: name.encode() * 100}, name)
        made.append(environment_of(store, [common, own]).id)
        materialise(store, made[-1])
        age(store)
    return made[0], made[1]


def intact(store: Store, environment_id: EnvironmentId) -> bool:
    manifest = store.read_manifest(environment_id)
    prefix = store.built(environment_id)
    return (
        prefix is not None
        and list(verify.damaged_files(store, environment_id)) == []
        and list(verify.damaged_chunks(store, manifest)) == []
    )


def assert_gone(store: Store, environment_id: EnvironmentId) -> None:
    assert store.built(environment_id) is None
    assert environment_id not in store.environments()
    assert not store.layout.prefix(environment_id).exists()
    assert not store.layout.inventory(environment_id).exists()


def test_the_size_is_what_the_disk_says(store: Store) -> None:
    two(store)
    parts = [store.layout.envs, store.layout.chunks]
    told = subprocess.run(["du", "-s", "-B1", *parts], capture_output=True, text=True, check=True).stdout
    du = sum(int(line.split()[0]) for line in told.splitlines())
    folders = [path for part in parts for path in (part, *part.iterdir()) if path.is_dir()]
    extra = sum(path.stat().st_blocks * 512 for path in folders)  # which du counts, and we do not
    assert abs(survey(store).size_bytes - du) <= extra


def test_the_least_recently_used_goes_with_what_only_it_needs(store: Store) -> None:
    old, new = two(store)
    size_bytes = survey(store).size_bytes
    freed = collect(store, size_bytes - 1)
    assert freed.evicted == (old,)
    assert freed.chunks == 4  # its own listing, and three of content
    assert_gone(store, old)
    assert intact(store, new)
    assert survey(store).size_bytes < size_bytes
    assert list(store.layout.tmp.iterdir()) == []


def test_what_comes_back_after_an_eviction_is_whole(store: Store) -> None:
    old, _ = two(store)
    collect(store, 0, grace_s=0)
    assert store.environments() == []
    assert list(store.layout.chunks.glob("*/*")) == []
    common = package_of(store, {"common": b"common" * 100}, "common")
    assert environment_of(store, [common, package_of(store, {"old": b"old" * 100}, "old")]).id == old
    materialise(store, old)
    assert intact(store, old)


def test_what_a_process_runs_from_stays_also_across_exec(store: Store) -> None:
    old, new = two(store)
    program = "import sys, os; from pathlib import Path; from worker_bootstrap.lock import Lease, passed_on\n"
    program += "Lease(Path(sys.argv[1])).hold()\n"
    program += "with passed_on(): os.execv('/bin/sh', ['sh', '-c', 'echo held; exec cat'])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, store.lease(old)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        age(store)
        freed = collect(store, 0, grace_s=0)
        process.kill()
    assert freed.evicted == (new,)
    assert [(kept.environment_id, kept.reason) for kept in freed.kept] == [(old, "a process runs from it")]
    assert intact(store, old)
    assert collect(store, 0, grace_s=0).evicted == (old,)


def test_one_that_is_taken_into_use_after_the_decision_stays(store: Store) -> None:
    old, _ = two(store)
    found = plan(survey(store), 0, now=time.time(), grace_s=0)
    lease = Lease(store.lease(old))
    lease.hold()
    try:
        assert [kept.environment_id for kept in evict.carry_out(store, found).kept] == [old]
    finally:
        lease.release()
    assert intact(store, old)


def test_one_that_was_used_for_a_moment_after_the_decision_stays(store: Store) -> None:
    old, _ = two(store)
    found = plan(survey(store), 0, now=time.time() - 1, grace_s=0)
    lease = Lease(store.lease(old))
    lease.hold()
    lease.release()
    assert evict.carry_out(store, found).kept[0].reason == "somebody has just used it"
    assert intact(store, old)


def to_come(store: Store, environment_id: EnvironmentId) -> None:
    """Let an environment, and all chunks, be of a time that is years ahead."""
    layout = store.layout
    lease = Lease(layout.lease(environment_id))
    lease.hold()
    lease.release()
    paths = [layout.manifest(environment_id), layout.ready(environment_id), lease.path, *layout.chunks.glob("*/*")]
    for path in paths:
        os.utime(path, (time.time() + 1e8,) * 2)


def test_a_use_that_is_still_to_come_is_one_of_now(store: Store) -> None:
    old, new = two(store)
    to_come(store, old)
    now = time.time()
    planned = plan(survey(store, now), 0, now=now, grace_s=0, unused_s=0)
    assert planned.evicted == (new, old)
    assert store.layout.ready(old).stat().st_mtime > now  # looking alone changes nothing
    freed = collect(store, 0, grace_s=0)
    assert (freed.evicted, freed.chunks) == ((new, old), len(planned.chunks))
    assert survey(store).size_bytes == 0


def test_what_was_of_a_time_to_come_ages_from_its_first_collection_on(store: Store) -> None:
    old, new = two(store)
    to_come(store, old)
    freed = collect(store, 0)
    assert (freed.evicted, freed.kept) == ((new,), (Kept(old, "it was used in the last 15 minutes"),))
    age(store)
    assert collect(store, 0).evicted == (old,)
    assert survey(store).size_bytes == 0


def test_one_that_is_being_built_stays(store: Store) -> None:
    old, _ = two(store)
    with Lock(store.layout.lock(old)):
        kept = collect(store, 0, grace_s=0).kept
    assert [each.environment_id for each in kept] == [old]
    assert f"process {os.getpid()}" in kept[0].reason
    assert intact(store, old)


def test_a_running_use_counts_as_use_until_its_end(store: Store) -> None:
    old, new = two(store)
    lease = Lease(store.lease(old))
    lease.hold()
    age(store)
    survey(store)
    lease.release()
    assert collect(store, survey(store).size_bytes - 1).evicted == (new,)


def test_chunks_wait_for_whoever_is_adding_some(store: Store) -> None:
    """A pack that finds a chunk there already must not lose it before it has written its manifest."""
    digest = store.write_chunk(b"of a pack under way")
    age(store)
    with store.adding():
        assert collect(store, None).chunks == 0
    assert store.has_chunk(digest)
    assert collect(store, None).chunks == 1
    assert not store.has_chunk(digest)


def test_new_chunks_may_have_come_ahead_of_their_manifest(store: Store) -> None:
    digest = store.write_chunk(b"sent by a peer")
    collect(store, 0)
    assert store.has_chunk(digest)


def test_chunks_that_a_read_only_store_names_stay(tmp_path: Path) -> None:
    staged = Store(tmp_path / "staged")
    environment_id = tiny_environment(staged)
    digest = staged.read_manifest(environment_id).packages[0].chunks[0].digest
    store = Store(tmp_path / "own", [tmp_path / "staged"])
    Store(tmp_path / "own").write_chunk(staged.read_chunk(digest))
    age(store)
    assert collect(store, 0, grace_s=0).chunks == 0
    assert intact(staged, materialise(staged, environment_id) and environment_id)


def test_a_prefix_of_an_interrupted_build_goes(store: Store) -> None:
    old, new = two(store)
    store.layout.ready(old).unlink()
    assert survey(store).leftovers_bytes > 0
    collect(store, None)
    assert not store.layout.prefix(old).exists()
    assert intact(store, new)
    materialise(store, old)
    assert intact(store, old)


@needs_mount
def test_what_came_with_the_image_of_a_container_goes(tmp_path: Path) -> None:
    """An overlay does not rename folders of its lower layer."""
    old, new = two(Store(tmp_path / "image"))
    with overlay(tmp_path / "container", tmp_path / "image") as container:
        store = Store(container)
        assert collect(store, 0, keep=[new], grace_s=0).evicted == (old,)
        assert_gone(store, old)
        store.layout.ready(new).unlink()
        assert survey(store).leftovers_bytes > 0
        collect(store, None)
        assert list(store.layout.envs.iterdir()) == [] == list(store.layout.tmp.iterdir())


@pytest.mark.parametrize("part", ["manifest", "ready", "inventory", "lease", "lock"])
def test_what_cannot_be_removed_stays_with_the_reason_and_the_others_go(store: Store, part: str) -> None:
    """As where something is immutable, or was put there by somebody's mistake."""
    old, new = two(store)
    path = getattr(store.layout, part)(old)
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "something").touch()
    freed = collect(store, 0, grace_s=0)
    assert freed.evicted == (new,)
    assert freed.kept == (Kept(old, f"it cannot be removed ({path}: Is a directory)"),)
    assert_gone(store, new)


@pytest.fixture
def frozen(store: Store) -> Iterator[Store]:
    """A store that its owner made immutable."""
    for environment_id in two(store):
        store.layout.lease(environment_id).touch()
    change = ["chattr", "-R", "+i", str(store.layout.root)]
    if subprocess.run(change, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be made immutable here")
    yield store
    subprocess.run(["chattr", "-R", "-i", str(store.layout.root)], check=True)


def test_an_immutable_store_says_that_it_cannot_be_written_to_and_is_run_from(frozen: Store) -> None:
    with pytest.raises(StoreError, match=f"{frozen.layout.root} cannot be written to .*not permitted"):
        collect(frozen, 0, grace_s=0)
    for environment_id in frozen.environments():
        assert materialise(frozen, environment_id) == frozen.built(environment_id)
        lease = Lease(frozen.lease(environment_id))
        lease.hold()
        assert not Lease(lease.path).is_free()
        lease.release()


def test_what_somebody_else_put_beside_the_prefixes_stays(store: Store, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (store.layout.envs / "analysis").symlink_to(tmp_path / "outside")
    (store.layout.envs / "notes").mkdir()
    (store.layout.envs / "notes/today").write_bytes(b"mine")
    (store.layout.envs / "README").write_bytes(b"mine")
    before = sorted(store.layout.envs.rglob("*"))
    assert plan(survey(store), 0, now=time.time(), grace_s=0).freed_bytes == 0
    collect(store, 0, grace_s=0)
    assert sorted(store.layout.envs.rglob("*")) == before


def test_a_prefix_without_mark_stays_while_somebody_builds_or_runs_there(store: Store) -> None:
    old, _ = two(store)
    store.layout.ready(old).unlink()
    with Lock(store.layout.lock(old)):
        collect(store, None)
    lease = Lease(store.layout.lease(old))
    lease.hold()
    collect(store, None)
    lease.release()
    assert store.layout.prefix(old).exists()


# -- races: whoever comes too late finds nothing there, as if it had never been


def test_a_chunk_that_is_evicted_before_it_is_read_is_missing(store: Store) -> None:
    environment_id = tiny_environment(store)
    digest = next(iter(store.read_manifest(environment_id).chunks))
    overtaken = Overtaken(store.layout.root, "_read")  # found, and not yet opened
    with pytest.raises(ChunkMissing):
        overtaken.read_chunk(digest)
    assert overtaken.freed[0].chunks


def test_chunks_that_are_evicted_while_they_are_served_are_left_out(store: Store) -> None:
    environment_id = tiny_environment(store)
    chunks = store.read_manifest(environment_id).chunks
    assert len(read_chunks(store, chunks, ["zstd"])) == len(chunks)
    overtaken = Overtaken(store.layout.root, "_read")
    assert read_chunks(overtaken, chunks, ["zstd"]) == []
    assert overtaken.freed[0].evicted == (environment_id,)


def test_what_another_eviction_removes_from_tmp_is_no_failure(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments around the rename are when another one's sweep meets what this one has put there."""
    old, new = two(store)
    right = os.rename

    def met(source: Path, destination: Path) -> None:
        scratch.sweep(store.layout, scratch.EVICTED)
        right(source, destination)
        scratch.sweep(store.layout, scratch.EVICTED)

    monkeypatch.setattr(os, "rename", met)
    assert collect(store, 0, grace_s=0).evicted == (old, new)
    assert_gone(store, old)
    assert list(store.layout.tmp.iterdir()) == []


@pytest.mark.parametrize("was_built", [False, True])
def test_an_environment_that_is_evicted_before_it_is_built_is_missing(store: Store, was_built: bool) -> None:
    environment_id = tiny_environment(store)
    if was_built:
        materialise(store, environment_id)
    overtaken = Overtaken(store.layout.root, "built_in")  # before there is a lock
    with pytest.raises(EnvironmentMissing):
        materialise(overtaken, environment_id)
    assert overtaken.freed[0].evicted == (environment_id,)
    assert_gone(store, environment_id)


@pytest.mark.parametrize("moment", ["read_manifest", "read_chunk", "read_unverified"])
def test_an_environment_whose_build_is_under_way_is_not_evicted(store: Store, moment: str) -> None:
    environment_id = tiny_environment(store)
    overtaken = Overtaken(store.layout.root, moment)
    materialise(overtaken, environment_id)
    assert [kept.environment_id for kept in overtaken.freed[0].kept] == [environment_id]
    assert intact(store, environment_id)


def test_reading_serving_and_building_miss_what_is_evicted_meanwhile(store: Store) -> None:
    """While it is gone, each of them misses it, and while it is there, each finds it; nobody ever sees a half."""
    environment_id = tiny_environment(store, {f"{i:03}": os.urandom(60) for i in range(60)})
    manifest = store.read_manifest(environment_id)
    chunks = {digest: store.read_chunk(digest) for digest in manifest.chunks}
    stop = threading.Event()
    errors: list[BaseException] = []
    seen: Counter[tuple[str, str]] = Counter()

    def use(role: str, work: Callable[[], bool]) -> None:
        while not stop.is_set():
            try:
                found = work()
            except (ChunkMissing, EnvironmentMissing):
                found = False
            except BaseException as error:
                errors.append(error)
                return
            seen[role, "found" if found else "missed"] += 1

    def read() -> bool:
        for digest, content in chunks.items():
            assert store.read_chunk(digest) == content
        return True

    def serve() -> bool:
        served = read_chunks(store, chunks, ["zstd"])
        assert {chunk.digest for chunk in served} <= chunks.keys()
        return len(served) == len(chunks)

    def build() -> bool:
        prefix = materialise(store, environment_id)
        lease = Lease(store.layout.lease(environment_id))
        lease.hold()
        try:
            if store.built(environment_id) is None:
                return False
            assert len(list(prefix.iterdir())) == 60  # leased, so it stays now
            return True
        finally:
            lease.release()
            stop.wait(0.1)  # else the lock is never free, and nothing can be evicted

    roles = {"reader": read, "server": serve, "builder": build}

    def until_all(what: str) -> None:
        before = seen.copy()
        while not errors and not all(seen[role, what] > before[role, what] for role in roles):
            assert time.monotonic() < deadline, (what, before, seen)
            time.sleep(0.001)

    threads = [threading.Thread(target=use, args=each) for each in roles.items()]
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            until_all("found")
            while not collect(store, 0, grace_s=0).evicted:
                assert time.monotonic() < deadline
            until_all("missed")
            for content in chunks.values():
                store.write_chunk(content)
            store.write_manifest(manifest)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    materialise(store, environment_id)
    assert intact(store, environment_id)


def test_what_nobody_touched_for_a_day_goes_from_tmp_and_counts_as_freed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chunk = store.layout.tmp / "archive-x", store.layout.tmp / "chunk"
    (folder / "env").mkdir(parents=True)
    for path in (folder / "env" / "file", chunk):
        path.write_bytes(bytes(100_000))
    collect(store, None)
    assert set(store.layout.tmp.iterdir()) == {folder, chunk}
    monkeypatch.setattr(scratch, "STALE_S", -1.0)
    assert plan(survey(store), None, now=time.time()).freed_bytes >= 200_000
    collect(store, None)
    assert list(store.layout.tmp.iterdir()) == []
    assert survey(store).leftovers_bytes == 0


# -- no room


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Store]:
    """A store on a file system with few inodes."""
    with tmpfs(tmp_path / "mount", "size=50m,nr_inodes=200") as path:
        yield Store(path / "store")


def take_all_inodes(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(OSError, match="No space left"):
        for number in itertools.count():
            (folder / str(number)).touch()


@needs_mount
def test_without_an_inode_for_a_lease_environments_go_as_ever(crowded: Store) -> None:
    """Also one that was never built, so that nobody made its lock: that is made when another one has gone."""
    packed = tiny_environment(crowded, {"packed": b"packed"})
    age(crowded)
    old, new = two(crowded)
    take_all_inodes(crowded.layout.root.parent / "taken")
    assert sorted(collect(crowded, 0, grace_s=0).evicted) == sorted([packed, old, new])
    assert_gone(crowded, old)
    assert list(crowded.layout.chunks.glob("*/*")) == []


@needs_mount
def test_without_an_inode_one_that_a_process_runs_from_stays(crowded: Store) -> None:
    old, new = two(crowded)
    lease = Lease(crowded.layout.lease(old))
    lease.hold()
    try:
        age(crowded)
        take_all_inodes(crowded.layout.root.parent / "taken")
        freed = collect(crowded, 0, grace_s=0)
    finally:
        lease.release()
    assert freed.evicted == (new,)
    assert intact(crowded, old)


@needs_mount
def test_without_a_single_block_environments_go_as_ever(crowded: Store) -> None:
    """None is left for what a lock's file says of its holder."""
    packed = tiny_environment(crowded)
    age(crowded)
    with pytest.raises(OSError, match="No space left"), open(crowded.layout.root.parent / "taken", "wb") as taken:
        while True:
            taken.write(bytes(4096))
            taken.flush()
    assert collect(crowded, 0, grace_s=0).evicted == (packed,)
    assert list(crowded.layout.chunks.glob("*/*")) == []


@needs_mount
def test_where_no_inode_can_be_freed_the_store_is_full(crowded: Store) -> None:
    environment_id = tiny_environment(crowded)
    take_all_inodes(crowded.layout.root.parent / "taken")
    with pytest.raises(StoreFull):
        collect(crowded, 0, grace_s=0)
    assert list(verify.damaged_chunks(crowded, crowded.read_manifest(environment_id))) == []
