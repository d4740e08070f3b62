"""Packing: from an environment on disk to chunks in a store and a manifest.

The way is source → plan → content → chunks → store → manifest; each step has a module. The manifest is written last, so
that a pack that is interrupted at any point leaves chunks that the next one finds, and no environment.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from envship import config
from envship.chunking import LIMIT_BYTES, Cutter, is_large
from envship.environment import Environment
from envship.options import NO_OPTIONS, PackOptions
from envship.reading import Reader, is_streamed
from envship.scan_index import Packed, ScanIndex, index_folder, signature
from envship.sources.archive import is_archive, unpacked
from envship.sources.draft import CodeItem, Draft, FileItem, Item, MadeItem, Plan
from envship.sources.locate import find_prefix
from envship.sources.plan import plan as plan_prefix
from envship.sources.tree import Root, Trees
from worker_bootstrap import evict
from worker_bootstrap.digest import Digest, EnvironmentId, digest_of
from worker_bootstrap.errors import EnvironmentMissing, ManifestInvalid, NotAnEnvironment, SourceProblems
from worker_bootstrap.location import open_store
from worker_bootstrap.manifest import Chunk, Entry, File, Listing, Manifest, Package, Relocation
from worker_bootstrap.store import Store

Report = Callable[[str, int, int], None]
"""Called with a stage (``scan``, ``pack``), bytes done and bytes in all; from any thread, up to ten times a second."""

_READERS = 2
_WRITERS = max(2, min(4, os.cpu_count() or 2))
_REPORT_EVERY_S = 0.1
_ATTEMPTS = 3
"""So often is a prefix packed that changes meanwhile."""
_LISTING_LIMIT = 50_000
"""Entries of one listing, which must fit into a chunk."""


def pack(
    source: str | os.PathLike[str] | None = None,
    *,
    store: Store | None = None,
    options: PackOptions = NO_OPTIONS,
    report: Report | None = None,
) -> Environment:
    """Pack an environment into the store of this machine.

    Parameters
    ----------
    source
        None for the environment that this process runs in; the name of a conda environment; the path of a conda
        environment, a venv, an interpreter's prefix, or an archive that conda-pack made.
    store
        Where the chunks go; None for `worker_bootstrap.location.open_store`.
    options
        Which files stay away, and which faults to put up with.
    report
        Told about progress.

    Raises
    ------
    SourceNotFound
        If there is no such environment.
    NotAnEnvironment
        If there is no Python environment, or its interpreter does not run.
    SourceProblems
        If it cannot be packed as it is, or goes on changing while it is; lists everything that is wrong.
    ArchiveInvalid
        If it is an archive that is damaged, cut short, or a bomb.
    StoreFull
        If there is no room.

    Notes
    -----
    Idempotent: the same packages give the same environment, and what the store has is not written again. May be
    interrupted at any point. Several processes may pack at once.
    """
    store = store or open_store()
    place = _place(source)
    limit_bytes = config.store_limit_bytes()
    with store.adding():
        environment, is_new = _packed(place, store, options, _Progress(report))
    if is_new and limit_bytes is not None:
        evict.collect(store, limit_bytes, keep=[environment.id])
    return environment


def _packed(place: Path, store: Store, options: PackOptions, progress: _Progress) -> tuple[Environment, bool]:
    """The environment at *place*, and whether it had to be read."""
    trees = Trees()
    index = ScanIndex.load(store, str(place), options)
    known = index.unchanged(trees)
    if known is not None:
        manifest = _held(store, known)
        if manifest is not None:
            store.touch(manifest.id)
            return Environment(manifest, store), False
    work = _Work(store, options, progress)
    if place.is_dir():
        done = work.pack(place, trees if known is not None else Trees(), index)
        seen, signed = done.trees, done.signed
    else:
        seen, signed = Trees(), {}
        seen.walk(Root(str(place)))
        done = work.pack_archive(place)
    store.write_manifest(done.manifest)
    index.save(seen, done.manifest.id, signed)
    return Environment(done.manifest, store), True


class _Done(NamedTuple):
    """A pack: what came of it, what it saw, and the packages by signature."""

    manifest: Manifest
    trees: Trees
    signed: Mapping[str, Packed]


@dataclass(frozen=True)
class _Work:
    """What all attempts of one call have in common."""

    store: Store
    options: PackOptions
    progress: _Progress

    def pack(self, prefix: Path, trees: Trees, index: ScanIndex) -> _Done:
        """Pack the prefix, again if it changed meanwhile: what is packed was there at one moment."""
        for _ in range(_ATTEMPTS):
            done, changed = self._attempt(prefix, trees, index)
            if not changed:
                return done
            trees = Trees()
        remedy = "Pack again when nothing writes to it any more."
        raise SourceProblems(str(prefix), [f"{path} changed while it was packed" for path in changed], remedy)

    def pack_archive(self, archive: Path) -> _Done:
        """Pack what is in an archive."""
        with unpacked(archive, self.store.layout.tmp) as prefix:
            try:
                return self.pack(prefix, Trees(), ScanIndex.none(self.store))
            except SourceProblems as error:
                raise SourceProblems(str(archive), error.problems, error.remedy) from error
            except NotAnEnvironment as error:
                raise NotAnEnvironment(str(archive), error.reason) from error

    def _attempt(self, prefix: Path, trees: Trees, index: ScanIndex) -> tuple[_Done, list[str]]:
        plan = plan_prefix(prefix, trees, self.options)
        with Reader(plan, index_folder(self.store) / "bytecode", self.store.layout.tmp) as reader:
            packer = _Packer(self.store, plan, reader, self.progress)
            packages = packer.pack(index, trees.started_ns)
        changed = [*reader.changed, *trees.changed()]
        if reader.problems and not changed:
            raise SourceProblems(str(prefix), sorted(reader.problems), "Make these files readable, or remove them.")
        manifest = Manifest(plan.platform, plan.python, packages, plan.environ)
        return _Done(manifest, trees, packer.signed), sorted(set(changed))


class _Packer:
    """Packs the drafts of one plan: two threads read, others hash and compress."""

    def __init__(self, store: Store, plan: Plan, reader: Reader, progress: _Progress) -> None:
        self.signed: dict[str, Packed] = {}
        self._store = store
        self._plan = plan
        self._reader = reader
        self._progress = progress
        self._stopped = threading.Event()
        self._writers = ThreadPoolExecutor(_WRITERS, "envship-write")
        # Bounds memory: chunks that are read, but not written.
        self._room = threading.BoundedSemaphore(2 * _WRITERS)

    def pack(self, index: ScanIndex, started_ns: int) -> list[Package]:
        """All packages of the plan; those that *index* knows are not read."""
        drafts = [part for draft in self._plan.drafts for part in _parts(draft) if draft.items]
        self._progress.start("pack", sum(_size_bytes(draft) for draft in drafts))
        # The largest first, lest one thread be left with it at the end.
        drafts.sort(key=_size_bytes, reverse=True)
        readers = ThreadPoolExecutor(_READERS, "envship-read")
        try:
            futures = [readers.submit(self._package, draft, index, started_ns) for draft in drafts]
            return [future.result() for future in futures]
        finally:
            self._stopped.set()
            readers.shutdown(cancel_futures=True)
            self._writers.shutdown(cancel_futures=True)

    def _package(self, draft: Draft, index: ScanIndex, started_ns: int) -> Package:
        key = signature(draft, self._plan, started_ns)
        packed = index.packages.get(key) if key else None
        if packed is not None and not self._store.missing([packed[0].digest, *(chunk.digest for chunk in packed[1])]):
            self._progress.add(_size_bytes(draft))
        else:
            packed = self._read(draft)
        if key:
            self.signed[key] = packed
        return Package(draft.name, draft.version, draft.build, draft.kind, *packed)

    def _read(self, draft: Draft) -> Packed:
        stream = _ChunkStream(self._write)
        entries: list[Entry] = []
        for item in sorted(draft.items, key=lambda item: item.path):
            if self._stopped.is_set():
                raise InterruptedError
            entry = self._entry(item, stream)
            if entry is not None:
                entries.append(entry)
            if isinstance(item, FileItem):
                self._progress.add(item.node.st_size)
        chunks = stream.finish()
        listing = Listing(entries).to_bytes()
        return Chunk(self._store.write_chunk(listing), len(listing)), chunks

    def _entry(self, item: Item, stream: _ChunkStream) -> Entry | None:
        if isinstance(item, MadeItem):
            return _file(item.path, item.data, False, None, stream)
        if isinstance(item, CodeItem):
            code = self._reader.byte_code(item)
            return None if code is None else _file(item.path, code, False, None, stream)
        if not isinstance(item, FileItem):
            return item
        executable = bool(item.node.st_mode & 0o100)
        if is_streamed(item):
            return self._streamed(item, executable, stream)
        content = self._reader.content(item)
        return None if content is None else _file(item.path, content.data, executable, content.relocation, stream)

    def _streamed(self, item: FileItem, executable: bool, stream: _ChunkStream) -> Entry | None:
        try:
            digest, size_bytes = stream.add_pieces(self._reader.pieces(item))
        except OSError as error:
            self._reader.note(item, error)
            return None
        return File(item.path, size_bytes, digest, executable, None)

    def _write(self, data: bytes | memoryview) -> Future[Chunk]:
        self._room.acquire()
        try:
            future = self._writers.submit(lambda: Chunk(self._store.write_chunk(data), len(data)))
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future


class _ChunkStream:
    """The content of one package, cut and handed to *write* as it comes."""

    def __init__(self, write: Callable[[bytes | memoryview], Future[Chunk]]) -> None:
        self._write = write
        self._cutter = Cutter()
        self._open: list[bytes] = []
        self._chunks: list[Future[Chunk]] = []

    def add(self, data: bytes, digest: Digest) -> None:
        """Add a file."""
        if self._cutter.cuts_before(len(data)):
            self._flush()
        if is_large(len(data)):
            view = memoryview(data)
            for start in range(0, len(data), LIMIT_BYTES):
                self._chunks.append(self._write(view[start : start + LIMIT_BYTES]))
            return
        self._open.append(data)
        if self._cutter.cuts_after(digest, len(data)):
            self._flush()

    def add_pieces(self, pieces: Iterator[bytes]) -> tuple[Digest, int]:
        """Add a large file that comes in pieces of `LIMIT_BYTES`; return its digest and size."""
        state, size_bytes = hashlib.sha256(), 0
        if self._cutter.cuts_before(LIMIT_BYTES):
            self._flush()
        for piece in pieces:
            state.update(piece)
            size_bytes += len(piece)
            self._chunks.append(self._write(piece))
        return Digest(state.hexdigest()), size_bytes

    def finish(self) -> tuple[Chunk, ...]:
        """All chunks, written."""
        self._flush()
        return tuple(future.result() for future in self._chunks)

    def _flush(self) -> None:
        data = b"".join(self._open)
        self._open.clear()
        if data:
            self._chunks.append(self._write(data))


class _Progress:
    """Counts bytes from several threads and reports them now and then."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._stage, self._done_bytes, self._total_bytes = "scan", 0, 0
        self._reported_s = 0.0
        self.start("scan", 0)

    def start(self, stage: str, total_bytes: int) -> None:
        self._stage, self._done_bytes, self._total_bytes = stage, 0, total_bytes
        self._tell()

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self._done_bytes += size_bytes
            now_s = time.monotonic()
            if self._done_bytes < self._total_bytes and now_s - self._reported_s < _REPORT_EVERY_S:
                return
            self._reported_s = now_s
            self._tell()

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self._stage, self._done_bytes, self._total_bytes)


