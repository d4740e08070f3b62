"""From an environment in a store to an archive that conda-pack could have made.

The other way round than `envship.sources.archive`. Content goes from chunk to archive as it is, with its placeholders;
conda-pack itself adds ``bin/activate`` and ``bin/conda-unpack``, which knows where they stand. The same environment
gives the same archive, byte for byte. See also `envship.bundle`, which clusters need, and which is much quicker.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

import zstandard
from conda_pack.core import Packer, rewrite_shebang

from envship.errors import ExportError
from envship.sources.unpacked import SCRIPT
from worker_bootstrap.manifest import Directory, Entry, File, HardLink, Link, Listing, Manifest, Package
from worker_bootstrap.store import Store

SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar", ".zip")
"""What an archive's name may end with."""

_STATE = "conda-meta/state"
"""Where conda keeps the variables of an environment that activating it sets."""
_GZIP_LEVEL = 4
_ZSTD_LEVEL = 3
_TIME_S = 315_532_800
"""1980, the first time that a zip can hold: no file in an environment has a time of its own."""


class _Archive(Protocol):
    def file(self, path: str, content: IO[bytes], size_bytes: int, executable: bool) -> None: ...
    def link(self, path: str, target: str) -> None: ...
    def hard_link(self, path: str, target: str) -> None: ...
    def folder(self, path: str) -> None: ...


def export(manifest: Manifest, store: Store, target: Path) -> None:
    """Write the environment to *target*, all or nothing; its suffix says what kind of archive.

    Raises
    ------
    ExportError
        If the suffix is none of `SUFFIXES`, it cannot be written there (no room, no permission), or the environment has
        a file of its own in the place of conda-unpack.
    ChunkMissing
        If the store lost a chunk: pack again.
    """
    if not target.name.endswith(SUFFIXES):
        raise ExportError(str(target), f"its name ends with none of {', '.join(SUFFIXES)}")
    tmp = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        handle = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise ExportError.of(error, target) from error
    try:
        with open(handle, "wb") as file:
            with _opened(file, target.name) as archive:
                _Export(manifest, store, target, archive).run()
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, target)
    except UnicodeEncodeError as error:
        raise ExportError(str(target), f"a zip cannot hold the name {error.object!r}; write a .tar.gz") from error
    except OSError as error:
        raise ExportError.of(error, target) from error
    finally:
        tmp.unlink(missing_ok=True)


class _Export:
    def __init__(self, manifest: Manifest, store: Store, target: Path, archive: _Archive) -> None:
        self._manifest = manifest
        self._store = store
        self._target = target
        self._archive = archive
        self._scripts = _Scripts(archive)
        self._packer = Packer("", self._scripts)

    def run(self) -> None:
        listings = [
            (package, Listing.from_bytes(self._store.read_chunk(package.listing.digest)))
            for package in self._manifest.packages
        ]
        paths = {entry.path for _, listing in listings for entry in listing.entries}
        if SCRIPT in paths:
            raise ExportError(str(self._target), f"the environment has a file {SCRIPT} already")
        self._scripts.taken = paths
        for package, listing in listings:
            content = _Content(self._store, package)
            for entry in listing.entries:
                self._add(entry, content)
        if "conda-meta/history" not in paths:
            # What conda needs to know a folder as an environment.
            self._add_made("conda-meta/history", b"")
            if self._manifest.environ and _STATE not in paths:
                self._add_made(_STATE, json.dumps({"version": 1, "env_vars": self._manifest.environ}).encode())
        self._packer.finish()

    def _add(self, entry: Entry, content: _Content) -> None:
        if isinstance(entry, File):
            self._add_file(entry, content)
        elif isinstance(entry, Link):
            self._archive.link(entry.path, entry.target)
        elif isinstance(entry, HardLink):
            self._archive.hard_link(entry.path, entry.target)
        elif isinstance(entry, Directory):
            self._archive.folder(entry.path)

    def _add_made(self, path: str, data: bytes) -> None:
        self._archive.file(path, io.BytesIO(data), len(data), False)

    def _add_file(self, entry: File, content: _Content) -> None:
        piece: IO[bytes] = content.file(entry.size_bytes)
        size_bytes = entry.size_bytes
        if entry.relocation is not None:
            mode, placeholder = entry.relocation
            fixed = False
            if mode == "text" and entry.path.startswith("bin/"):
                data, fixed = rewrite_shebang(piece.read(), entry.path, placeholder)
                piece, size_bytes = io.BytesIO(data), len(data)
            if not fixed:
                self._packer.prefixes.append((entry.path, placeholder, mode))
        self._archive.file(entry.path, piece, size_bytes, entry.executable)


