from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worker_bootstrap import codec, founding, ready_mark
from worker_bootstrap.digest import Digest, EnvironmentId, digest_of
from worker_bootstrap.errors import ChunkInvalid, ChunkMissing, EnvironmentMissing, StoreError, StoreFull
from worker_bootstrap.layout import Layout
from worker_bootstrap.lock import Lock
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.store import PAYLOAD_LIMIT_BYTES, Store

DATA = b"content " * 100
DIGEST = digest_of(DATA)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "store")
    yield found
    assert list(found.layout.tmp.iterdir()) == []


def only_file(store: Store) -> Path:
    (path,) = store.layout.chunks.glob("*/*")
    return path


# -- chunks


def test_a_chunk_comes_back(store: Store) -> None:
    assert not store.has_chunk(DIGEST)
    assert store.missing([DIGEST, DIGEST]) == [DIGEST]
    assert store.write_chunk(DATA) == DIGEST
    assert store.has_chunk(DIGEST)
    assert store.missing([DIGEST]) == []
    assert store.read_chunk(DIGEST) == DATA


def test_a_chunk_is_written_once(store: Store) -> None:
    store.write_chunk(DATA)
    before = only_file(store).stat()
    store.write_chunk(DATA)
    store.write_encoded(DIGEST, "zlib", codec.encode(DATA, "zlib"), "peer")
    assert only_file(store).stat() == before


def test_an_empty_chunk(store: Store) -> None:
    assert store.read_chunk(store.write_chunk(b"")) == b""


@pytest.mark.parametrize("damage", [b"", b"x", b"\x28\xb5\x2f\xfd", b"\0" * 100])
def test_a_damaged_chunk_is_dropped_and_reads_as_missing(store: Store, damage: bytes) -> None:
    store.write_chunk(DATA)
    only_file(store).write_bytes(damage)
    with pytest.raises(ChunkMissing) as caught:
        store.read_chunk(DIGEST)
    assert caught.value.digest == DIGEST
    assert store.missing([DIGEST]) == [DIGEST]
    store.write_chunk(DATA)
    assert store.read_chunk(DIGEST) == DATA


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(store: Store) -> None:
    store.write_chunk(DATA)
    path = only_file(store)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ChunkMissing):
        store.read_chunk(DIGEST)
    store.write_chunk(DATA)
    assert store.read_chunk(DIGEST) == DATA


def test_a_chunk_under_another_name_is_dropped(store: Store) -> None:
    other = store.write_chunk(b"other")
    path = only_file(store)
    wrong = store.layout.chunk(DIGEST, path.suffix)
    wrong.parent.mkdir(exist_ok=True)
    path.rename(wrong)
    with pytest.raises(ChunkMissing):
        store.read_chunk(DIGEST)
    assert store.missing([DIGEST, other]) == [DIGEST, other]


@pytest.mark.parametrize("accept", [["zstd"], ["zlib"], []])
def test_a_file_too_large_for_a_chunk_is_never_read_into_memory(store: Store, accept: list[str]) -> None:
    path = store.layout.chunk(DIGEST, ".raw")
    path.parent.mkdir()
    path.touch()
    os.truncate(path, 1 << 40)  # sparse; reading it would end the process
    with pytest.raises(ChunkMissing):
        store.read_encoded(DIGEST, accept)
    assert not path.exists()
    assert PAYLOAD_LIMIT_BYTES < 20 << 20


def test_an_intact_copy_in_another_codec_is_found(store: Store) -> None:
    store.write_chunk(DATA, "zlib")
    damaged = store.layout.chunk(DIGEST, ".zst")
    damaged.write_bytes(b"damaged")
    assert store.read_chunk(DIGEST) == DATA
    assert not damaged.exists()


def test_a_chunk_that_this_process_cannot_decode_is_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_chunk(DATA, "zstd")
    monkeypatch.setattr(codec, "_zstandard", None)
    assert store.missing([DIGEST]) == [DIGEST]
    with pytest.raises(ChunkMissing):
        store.read_chunk(DIGEST)
    store.write_chunk(DATA)
    assert store.read_chunk(DIGEST) == DATA
    assert {path.suffix for path in store.layout.chunks.glob("*/*")} == {".zst", ".zlib"}