def _place(source: str | os.PathLike[str] | None) -> Path:
    """Where the environment lies: a prefix, or an archive."""
    if source is not None:
        path = Path(source).expanduser().absolute()
        if (os.sep in os.fspath(source) or path.suffix) and is_archive(path):
            return path
    return find_prefix(source)


def _file(path: str, data: bytes, executable: bool, relocation: Relocation | None, stream: _ChunkStream) -> File:
    digest = digest_of(data)
    stream.add(data, digest)
    return File(path, len(data), digest, executable, relocation)


def _held(store: Store, environment_id: EnvironmentId) -> Manifest | None:
    """The manifest, if the store has it and every chunk that it names."""
    try:
        manifest = store.read_manifest(environment_id)
    except (EnvironmentMissing, ManifestInvalid):
        return None
    return None if store.missing(manifest.chunks) else manifest


def _size_bytes(draft: Draft) -> int:
    return sum(item.node.st_size for item in draft.items if isinstance(item, FileItem))


def _parts(draft: Draft) -> Sequence[Draft]:
    """*draft* itself, or several where its listing would not fit into a chunk."""
    if len(draft.items) <= _LISTING_LIMIT:
        return [draft]
    items = sorted(draft.items, key=lambda item: item.path)
    starts = range(0, len(items), _LISTING_LIMIT)
    return [
        draft._replace(build=f"{draft.build}#{number}", items=items[start : start + _LISTING_LIMIT])
        for number, start in enumerate(starts)
    ]