class _Content:
    """The content of a package, to be read once from front to back."""

    def __init__(self, store: Store, package: Package) -> None:
        self._chunks = iter(package.chunks)
        self._store = store
        self._open = memoryview(b"")

    def file(self, size_bytes: int) -> IO[bytes]:
        """The next *size_bytes* as a file, to be read to its end before the next one."""
        return cast("IO[bytes]", io.BufferedReader(_Piece(self, size_bytes)))

    def take(self, limit_bytes: int) -> memoryview:
        """At most *limit_bytes*, and nothing only at the end."""
        while not self._open:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._open = memoryview(self._store.read_chunk(chunk.digest))
        taken, self._open = self._open[:limit_bytes], self._open[limit_bytes:]
        return taken


class _Piece(io.RawIOBase):
    def __init__(self, content: _Content, size_bytes: int) -> None:
        self._content = content
        self._rest_bytes = size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        taken = self._content.take(min(len(buffer), self._rest_bytes))
        buffer[: len(taken)] = taken
        self._rest_bytes -= len(taken)
        return len(taken)


class _Scripts:
    """What conda-pack's packer writes its own files to; those in *taken* stay away."""

    def __init__(self, archive: _Archive) -> None:
        self.taken: Collection[str] = ()
        self._archive = archive

    def add(self, source: str, target: str) -> None:
        if target in self.taken:
            return
        data = Path(source).read_bytes()
        executable = bool(os.stat(source).st_mode & stat.S_IXUSR)
        self._archive.file(target, io.BytesIO(data), len(data), executable)


@contextlib.contextmanager
def _opened(file: IO[bytes], name: str) -> Iterator[_Archive]:
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
            yield _Zip(zipped)
        return
    with contextlib.ExitStack() as stack:
        stream: Any = file
        if name.endswith("gz"):
            stream = stack.enter_context(gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0))
        elif name.endswith("zst"):
            stream = stack.enter_context(
                zstandard.ZstdCompressor(level=_ZSTD_LEVEL, threads=-1).stream_writer(file, closefd=False)
            )
        yield _Tar(stack.enter_context(tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT)))


class _Tar(NamedTuple):
    tar: tarfile.TarFile

    def file(self, path: str, content: IO[bytes], size_bytes: int, executable: bool) -> None:
        info = self._info(path, tarfile.REGTYPE, 0o755 if executable else 0o644)
        info.size = size_bytes
        self.tar.addfile(info, content)

    def link(self, path: str, target: str) -> None:
        info = self._info(path, tarfile.SYMTYPE, 0o777)
        info.linkname = target
        self.tar.addfile(info)

    def hard_link(self, path: str, target: str) -> None:
        info = self._info(path, tarfile.LNKTYPE, 0o644)
        info.linkname = target
        self.tar.addfile(info)

    def folder(self, path: str) -> None:
        self.tar.addfile(self._info(path, tarfile.DIRTYPE, 0o755))

    def _info(self, path: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.mtime = kind, mode, _TIME_S
        # What is written is not looked up again, and the list of it would grow with the environment.
        self.tar.members = []  # type: ignore[attr-defined]
        return info


class _Zip(NamedTuple):
    """Links are stored as links, as conda-pack does with ``--zip-symlinks``."""

    zip: zipfile.ZipFile

    def file(self, path: str, content: IO[bytes], size_bytes: int, executable: bool) -> None:
        info = self._info(path, stat.S_IFREG | (0o755 if executable else 0o644))
        info.file_size = size_bytes
        with self.zip.open(info, "w") as file:
            while piece := content.read(1 << 20):
                file.write(piece)

    def link(self, path: str, target: str) -> None:
        self.zip.writestr(self._info(path, stat.S_IFLNK | 0o777), os.fsencode(target))

    def hard_link(self, path: str, target: str) -> None:
        self.link(path, os.path.relpath(target, os.path.dirname(path) or "."))

    def folder(self, path: str) -> None:
        self.zip.writestr(self._info(path + "/", stat.S_IFDIR | 0o755), b"")

    def _info(self, path: str, mode: int) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(path)
        info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, mode << 16
        return info
