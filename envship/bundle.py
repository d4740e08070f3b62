"""One file holding a manifest and all its chunks: what one copies, archives, or hands to an admin.

``docs/format.md`` gives the format byte for byte. Written and read as a stream. Nothing in it is believed: every
chunk is checked against its name, and the file must hold exactly what its manifest asks for.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

from envship.errors import ExportError, SourceNotFound
from worker_bootstrap import codec
from worker_bootstrap.bundle_index import (
    CODECS,
    END,
    LENGTH,
    MAGIC,
    RECORD,
    Extent,
    exactly,
    opened,
    read_manifest,
    read_record,
    survey,
)
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.errors import BundleInvalid, ChunkInvalid, ManifestInvalid
from worker_bootstrap.manifest import CHUNK_LIMIT_BYTES, Manifest
from worker_bootstrap.store import Store, sync_folder

SUFFIX = ".envship"
_WINDOW = 8
"""Chunks checked at once, and held in memory."""


def write_bundle(manifest: Manifest, store: Store, path: Path) -> None:
    """Write *manifest* and its chunks, from *store*, to *path*. All or nothing: an older file is replaced at the end.

    Raises
    ------
    ChunkMissing
        If the store lacks a chunk, or holds it damaged.
    ExportError
        If it cannot be written there: no room, no permission.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExportError.of(error, path) from error
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, manifest, store)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ExportError.of(error, path) from error
        raise


def bundle_at(source: object) -> str | None:
    """Where the bundle is that a user means by *source*, as an absolute path or a URL; None if it means no bundle."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    text = os.fspath(source)
    if not isinstance(text, str) or not text.endswith(SUFFIX) or os.path.isdir(text):
        return None
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def survey_bundle(where: str) -> tuple[Manifest, dict[Digest, Extent]]:
    """`worker_bootstrap.bundle_index.survey`, where there is such a file.

    Raises
    ------
    SourceNotFound
        If there is none that this machine can read.
    BundleInvalid
        As `read_bundle`, but for chunks that are damaged.
    """
    try:
        return survey(where)
    except OSError as error:
        raise SourceNotFound(where, [f"{where} ({error.strerror or error})"]) from error


def read_bundle(path: Path | str, store: Store) -> Manifest:
    """Bring the bundle at *path* (or URL) into *store*, checking every chunk; return its manifest.

    Raises
    ------
    BundleInvalid
        If the file is no bundle, is damaged, cut short, or holds anything that its manifest does not ask for. Chunks
        before the fault stay in the store; the environment does not.
    StoreFull
        If there is no room.
    """
    try:
        with opened(str(path)) as file, store.adding():
            manifest = read_manifest(file, str(path))
            with ThreadPoolExecutor(max_workers=2) as pool:
                _in_order(pool, _read_chunks(file, path, manifest, store))
            if file.read(len(END) + 1) != END:
                raise BundleInvalid(str(path), "it does not end where it should")
            store.write_manifest(manifest)
    except (ManifestInvalid, ChunkInvalid) as error:
        raise BundleInvalid(str(path), str(error)) from error
    return manifest


def _write(file: BinaryIO, manifest: Manifest, store: Store) -> None:
    data = manifest.to_bytes()
    file.write(MAGIC + LENGTH.pack(len(data)) + data)
    with ThreadPoolExecutor(max_workers=2) as pool:
        window: deque[Future[tuple[Digest, str, bytes]]] = deque()
        for digest in manifest.chunks:
            window.append(pool.submit(_sound, store, digest))
            if len(window) == _WINDOW:
                _write_chunk(file, *window.popleft().result())
        for future in window:
            _write_chunk(file, *future.result())
    file.write(END)


def _sound(store: Store, digest: Digest) -> tuple[Digest, str, bytes]:
    """A chunk as it lies in the store, if it is sound."""
    codec_name, payload = store.read_encoded(digest, CODECS)
    try:
        is_sound = digest_of(codec.decode(payload, codec_name, CHUNK_LIMIT_BYTES)) == digest
    except codec.CodecError:
        is_sound = False
    if not is_sound:
        # Reading drops the damaged copy, and finds another one or raises.
        codec_name, payload = "raw", store.read_chunk(digest)
    return digest, codec_name, payload


def _write_chunk(file: BinaryIO, digest: Digest, codec_name: str, payload: bytes) -> None:
    file.write(RECORD.pack(bytes.fromhex(digest), CODECS.index(codec_name), len(payload)))
    file.write(payload)


def _read_chunks(file: BinaryIO, path: Path | str, manifest: Manifest, store: Store) -> Iterator[Callable[[], None]]:
    """Read the chunks, in the order of the manifest; yield what checks and keeps each."""
    for expected in manifest.chunks:
        codec_number, size_bytes = read_record(file, str(path), expected)
        payload = exactly(file, size_bytes, str(path))
        yield partial(store.write_encoded, expected, CODECS[codec_number], payload, str(path))


def _in_order(pool: ThreadPoolExecutor, tasks: Iterator[Callable[[], None]]) -> None:
    """Run *tasks* in *pool*, a bounded number at a time; raise the first error."""
    window: deque[Future[None]] = deque()
    for task in tasks:
        window.append(pool.submit(task))
        if len(window) == _WINDOW:
            window.popleft().result()
    for future in window:
        future.result()
