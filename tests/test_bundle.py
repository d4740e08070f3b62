"""Bundles: what goes in comes out, and nothing else does."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from envship.bundle import END, MAGIC, read_bundle, write_bundle
from envship.environment import Environment
from envship.errors import ExportError, SourceNotFound
from worker_bootstrap.errors import BundleInvalid, ChunkMissing, ManifestInvalid
from worker_bootstrap.manifest import Chunk, Manifest, Package
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store

from .environments import environment_of, package_of
from .hostile import OUT, aimed, packed, surrounded


@pytest.fixture
def original(store: Store) -> Environment:
    chance = random.Random(7)
    files = {f"file{number}": chance.randbytes(300) + b"text" * 100 for number in range(20)}
    return Environment(environment_of(store, [package_of(store, files, chunk_bytes=1000)]), store)


@pytest.fixture
def bundle(original: Environment, tmp_path: Path) -> Path:
    return original.save(tmp_path / "it.envship")


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


@pytest.fixture
def watched(bundle: Path, tmp_path: Path, other: Store) -> Iterator[None]:
    """The test fails if it changes anything but the bundle, where it is from, and what is added to the other store."""
    with surrounded(tmp_path, other, without=[bundle.name, "store"]):
        yield


def test_a_bundle_brings_the_whole_environment(bundle: Path, original: Environment, other: Store) -> None:
    loaded = Environment.load(bundle, other)
    assert loaded == original
    assert {digest: other.read_chunk(digest) for digest in loaded.chunks} == {
        digest: original.store.read_chunk(digest) for digest in original.chunks
    }


def test_the_format_is_the_documented_one(bundle: Path, original: Environment) -> None:
    data = bundle.read_bytes()
    manifest = original.manifest.to_bytes()
    start = b"ENVSHIP\x01" + struct.pack(">Q", len(manifest)) + manifest
    assert data.startswith(start)
    digest, codec, _ = struct.unpack_from(">32sBI", data, len(start))
    assert digest.hex() == next(iter(original.chunks))
    assert codec in (0, 1, 2)
    assert data.endswith(b"ENVSHIP\xff")


@pytest.mark.usefixtures("watched")
def test_any_cut_is_found(bundle: Path, other: Store) -> None:
    data = bundle.read_bytes()
    before = other.environments()
    for length in (0, 4, 8, 12, 16, 100, len(data) // 2, len(data) - 9, len(data) - 1):
        bundle.write_bytes(data[:length])
        with pytest.raises(BundleInvalid):
            read_bundle(bundle, other)
    assert other.environments() == before


@pytest.mark.usefixtures("watched")
def test_any_flipped_byte_is_found(bundle: Path, other: Store) -> None:
    before = other.environments()
    data = bytearray(bundle.read_bytes())
    chance = random.Random(1)
    for place in {*range(20), *(chance.randrange(len(data)) for _ in range(150)), len(data) - 1}:
        data[place] ^= 0x40
        bundle.write_bytes(data)
        with pytest.raises(BundleInvalid):
            read_bundle(bundle, other)
        data[place] ^= 0x40
    assert other.environments() == before


@pytest.mark.usefixtures("watched")
def test_anything_more_than_the_manifest_asks_for_is_refused(bundle: Path, other: Store) -> None:
    data = bundle.read_bytes()
    extra = hashlib.sha256(b"extra").digest() + struct.pack(">BI", 0, 5) + b"extra"
    for more in (data + b"\0", data + data, data[: -len(END)] + extra + END):
        bundle.write_bytes(more)
        with pytest.raises(BundleInvalid):
            read_bundle(bundle, other)


@pytest.mark.usefixtures("watched")
def test_lying_sizes_are_refused_before_they_are_believed(bundle: Path, other: Store, original: Environment) -> None:
    bundle.write_bytes(MAGIC + struct.pack(">Q", 1 << 50))
    with pytest.raises(BundleInvalid, match="claims"):
        read_bundle(bundle, other)
    manifest = original.manifest.to_bytes()
    digest = bytes.fromhex(next(iter(original.chunks)))
    for codec, size in ((0, 0xFFFFFFFF), (9, 10)):
        chunk = digest + struct.pack(">BI", codec, size)
        bundle.write_bytes(MAGIC + struct.pack(">Q", len(manifest)) + manifest + chunk + b"x" * 10)
        with pytest.raises(BundleInvalid, match="claims"):
            read_bundle(bundle, other)


@pytest.mark.parametrize("name", OUT)
@pytest.mark.usefixtures("watched")
def test_an_environment_that_leaves_its_prefix_comes_by_a_bundle(
    bundle: Path, store: Store, other: Store, name: str
) -> None:
    """The bundle is as it should be, all digests are right: only the listing is not, and nothing is built of it."""
    _, rows = aimed(other, OUT[name])
    write_bundle(store.read_manifest(packed(store, rows)), store, bundle)
    environment = Environment.load(bundle, other)
    with pytest.raises(ManifestInvalid):
        materialise(other, environment.id)
    assert other.built(environment.id) is None
    assert list(other.layout.tmp.iterdir()) == []


HOSTILE_DIGESTS = ["../../../../outside/secret", "/etc/passwd", "", "x" * 64, "A" * 64, "0" * 63 + "/"]


@pytest.mark.parametrize("digest", HOSTILE_DIGESTS)
@pytest.mark.usefixtures("watched")
def test_a_bundle_whose_manifest_names_chunks_by_paths(bundle: Path, other: Store, digest: str) -> None:
    before = other.environments()
    chunk = Chunk(digest, 1)  # type: ignore[arg-type]
    data = Manifest("linux-64", "3", [Package("evil", "1", "0", "files", chunk, ())]).to_bytes()
    record = bytes(32) + struct.pack(">BI", 0, 1) + b"x"
    bundle.write_bytes(MAGIC + struct.pack(">Q", len(data)) + data + record + END)
    with pytest.raises(BundleInvalid):
        read_bundle(bundle, other)
    assert other.environments() == before


def test_files_that_are_no_bundle_are_refused(tmp_path: Path, other: Store) -> None:
    (tmp_path / "text").write_text("hello, this is no bundle at all")
    with pytest.raises(BundleInvalid):
        Environment.load(tmp_path / "text", other)
    with pytest.raises(SourceNotFound):
        Environment.load(tmp_path / "none", other)
    with pytest.raises(SourceNotFound):
        Environment.load(tmp_path, other)


def test_saving_finds_damage_and_leaves_the_older_bundle(bundle: Path, original: Environment) -> None:
    before = bundle.read_bytes()
    path = next(original.store.layout.chunks.rglob("*.zst"))
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    with pytest.raises(ChunkMissing):
        original.save(bundle)
    assert bundle.read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir() if path.is_file()] == ["it.envship"]


def test_a_full_disk_is_said(original: Environment, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    import os

    def full(source: str, target: Path) -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"x")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ExportError, match="No space left on device"):
        patch.setattr(os, "replace", full)
        original.save(tmp_path / "never.envship")
    assert not list(tmp_path.glob("*never*"))


def test_a_bundle_is_saved_in_the_users_home(
    original: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert original.save("~/mine.envship") == tmp_path / "mine.envship"
    assert Environment.load("~/mine.envship").id == original.id
