"""Building the prefix of an environment from the chunks of a store.

Everything is checked before anything is written (`worker_bootstrap.blueprint`) and each file's content while it is
written. The prefix is built aside, synced, renamed into place and marked ready, under the environment's lock: whoever
dies in the middle leaves nothing that counts. Does not fetch; a chunk that is not here is `ChunkMissing`.

`main` is the same in a process of its own, so that no event loop waits for it: see `worker_bootstrap.build`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NoReturn

from worker_bootstrap import donor, errors
from worker_bootstrap.blueprint import Blueprint, Run, draw
from worker_bootstrap.digest import Digest, EnvironmentId, digest_of, is_digest
from worker_bootstrap.donor import LINK_MODES, Donors
from worker_bootstrap.errors import EnvshipError, ManifestInvalid, MaterialiseError, StoreFull
from worker_bootstrap.layout import SHORT_ID_LENGTH, Layout
from worker_bootstrap.lock import Lock
from worker_bootstrap.manifest import Chunk, File, Listing, Manifest
from worker_bootstrap.relocate import relocate
from worker_bootstrap.store import Store, full_error, publish, sync_folder

Report = Callable[[int, int], None]
"""Called with (bytes done, bytes in total), from any thread, never from two at once."""

THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
STALE_S = 24 * 3600
"""Files in ``tmp`` that nobody touched for that long belong to processes that died."""
MARGIN_BYTES = 16 << 20
"""Room left for the file system's own needs when it is checked whether an environment fits."""
REPORT_INTERVAL_S = 0.1


def materialise(
    store: Store, environment_id: EnvironmentId, *, link_mode: str = "auto", report: Report | None = None
) -> Path:
    """Build an environment, or find it built; return its prefix.

    Parameters
    ----------
    store
        Holds the manifest and all chunks. The prefix is built in its writable part; one that is ready in a read-only
        part is returned as it is.
    environment_id
        The environment.
    link_mode
        How files of environments already built here are reused: ``auto``, ``reflink``, ``hardlink``, ``copy``.
    report
        Told about the progress.

    Raises
    ------
    EnvironmentMissing, ChunkMissing
        If the manifest or a chunk is not in the store (any more).
    ManifestInvalid
        If the environment breaks the format or would write outside of its prefix. Nothing was written.
    PrefixTooLong
        If the store's path is too long for it. Nothing was written.
    StoreFull
        If there is not enough room, found out before or while writing.
    MaterialiseError
        If a file cannot be written.
    SettingInvalid
        If there is no such link mode.

    Notes
    -----
    Idempotent; safe in any number of processes and threads at once: one builds, the others wait. A failed or killed
    build leaves nothing that counts as built; its remains are removed by the next one.
    """
    prefix = store.built(environment_id)
    if prefix is not None:
        return prefix
    with Lock(store.layout.lock(environment_id)):
        prefix = store.built(environment_id)
        if prefix is None:
            prefix = _build(store, environment_id, link_mode, report or _silent)
        return prefix


def _build(store: Store, environment_id: EnvironmentId, link_mode: str, report: Report) -> Path:
    layout = store.layout
    prefix = layout.prefix(environment_id)
    manifest = store.read_manifest(environment_id)
    listings = [Listing.from_bytes(store.read_chunk(package.listing.digest)) for package in manifest.packages]
    blueprint = draw(manifest, listings, str(prefix))
    donors = Donors(donor.find(store, manifest, listings), link_mode)
    _sweep(layout, environment_id)
    _check_room(layout, blueprint, donors)
    scratch = tempfile.mkdtemp(prefix=_scratch_name(environment_id), dir=layout.tmp)
    try:
        _Writer(store, blueprint, donors, scratch, str(prefix), report).write()
        os.chmod(scratch, 0o755)
        _sync_file_system(layout.root)
        os.rename(scratch, prefix)
        sync_folder(layout.envs)
        publish(layout.ready(environment_id), _ready_mark(manifest, blueprint), layout.tmp, sync=True)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError):
            full = full_error(error, layout.root)
            if full is not None:
                raise full from error
            raise MaterialiseError(environment_id, str(error.filename or ""), error.strerror) from error
        raise
    return prefix


