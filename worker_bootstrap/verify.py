"""Comparing what lies in a store with what it should be: every chunk, every file of a built environment.

Reads everything, so it takes as long as the disk; on the way of a swap it is called only where
`worker_bootstrap.soundness` found something, or the machine was started anew. See also `worker_bootstrap.store`, which
verifies each chunk when it is read, and `worker_bootstrap.repair`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from worker_bootstrap import codec, soundness
from worker_bootstrap.blueprint import Blueprint, Run, draw, read_listings
from worker_bootstrap.digest import Digest, EnvironmentId, digest_of, digest_of_file
from worker_bootstrap.durable import content_of
from worker_bootstrap.errors import ChunkMissing, EnvironmentMissing
from worker_bootstrap.manifest import CHUNK_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, File, Manifest
from worker_bootstrap.relocate import relocate
from worker_bootstrap.stock import chunk_files, needed_chunks
from worker_bootstrap.store import PAYLOAD_LIMIT_BYTES, Store

BYTE_CODE_FOLDER = "__pycache__"
"""The one folder that an interpreter adds to by itself."""
ADDED = "was added"


class Damage(NamedTuple):
    """A path of a built environment that is not as it should be."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def traces(store: Store, environment_id: EnvironmentId) -> tuple[object, ...]:
    """What is another thing afterwards if an environment is evicted, or built anew: its marks and manifests, as files.

    What was found missing in between may be no damage.
    """
    paths = [
        path for layout in store.layouts for path in (layout.ready(environment_id), layout.manifest(environment_id))
    ]
    found: list[object] = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns))
    return tuple(found)


def manifest_of(store: Store, environment_id: EnvironmentId) -> Manifest | None:
    """The manifest of an environment that was here a moment ago; None if it has been evicted.

    Raises
    ------
    EnvironmentMissing, ManifestInvalid
        If it is damaged, as `Store.read_manifest`.
    """
    is_damaged = any(_is_damaged(layout.manifest(environment_id), environment_id) for layout in store.layouts)
    try:
        return store.read_manifest(environment_id)
    except EnvironmentMissing:
        if is_damaged:  # and dropped, so that it looks evicted from now on
            raise
        return None


def damaged_chunks(store: Store, manifest: Manifest, skip: Collection[Digest] = ()) -> Iterator[str]:
    """One line for each chunk of an environment, but for those to *skip*, that the store does not hold intact.

    Damaged copies in the writable store are dropped, as by any read.
    """
    for digest, size_bytes in manifest.chunks.items():
        if digest in skip:
            continue
        try:
            data = store.read_chunk(digest)
        except ChunkMissing:
            yield f"chunk {digest} is missing or damaged"
        else:
            if len(data) != size_bytes:
                yield f"chunk {digest} has {len(data)} bytes, the manifest says {size_bytes}"


def other_chunks(store: Store) -> tuple[int, list[str]]:
    """Chunks in the writable store that no environment needs: how many there are, and one line for each damaged one.

    Damaged copies are dropped.
    """
    needed = needed_chunks(store)
    copies: dict[Digest, list[Path]] = {}
    for digest, entry in chunk_files(store.layout):
        if digest not in needed:
            copies.setdefault(digest, []).append(Path(entry.path))
    problems = []
    for digest in sorted(copies):
        # What has gone since it was listed is no damage, and reading in the usual way removes what is damaged.
        if any(_is_damaged_chunk(path, digest) for path in copies[digest]):
            try:
                store.read_chunk(digest)
            except ChunkMissing:
                problems.append(f"chunk {digest} of no environment is damaged")
    return len(copies), problems


def _is_damaged(path: Path, environment_id: EnvironmentId) -> bool:
    data = content_of(path, MANIFEST_LIMIT_BYTES)
    return os.path.lexists(path) if data is None else str(digest_of(data)) != environment_id


def _is_damaged_chunk(path: Path, digest: Digest) -> bool:
    """Whether a chunk's file is there, and cannot be read as one here."""
    payload = content_of(path, PAYLOAD_LIMIT_BYTES)
    if payload is None:
        return os.path.lexists(path)
    name = next((name for name, suffix in codec.SUFFIXES.items() if suffix == path.suffix), "")
    try:
        return digest_of(codec.decode(payload, name, CHUNK_LIMIT_BYTES)) != digest
    except codec.CodecError:
        return True