@pytest.mark.parametrize(("accept", "sent"), [(["zstd", "zlib"], "zstd"), (["zlib"], "zlib"), ([], "raw")])
def test_a_peer_gets_what_it_can_decode(store: Store, accept: list[str], sent: str) -> None:
    store.write_chunk(DATA, "zstd")
    name, payload = store.read_encoded(DIGEST, accept)
    assert name == sent
    assert codec.decode(payload, name, len(DATA)) == DATA


@pytest.mark.parametrize("left", [b"", b"\0" * 40])
def test_what_a_power_cut_left_of_a_chunk_is_written_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch, left: bytes
) -> None:
    """Whoever brings it again does not take the name for the chunk."""
    data = [b"one" * 100, b"two" * 100]
    digests = [store.write_chunk(each, "zlib") for each in data]
    for digest in digests:
        store.layout.chunk(digest, ".zlib").write_bytes(left)
    monkeypatch.setattr(ready_mark, "booted_at", time.time)
    store.write_chunk(data[0])
    store.write_encoded(digests[1], "zlib", codec.encode(data[1], "zlib"), "a peer")
    assert [store.read_chunk(digest) for digest in digests] == data


def test_a_chunk_from_before_the_machine_started_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_chunk(DATA)
    booted_at = only_file(store).stat().st_ctime
    while store.layout.version.stat().st_ctime <= booted_at:  # until the clock of files has gone on
        store.layout.version.touch()
    monkeypatch.setattr(ready_mark, "booted_at", lambda: booted_at)
    reads: list[Digest] = []
    read_chunk = store.read_chunk
    monkeypatch.setattr(store, "read_chunk", lambda digest: reads.append(digest) or read_chunk(digest))
    for _ in range(3):
        store.write_chunk(DATA)
    assert reads == [DIGEST]


def test_what_a_peer_sends_is_verified(store: Store) -> None:
    for name, payload in [("raw", b"wrong"), ("zstd", b"junk"), ("lzma", DATA), ("zlib", codec.encode(DATA, "zstd"))]:
        with pytest.raises(ChunkInvalid) as caught:
            store.write_encoded(DIGEST, name, payload, "tcp://peer")
        assert caught.value.where == "tcp://peer"
    assert list(store.layout.chunks.iterdir()) == []
    store.write_encoded(DIGEST, "zlib", codec.encode(DATA, "zlib"), "tcp://peer")
    assert store.read_chunk(DIGEST) == DATA


@pytest.mark.parametrize("name", ["../../../etc/passwd", "", "AB" * 32])
def test_nothing_but_a_digest_is_looked_up(store: Store, name: str) -> None:
    with pytest.raises(ValueError):
        store.read_encoded(Digest(name), [])


