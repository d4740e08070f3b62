"""From the draft of a package to its listing and chunks: reads, cuts, and hands what is cut to whoever keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

from envship.canonical import Content
from envship.chunking import LIMIT_BYTES, PROJECT_AVERAGE_BYTES, PROJECT_LIMIT_BYTES, Cutter, is_large
from envship.code_ahead import CodeAhead
from envship.large_files import is_streamed
from envship.reading import Reader
from envship.sources.draft import CodeItem, Draft, FileItem, Item, MadeItem
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.manifest import Chunk, Entry, File, Listing

Keep = Callable[[bytes | memoryview, Digest | None], Future[Chunk]]
"""Keeps a chunk, given its bytes and its digest where that is known already."""


class Packed(NamedTuple):
    """What became of a package: its listing, and its content."""

    listing: Chunk
    chunks: tuple[Chunk, ...]


class PackageWriter:
    """Writes packages one after the other.

    Parameters
    ----------
    reader
        Reads their files.
    code
        Has their byte code.
    keep
        Keeps a chunk; may take its time, and bounds how many wait.
    done
        Told the size of every file on disk when it is read; may raise to end the work.
    """

    def __init__(self, reader: Reader, code: CodeAhead, keep: Keep, done: Callable[[int], None]) -> None:
        self._reader = reader
        self._code = code
        self._keep = keep
        self._done = done

    def write(self, draft: Draft) -> Packed:
        """The package, all its chunks kept. What cannot be read is noted by the reader, and left out."""
        stream = _ChunkStream(self._keep, _cutter(draft))
        entries: list[Entry] = []
        items = list(draft.in_order())
        codes = self._code.each(items)
        for item in items:
            entry = self._entry(item, codes, stream)
            if entry is not None:
                entries.append(entry)
            if isinstance(item, FileItem):
                self._done(item.node.st_size)
        chunks = stream.finish()
        listing = Listing(entries).to_bytes()
        return Packed(self._keep(listing, None).result(), chunks)

    def _entry(self, item: Item, codes: Iterator[bytes | None], stream: _ChunkStream) -> Entry | None:
        if isinstance(item, FileItem):
            executable = bool(item.node.st_mode & 0o100)
            if is_streamed(item.node.st_size, item.treatment):
                return self._large(item, executable, stream)
            content = self._reader.content(item)
            return None if content is None else _file(item.path, content, executable, stream)
        if isinstance(item, CodeItem):
            code = next(codes)
            return None if code is None else _file(item.path, Content(code, None), False, stream)
        if isinstance(item, MadeItem):
            return _file(item.path, Content(item.data, None), False, stream)
        return item

    def _large(self, item: FileItem, executable: bool, stream: _ChunkStream) -> Entry | None:
        try:
            content = self._reader.large_content(item)
            digest, size_bytes = stream.add_pieces(content.pieces)
        except OSError as error:
            self._reader.note(item, error)
            return None
        return File(item.path, size_bytes, digest, executable, content.relocation)


class _ChunkStream:
    """The content of one package, cut and handed to *keep* as it comes."""

    def __init__(self, keep: Keep, cutter: Cutter) -> None:
        self._keep = keep
        self._cutter = cutter
        self._open: list[bytes] = []
        self._chunks: list[Future[Chunk]] = []

    def add(self, data: bytes, digest: Digest) -> None:
        """Add a file."""
        if self._cutter.cuts_before(len(data)):
            self._flush(None)
        if is_large(len(data)):
            if len(data) <= LIMIT_BYTES:
                self._chunks.append(self._keep(data, digest))
                return
            view = memoryview(data)
            for start in range(0, len(data), LIMIT_BYTES):
                self._chunks.append(self._keep(view[start : start + LIMIT_BYTES], None))
            return
        self._open.append(data)
        if self._cutter.cuts_after(digest, len(data)):
            self._flush(digest)

    def add_pieces(self, pieces: Iterator[bytes]) -> tuple[Digest, int]:
        """Add a large file that comes in pieces of `LIMIT_BYTES`; return its digest and size."""
        state, size_bytes = hashlib.sha256(), 0
        if self._cutter.cuts_before(LIMIT_BYTES):
            self._flush(None)
        for piece in pieces:
            state.update(piece)
            size_bytes += len(piece)
            self._chunks.append(self._keep(piece, None))
        return Digest(state.hexdigest()), size_bytes

    def finish(self) -> tuple[Chunk, ...]:
        """All chunks, kept."""
        self._flush(None)
        return tuple(future.result() for future in self._chunks)

    def _flush(self, last: Digest | None) -> None:
        """End the open chunk; *last* is the digest of its last file."""
        parts = [part for part in self._open if part]
        self._open.clear()
        if len(parts) == 1:
            self._chunks.append(self._keep(parts[0], last if len(parts[0]) else None))
        elif parts:
            self._chunks.append(self._keep(b"".join(parts), None))


def _cutter(draft: Draft) -> Cutter:
    return Cutter(PROJECT_AVERAGE_BYTES, PROJECT_LIMIT_BYTES) if draft.kind == "project" else Cutter()


def _file(path: str, content: Content, executable: bool, stream: _ChunkStream) -> File:
    digest = content.digest or digest_of(content.data)
    stream.add(content.data, digest)
    return File(path, len(content.data), digest, executable, content.relocation)