def damaged_files(store: Store, environment_id: EnvironmentId, prefix: Path | None = None) -> Iterator[Damage]:
    """Each path of a built environment that is not as its manifest says: changed, missing, or added.

    Byte code that an interpreter wrote is not counted as added. With *prefix*, the environment is taken to lie there.

    Raises
    ------
    EnvironmentMissing
        If it is not built here.
    ChunkMissing
        If a listing, or a chunk of files that name their prefix, is not in the store. In the latter case, everything
        that can be told without it has been given before.
    """
    prefix = prefix or store.built(environment_id)
    if prefix is None:
        raise EnvironmentMissing(environment_id, f"{store.layout.envs} (it is not built)")
    for layout in store.layouts:
        if layout.prefix(environment_id) == prefix:
            yield from altered_byte_code(prefix, soundness.made_there(layout, environment_id) or {})
    yield from compare(store, blueprint_of(store, environment_id, prefix), prefix)


def altered_byte_code(prefix: Path, made: Mapping[str, Digest]) -> Iterator[Damage]:
    """Byte code that was *made* (path to digest) where the environment was built, and is not there any more as it was.

    That it was made at all, nobody else knows: where no inventory says so, nothing is missing.
    """
    for path, digest in made.items():
        problem = _compare_file(prefix / path, digest, executable=False)
        if problem:
            yield Damage(path, problem)


def blueprint_of(store: Store, environment_id: EnvironmentId, prefix: Path) -> Blueprint:
    """What an environment should be at *prefix*. Raises as `damaged_files`, or `ManifestInvalid`."""
    manifest = store.read_manifest(environment_id)
    return draw(manifest, read_listings(manifest, store.read_chunk), str(prefix))


def compare(store: Store, blueprint: Blueprint, prefix: Path) -> Iterator[Damage]:
    """As `damaged_files`, for an environment whose blueprint is at hand."""
    missing: ChunkMissing | None = None
    for run in blueprint.runs:
        content: bytes | None = b""
        if any(file.relocation for file in run.files):
            try:
                content = b"".join(store.read_chunk(chunk.digest) for chunk in run.chunks)
            except ChunkMissing as error:
                content, missing = None, missing or error
        for file, expected in _expected(run, content, str(prefix)):
            # One that names its prefix has another size in each.
            size_bytes = None if file.relocation else file.size_bytes
            problem = _compare_file(prefix / file.path, expected, file.executable, size_bytes)
            if problem:
                yield Damage(file.path, problem)
    yield from _compare_names(prefix, blueprint)
    yield from _added(prefix, blueprint)
    if missing is not None:
        raise missing


def _expected(run: Run, content: bytes | None, prefix: str) -> Iterator[tuple[File, Digest | None]]:
    """Each file of a run with the digest that it should have at *prefix*; None where that takes unknown *content*."""
    position = 0
    for file in run.files:
        if file.relocation is None:
            yield file, file.digest
        elif content is None:
            yield file, None
        else:
            yield file, digest_of(relocate(content[position : position + file.size_bytes], file.relocation, prefix))
        position += file.size_bytes


def _compare_file(path: Path, expected: Digest | None, executable: bool, size_bytes: int | None = None) -> str:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return "is no regular file"
        if size_bytes is not None and found.st_size != size_bytes:
            return "has other content"  # not read: it may have grown beyond all measure
        actual = None if expected is None else digest_of_file(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if actual != expected:
        return "has other content"
    if bool(found.st_mode & stat.S_IXUSR) != executable:
        return "has become executable" if not executable else "is not executable any more"
    return ""


def _compare_names(prefix: Path, blueprint: Blueprint) -> Iterator[Damage]:
    for link in blueprint.links:
        path = prefix / link.path
        if not _leads_to(path, link.target):
            yield Damage(link.path, f"is not the link to {link.target} any more")
    for hard_link in blueprint.hard_links:
        path, target = prefix / hard_link.path, prefix / hard_link.target
        if not _is_same(path, target):
            yield Damage(hard_link.path, f"is not the same file as {hard_link.target} any more")
    for directory in blueprint.directories:
        path = prefix / directory
        if path.is_symlink() or not path.is_dir():
            yield Damage(directory, "is no folder" if os.path.lexists(path) else "is missing")


def _leads_to(path: Path, target: str) -> bool:
    try:
        return os.readlink(path) == target
    except OSError:
        return False


def _is_same(path: Path, target: Path) -> bool:
    try:
        return path.samefile(target)
    except OSError:
        return False


def _added(prefix: Path, blueprint: Blueprint) -> Iterator[Damage]:
    known = {file.path for run in blueprint.runs for file in run.files}
    known.update(link.path for link in blueprint.links)
    known.update(link.path for link in blueprint.hard_links)
    for folder, folders, names in os.walk(prefix):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*names, *links):
            path = os.path.relpath(os.path.join(folder, name), prefix)
            if path not in known and BYTE_CODE_FOLDER not in path.split("/"):
                yield Damage(path, ADDED)
