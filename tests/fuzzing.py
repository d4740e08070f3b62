"""What has to hold whatever bytes a reader is given: it reads them, or raises one of our errors; nothing else.

Used by `tests/fuzzed.py`, and by `tests/fuzz/coverage_guided.py` with inputs that a coverage-guided fuzzer finds.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envship.bundle import END, MAGIC, read_bundle
from envship.errors import ArchiveInvalid, NotAnEnvironment, SourceProblems
from envship.sources.archive import unpacked
from tests.environments import environment_of
from tests.snapshots import changes, snapshot
from worker_bootstrap import codec
from worker_bootstrap.blueprint import draw
from worker_bootstrap.bundle_index import RECORD, survey
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.errors import BundleInvalid, EnvshipError, ManifestInvalid, MaterialiseError
from worker_bootstrap.manifest import Chunk, Listing, Manifest, Package
from worker_bootstrap.materialise import materialise
from worker_bootstrap.relocate import relocate
from worker_bootstrap.store import Store

CHUNK_BYTES = 1 << 20
PREFIX = "/a/prefix"
SHORT_PREFIX = "/q"
"""Fits in the place of every placeholder that is tried, and neither holds nor completes one."""


def read_any_manifest(data: bytes) -> None:
    """A manifest that is read has one spelling, and names chunks by digests only."""
    try:
        manifest = Manifest.from_bytes(data)
    except ManifestInvalid:
        return
    assert manifest.to_bytes() == data
    assert manifest.id == digest_of(data)
    assert all(len(digest) == 64 and 0 <= size <= 16 << 20 for digest, size in manifest.chunks.items())


def read_any_listing(data: bytes) -> None:
    """A listing that is read has one spelling, and what is drawn of it stays inside of the prefix."""
    try:
        listing = Listing.from_bytes(data)
    except ManifestInvalid:
        return
    assert listing.to_bytes() == data
    size_bytes = sum(file.size_bytes for file in listing.files)
    chunks = tuple(Chunk(digest_of(b""), min(size_bytes - done, 1 << 24)) for done in range(0, size_bytes, 1 << 24)[:9])
    package = Package("p", "1", "0", "files", Chunk(digest_of(data), len(data)), chunks)
    try:
        blueprint = draw(Manifest("linux-64", "3", [package]), [listing], PREFIX)
    except (ManifestInvalid, MaterialiseError):
        return
    made = set(blueprint.directories)
    for path in (*blueprint.directories, *(file.path for run in blueprint.runs for file in run.files)):
        assert not path.startswith("/") and not {"", ".", ".."} & set(path.split("/"))
    for link in (*blueprint.links, *blueprint.hard_links):
        assert not link.path.startswith("/") and not link.target.startswith("/")
        assert link.path not in made


def read_any_chunk(data: bytes) -> None:
    """A payload gives at most as many bytes as were allowed."""
    for name in codec.available():
        for limit_bytes in (0, 100, CHUNK_BYTES):
            try:
                assert len(codec.decode(data, name, limit_bytes)) <= limit_bytes
            except codec.CodecError:
                continue


def read_any_bundle(data: bytes) -> None:
    """A bundle that is read is one that we would write; one that is refused leaves no environment.

    Both readers say the same of what the file holds; what is built of it lies inside of its prefix, or nothing is.
    """
    with tempfile.TemporaryDirectory(prefix="envship-fuzz-") as name:
        folder = Path(name)
        (folder / "outside").mkdir()
        store = Store(folder / "store")
        path = folder / "fuzzed.envship"
        path.write_bytes(data)
        try:
            manifest = read_bundle(path, store)
        except BundleInvalid:
            assert store.environments() == []
        else:
            _check_bundle(data, path, manifest)
            assert all(digest_of(store.read_chunk(digest)) == digest for digest in manifest.chunks)
            build_inside(store, manifest.id)
        assert path.read_bytes() == data
        assert sorted(os.listdir(folder)) == ["fuzzed.envship", "outside", "store"]
        assert os.listdir(folder / "outside") == os.listdir(store.layout.tmp) == []


def _check_bundle(data: bytes, path: Path, manifest: Manifest) -> None:
    raw = manifest.to_bytes()
    end = MAGIC + struct.pack(">Q", len(raw)) + raw
    assert data.startswith(end)
    position = len(end)
    same, extents = survey(str(path))
    assert same.id == manifest.id
    assert list(extents) == list(manifest.chunks)
    for digest, extent in extents.items():
        assert data[position : position + 32].hex() == digest
        assert extent.offset == position + RECORD.size
        position = extent.offset + extent.size_bytes
    assert data[position:] == END


def build_any_tree(rows: list[Any]) -> None:
    """An environment with this listing is built inside of its prefix, or not at all."""
    folder = Path(tempfile.mkdtemp(prefix="envship-fuzz-"))
    try:
        (folder / "outside").mkdir()
        store = Store(folder / "s")
        raw = json.dumps(rows, sort_keys=True, separators=(",", ":")).encode()
        package = Package("p", "1", "0", "files", Chunk(store.write_chunk(raw), len(raw)), ())
        build_inside(store, environment_of(store, [package]).id)
        assert sorted(os.listdir(folder)) == ["outside", "s"]
        assert os.listdir(folder / "outside") == os.listdir(store.layout.tmp) == []
    finally:
        shutil.rmtree(folder)


def build_inside(store: Store, environment_id: EnvironmentId) -> None:
    """Every link of what is built, however many others it leads through, ends in the prefix."""
    try:
        prefix = materialise(store, environment_id)
    except EnvshipError:
        assert list(store.layout.envs.iterdir()) == []
        return
    assert os.listdir(store.layout.envs) == [prefix.name]
    for path in prefix.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        assert prefix in (prefix / os.path.realpath(path)).parents or os.path.realpath(path) == str(prefix)


def unpack_any_archive(members: Sequence[tuple[str, bytes, str]]) -> None:
    """What is unpacked lies in a folder of its own, and each link, however many others it leads through, ends there.

    *members*: a name, a type as `tarfile` has it, and where a link leads.
    """
    with tempfile.TemporaryDirectory(prefix="envship-fuzz-") as name:
        folder = Path(name)
        (folder / "outside").mkdir()
        (folder / "outside/secret").write_bytes(b"secret")
        store = Store(folder / "store")
        with tarfile.open(folder / "env.tar", "w") as tar:
            for path, kind, target in [("bin/python", tarfile.REGTYPE, ""), *members]:
                info = tarfile.TarInfo(path)
                info.type, info.linkname = kind, target
                tar.addfile(info)
        before = snapshot(folder, [store.layout.root])
        try:
            with unpacked(folder / "env.tar", store.layout.tmp) as prefix:
                (scratch,) = store.layout.tmp.iterdir()
                for found in scratch.rglob("*"):
                    assert (os.path.realpath(found) + "/").startswith(f"{prefix}/")
        except (ArchiveInvalid, SourceProblems, NotAnEnvironment):
            pass
        assert changes(before, folder, [store.layout.root]) == []


def relocate_anything(data: bytes, placeholder: str, mode: str) -> None:
    """Relocation ends, leaves no placeholder, and keeps the size of what is binary."""
    rows = [["f", "a", len(data), digest_of(data), 0, mode, placeholder]]
    try:
        listing = Listing.from_bytes(json.dumps(rows, separators=(",", ":")).encode())
    except ManifestInvalid:
        return
    (file,) = listing.files
    assert file.relocation is not None
    try:
        moved = relocate(data, file.relocation, SHORT_PREFIX)
    except ManifestInvalid:
        assert mode == "text"
        return
    assert os.fsencode(placeholder) not in moved
    if mode == "binary":
        assert len(moved) == len(data)


TARGETS: dict[str, Any] = {
    "manifest": read_any_manifest,
    "listing": read_any_listing,
    "chunk": read_any_chunk,
    "bundle": read_any_bundle,
}
