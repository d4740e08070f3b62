"""What has to hold whatever bytes a reader is given: it reads them, or raises one of our errors; nothing else.

Used by `tests/test_fuzz.py`, and by `tests/fuzz/coverage_guided.py` with inputs that a coverage-guided fuzzer finds.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from envship.bundle import END, MAGIC, read_bundle
from worker_bootstrap import codec
from worker_bootstrap.blueprint import draw
from worker_bootstrap.digest import digest_of
from worker_bootstrap.errors import BundleInvalid, EnvshipError, ManifestInvalid, MaterialiseError
from worker_bootstrap.manifest import Chunk, Listing, Manifest, Package
from worker_bootstrap.relocate import relocate
from worker_bootstrap.store import Store

CHUNK_BYTES = 1 << 20
PREFIX = "/a/prefix"


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


def read_any_bundle(data: bytes, folder: Path) -> None:
    """A bundle that is read is one that we would write; one that is refused leaves no environment."""
    store = Store(folder / "store")
    path = folder / "fuzzed.envship"
    path.write_bytes(data)
    before = store.environments()
    try:
        manifest = read_bundle(path, store)
    except BundleInvalid:
        assert store.environments() == before
        return
    raw = manifest.to_bytes()
    assert data.startswith(MAGIC + struct.pack(">Q", len(raw)) + raw) and data.endswith(END)
    assert all(digest_of(store.read_chunk(digest)) == digest for digest in manifest.chunks)


def relocate_anything(data: bytes, placeholder: str, mode: str) -> None:
    """Relocation ends, keeps the size of what is binary, and leaves no placeholder in it."""
    rows = [["f", "a", len(data), digest_of(data), 0, mode, placeholder]]
    try:
        listing = Listing.from_bytes(json.dumps(rows, separators=(",", ":")).encode())
        (file,) = listing.files
        assert file.relocation is not None
        moved = relocate(data, file.relocation, PREFIX)
    except (EnvshipError, ValueError) as error:
        assert isinstance(error, EnvshipError) or mode == "binary"
        return
    if mode == "binary":
        assert len(moved) == len(data)


TARGETS: dict[str, Any] = {
    "manifest": read_any_manifest,
    "listing": read_any_listing,
    "chunk": read_any_chunk,
    "bundle": read_any_bundle,
}