def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs to mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = Store(small / "store")
        with pytest.raises(StoreFull) as caught:
            for _ in range(20):
                store.write_chunk(os.urandom(30_000), "raw")
        assert caught.value.path == str(small / "store")
        assert list(store.layout.tmp.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


# -- read-only stores


def test_a_read_only_store_is_looked_in_first(tmp_path: Path) -> None:
    staged, own = Store(tmp_path / "staged"), Store(tmp_path / "own", [tmp_path / "staged"])
    staged.write_chunk(DATA)
    manifest_id = staged.write_manifest(Manifest("linux-64", "3.11.7", []))
    assert own.missing([DIGEST]) == []
    assert own.read_chunk(DIGEST) == DATA
    assert own.read_manifest(manifest_id).id == manifest_id
    assert own.environments() == [manifest_id]
    own.write_chunk(DATA)
    assert list(own.layout.chunks.iterdir()) == []


def test_a_read_only_store_may_vanish(tmp_path: Path) -> None:
    staged, own = Store(tmp_path / "staged"), Store(tmp_path / "own", [tmp_path / "staged", tmp_path / "never"])
    staged.write_chunk(DATA)
    shutil.rmtree(tmp_path / "staged")
    assert own.missing([DIGEST]) == [DIGEST]
    assert own.environments() == []
    assert own.built(EnvironmentId("0" * 64)) is None
    with pytest.raises(ChunkMissing):
        own.read_chunk(DIGEST)
    with pytest.raises(EnvironmentMissing):
        own.read_manifest(EnvironmentId("0" * 64))
    assert not (tmp_path / "never").exists()


def test_a_damaged_chunk_of_a_read_only_store_stays_there(tmp_path: Path) -> None:
    staged, own = Store(tmp_path / "staged"), Store(tmp_path / "own", [tmp_path / "staged"])
    staged.write_chunk(DATA)
    only_file(staged).write_bytes(b"damaged")
    own.write_encoded(DIGEST, "raw", DATA, "peer")
    with pytest.raises(ChunkMissing):
        own.read_chunk(DIGEST)
    assert only_file(staged).read_bytes() == b"damaged"


# -- manifests


def test_a_damaged_manifest_is_dropped_and_can_be_sent_again(store: Store) -> None:
    manifest = Manifest("linux-64", "3.11.7", [])
    store.write_manifest(manifest)
    path = store.layout.manifest(manifest.id)
    path.write_bytes(path.read_bytes().replace(b"3.11.7", b"3.11.8"))
    with pytest.raises(EnvironmentMissing):
        store.read_manifest(manifest.id)
    assert not path.exists()
    path.write_bytes(b"damaged")
    store.write_manifest(manifest)
    assert store.read_manifest(manifest.id).id == manifest.id


def test_other_files_among_the_manifests_are_no_environments(store: Store) -> None:
    (store.layout.manifests / ".nfs0001").touch()
    (store.layout.manifests / "notes.json").touch()
    assert store.environments() == []


# -- the store itself


def test_a_new_store_is_the_users_own(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        store = Store(tmp_path / "a" / "store")
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.layout.root.stat().st_mode) == 0o700


def test_the_host_id_stays(store: Store) -> None:
    assert Store(store.layout.root).host_id == store.host_id
    assert len(store.host_id) == 32


@pytest.mark.parametrize("part", ["", "tmp", "chunks", "host-id"])
def test_what_somebody_removed_is_made_again(store: Store, part: str) -> None:
    host_id = store.host_id
    path = store.layout.root / part
    path.unlink() if path.is_file() else shutil.rmtree(path)
    if part != "host-id":  # nobody needs that to keep a chunk
        assert store.write_chunk(DATA) == DIGEST
        assert store.read_chunk(DIGEST) == DATA
    store.restore()
    assert Store(store.layout.root).host_id == store.host_id == host_id


def test_all_who_come_first_at_once_agree_on_the_host_id(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from worker_bootstrap.store import Store; "
    program += "print(Store(Path(sys.argv[1])).host_id)"
    with ThreadPoolExecutor(8) as pool:
        threads = [pool.submit(lambda: Store(tmp_path / "store").host_id) for _ in range(8)]
        processes = [
            subprocess.Popen([sys.executable, "-c", program, tmp_path / "store"], stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        found = {thread.result() for thread in threads}
    found.update(process.communicate(timeout=60)[0].strip() for process in processes)
    assert len(found) == 1


def test_who_waits_for_the_host_id_takes_that_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path / "store")
    looked = threading.Event()
    look = founding._host_id

    def found_nothing_yet(layout: Layout) -> str | None:
        found = look(layout)
        looked.set()
        return found

    monkeypatch.setattr(founding, "_host_id", found_nothing_yet)
    with ThreadPoolExecutor(1) as pool:
        with Lock(layout.locks / "host-id.lock"):
            second = pool.submit(Store, layout.root)
            assert looked.wait(20)
            layout.version.write_text("1")
            layout.host_id.write_text("0" * 32)
        assert second.result().host_id == "0" * 32


@pytest.mark.parametrize("damage", ["", "x", "../../etc"])
def test_a_damaged_host_id_is_made_anew(store: Store, damage: str) -> None:
    store.layout.host_id.write_text(damage)
    again = Store(store.layout.root)
    assert len(again.host_id) == 32
    assert Store(store.layout.root).host_id == again.host_id


def test_a_store_of_another_version_is_refused(store: Store) -> None:
    store.layout.version.write_text("2")
    with pytest.raises(StoreError, match="version '2'"):
        Store(store.layout.root)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_folders_have_their_modes_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    """Those that were there before keep theirs."""
    (tmp_path / "kept").mkdir(0o711)
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "kept/made/store")
        store.write_chunk(b"content")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kept").rglob("*") if path.is_dir()}
    assert modes.pop(store.layout.root) == 0o700
    assert set(modes.values()) == {0o755} and len(modes) == len(store.layout.folders) + 2
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o711


def test_free_bytes(store: Store) -> None:
    assert 0 < store.free_bytes() <= shutil.disk_usage(store.layout.root).total