class _Writer:
    """Writes what a blueprint says below *scratch*, as it will read at *prefix*."""

    def __init__(
        self, store: Store, blueprint: Blueprint, donors: Donors, scratch: str, prefix: str, report: Report
    ) -> None:
        self.store = store
        self.blueprint = blueprint
        self.donors = donors
        self.scratch = scratch
        self.prefix = prefix
        self.report = report
        self._total_bytes = blueprint.size_bytes
        self._done_bytes = 0
        self._reporting = threading.Lock()

    def write(self) -> None:
        for path in self.blueprint.directories:
            os.mkdir(self._at(path))
            os.chmod(self._at(path), 0o755)
        self._write_runs(self.blueprint.runs)
        for hard_link in self.blueprint.hard_links:
            os.link(self._at(hard_link.target), self._at(hard_link.path), follow_symlinks=False)
        for link in self.blueprint.links:
            os.symlink(link.target, self._at(link.path))

    def _write_runs(self, runs: Sequence[Run]) -> None:
        # Decompression, hashing and system calls release the GIL. The largest first: no long one is left for the end.
        ordered = sorted(runs, key=lambda run: run.size_bytes, reverse=True)
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="envship-build")
        try:
            for _ in pool.map(self._write_run, ordered):
                pass
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _write_run(self, run: Run) -> None:
        given = {file.path for file in run.files if self.donors.give(file, self._at(file.path))}
        if len(given) == len(run.files):
            self._advance(run.size_bytes)
            return
        content = _Content(self.store, run.chunks, self._advance)
        # A file that is one chunk has been verified with it.
        verified = run.chunks[0].digest if len(run.files) == len(run.chunks) == 1 else None
        for file in run.files:
            if file.path in given:
                for _ in content.read(file.size_bytes):
                    pass
                continue
            if file.relocation is None:
                actual = self._write_file(file, content.read(file.size_bytes), verified)
            else:
                data = b"".join(content.read(file.size_bytes))
                actual = digest_of(data)
                self._write_file(file, iter([memoryview(relocate(data, file.relocation, self.prefix))]), actual)
            if actual != file.digest:
                reason = f"the content of {file.path!r} has the digest {actual}, not {file.digest}"
                raise ManifestInvalid(reason, self.prefix)

    def _write_file(self, file: File, pieces: Iterator[memoryview], verified: Digest | None) -> Digest:
        """Write one file; returns *verified*, or the digest of what was written."""
        state = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(self._at(file.path), flags, 0o600)
        try:
            for piece in pieces:
                if verified is None:
                    state.update(piece)
                while piece:
                    piece = piece[os.write(handle, piece) :]
            donor.seal(handle, file)
        finally:
            os.close(handle)
        return Digest(state.hexdigest()) if verified is None else verified

    def _advance(self, count: int) -> None:
        with self._reporting:
            self._done_bytes += count
            self.report(self._done_bytes, self._total_bytes)

    def _at(self, path: str) -> str:
        return f"{self.scratch}/{path}"


class _Content:
    """The concatenated bytes of some chunks, read one chunk at a time."""

    def __init__(self, store: Store, chunks: Sequence[Chunk], advance: Callable[[int], None]) -> None:
        self._store = store
        self._chunks = iter(chunks)
        self._advance = advance
        self._rest = memoryview(b"")

    def read(self, count: int) -> Iterator[memoryview]:
        """The next *count* bytes, in pieces."""
        while count:
            if not self._rest:
                self._rest = self._next()
            piece = self._rest[:count]
            self._rest = self._rest[count:]
            count -= len(piece)
            yield piece

    def _next(self) -> memoryview:
        chunk = next(self._chunks)
        data = self._store.read_chunk(chunk.digest)
        if len(data) != chunk.size_bytes:
            raise ManifestInvalid(f"chunk {chunk.digest} has {len(data)} bytes, not {chunk.size_bytes}", "manifest")
        self._advance(len(data))
        return memoryview(data)


def _scratch_name(environment_id: EnvironmentId) -> str:
    return f"build-{environment_id[:SHORT_ID_LENGTH]}-"


