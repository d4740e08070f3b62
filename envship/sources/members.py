"""The members of an archive, one after the other, whatever kind it is of: tar in five compressions, and zip.

Read as a stream, so that an archive needs no more memory than its largest header, and that is bounded. What the
members may be is decided by `envship.sources.archive`.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

import zstandard

DAMAGES = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError),
    # A zip that is encrypted or compressed in an unknown way; headers with impossible values.
    *(RuntimeError, ValueError),
)
"""What reading the members of a damaged archive raises."""

_PIECE_BYTES = 1 << 20
_TAR_BLOCK_BYTES = 512
_HEADER_LIMIT_BYTES = 8 << 20


class Content(Protocol):
    """The bytes of a member."""

    def read(self, size_bytes: int, /) -> bytes: ...
    def __enter__(self) -> Content: ...
    def __exit__(self, *error: Any) -> None: ...


class Member(NamedTuple):
    """An entry. *kind* is as in ``stat`` (``S_IFREG``…), 0 for what has no place in an environment.

    *target* is where a link leads; for an ``S_IFREG``, the member that it is another name of. *open* gives the content,
    as long as the next member has not been asked for.
    """

    name: str
    kind: int
    mode: int
    target: str
    open: Callable[[], Content]


def opener(path: Path) -> Callable[[], Iterator[Member]] | None:
    """What yields the members of the archive at *path*; None if it begins as no archive of a known kind does."""
    with open(path, "rb") as file:
        begin = file.read(300)
    if begin.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return functools.partial(_zip_members, path)
    for magic, decompress in _DECOMPRESS.items():
        if begin.startswith(magic):
            return functools.partial(_tar_members, path, decompress)
    return functools.partial(_tar_members, path, _plain) if begin[257:262] == b"ustar" else None


def _plain(file: IO[bytes]) -> IO[bytes]:
    return file


def _zstd(file: IO[bytes]) -> IO[bytes]:
    reader: IO[bytes] = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return reader


_DECOMPRESS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}


class _Tail:
    """A stream that remembers its last block: no decompressor says where a tar was cut short, its end mark does.

    *room_bytes* is what may be read before the next member must have come: tarfile holds a header in memory, whatever
    its size.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.block = b""
        self.room_bytes = _HEADER_LIMIT_BYTES

    def read(self, size_bytes: int) -> bytes:
        data = self._stream.read(size_bytes)
        self.room_bytes -= len(data)
        if self.room_bytes < 0:
            raise tarfile.TarError(f"a header has more than {_HEADER_LIMIT_BYTES} bytes")
        if data:
            self.block = (self.block + data)[-_TAR_BLOCK_BYTES:]
        return data


def _tar_members(path: Path, decompress: Callable[[IO[bytes]], IO[bytes]]) -> Iterator[Member]:
    with open(path, "rb") as file:
        tail = _Tail(decompress(file))
        with tarfile.open(fileobj=cast(Any, tail), mode="r|", errorlevel=2, bufsize=1 << 18) as archive:
            for info in archive:
                tail.room_bytes = _HEADER_LIMIT_BYTES + info.size
                yield _tar_member(archive, info)
                # Nothing of the past is looked up again, and the list of it would grow with the archive.
                archive.members = []  # type: ignore[attr-defined]
        while tail.read(_PIECE_BYTES):
            pass
        if tail.block.strip(b"\0") or len(tail.block) < _TAR_BLOCK_BYTES:
            raise EOFError


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    is_link = info.issym() or info.islnk()
    kind = stat.S_IFREG if info.isreg() or info.islnk() else stat.S_IFLNK if info.issym() else 0
    return Member(
        name=info.name,
        kind=stat.S_IFDIR if info.isdir() else kind,
        mode=info.mode,
        target=info.linkname if is_link else "",
        open=functools.partial(_Whole, archive, info),
    )


class _Whole:
    """The content of a member of a tar; reading less of it than its header says is an error."""

    def __init__(self, archive: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        file = archive.extractfile(info)
        if file is None:
            raise tarfile.TarError(f"{info.name} has no content")
        self._file = file
        self._rest_bytes = info.size

    def read(self, size_bytes: int) -> bytes:
        data = self._file.read(size_bytes)
        self._rest_bytes -= len(data)
        if not data and self._rest_bytes > 0:
            raise EOFError
        return data

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            kind = stat.S_IFMT(mode) or (stat.S_IFDIR if info.is_dir() else stat.S_IFREG)
            kind = kind if kind in (stat.S_IFDIR, stat.S_IFLNK, stat.S_IFREG) else 0
            yield Member(info.filename, kind, mode, "", functools.partial(archive.open, info))