def _sweep(layout: Layout, environment_id: EnvironmentId) -> None:
    """Remove what killed builds of this environment left (its lock is held), and whatever is stale."""
    prefix = layout.prefix(environment_id)
    for mark in layout.ready_marks.glob(environment_id[:SHORT_ID_LENGTH] + "*"):
        if is_digest(mark.name) and mark.name != environment_id:
            raise MaterialiseError(environment_id, str(prefix), f"{mark.name} has the same first digits and lies there")
    if os.path.lexists(prefix):
        # Renamed first: a prefix that is half removed must not lie where a whole one is expected.
        os.rename(prefix, layout.tmp / f"{_scratch_name(environment_id)}old-{os.getpid()}")
    now = time.time()
    for entry in os.scandir(layout.tmp):
        with contextlib.suppress(OSError):
            stale = now - entry.stat(follow_symlinks=False).st_mtime > STALE_S
            if entry.name.startswith(_scratch_name(environment_id)) or stale:
                _remove(entry)


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        os.unlink(entry.path)


def _check_room(layout: Layout, blueprint: Blueprint, donors: Donors) -> None:
    room = os.statvfs(layout.tmp)
    free_bytes = room.f_bavail * room.f_frsize
    needed_bytes = blueprint.needed_bytes(donors.has) + MARGIN_BYTES
    if needed_bytes > free_bytes:
        raise StoreFull(str(layout.root), needed_bytes, free_bytes)
    if room.f_files and room.f_favail < blueprint.needed_inodes:  # btrfs counts no inodes and says 0
        raise StoreFull(str(layout.root), needed_bytes, None)


def _ready_mark(manifest: Manifest, blueprint: Blueprint) -> bytes:
    content = {"environment_id": manifest.id, "files": blueprint.needed_inodes, "size_bytes": blueprint.size_bytes}
    return json.dumps(content).encode()


def _sync_file_system(path: Path) -> None:
    """Write everything on the file system of *path* to disk: one call where there are thousands of files."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "syncfs"):
            os.sync()
        elif libc.syncfs(handle) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(handle)


def _silent(done_bytes: int, total_bytes: int) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Build as a process of its own: JSON lines on standard output, exit code 0 or 1.

    ``{"done_bytes": …, "total_bytes": …}`` at most ten times a second, then ``{"prefix": …}`` or
    ``{"error": {"type": …, "values": […]}}`` (see `read_error`). Ends when standard input is a pipe whose other end
    has closed: the parent is gone then.
    """
    parser = argparse.ArgumentParser(prog="worker_bootstrap.materialise")
    parser.add_argument("store", type=Path)
    parser.add_argument("environment_id", type=EnvironmentId)
    parser.add_argument("--read-only", type=Path, action="append", default=[])
    parser.add_argument("--link-mode", choices=LINK_MODES, default="auto")
    options = parser.parse_args(arguments)
    _end_with_parent()
    try:
        store = Store(options.store, options.read_only)
        prefix = materialise(store, options.environment_id, link_mode=options.link_mode, report=_Lines())
    except Exception as error:
        if not isinstance(error, EnvshipError):
            error = MaterialiseError(options.environment_id, "", f"{type(error).__name__}: {error}")
        _tell({"error": {"type": type(error).__name__, "values": list(error.values)}})
        sys.exit(1)
    _tell({"prefix": str(prefix)})
    sys.exit(0)


def read_error(raw: Any) -> EnvshipError:
    """The error that `main` wrote as ``{"type": …, "values": […]}``; an `EnvshipError` of what it says otherwise."""
    try:
        kind = getattr(errors, raw["type"])
        if issubclass(kind, EnvshipError):
            found: EnvshipError = kind(*raw["values"])
            return found
    except (KeyError, TypeError, AttributeError):
        pass
    return EnvshipError(f"the build failed: {raw!r}")


class _Lines:
    """Progress as lines of JSON, at most one every `REPORT_INTERVAL_S`."""

    def __init__(self) -> None:
        self._due = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + REPORT_INTERVAL_S
            _tell({"done_bytes": done_bytes, "total_bytes": total_bytes})


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201 - the protocol with the parent


def _end_with_parent() -> None:
    mode = os.fstat(0).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        threading.Thread(target=_wait_for_end, name="envship-parent", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)
