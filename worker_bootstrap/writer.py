"""Writing the files of an environment: decode, check, relocate, in several processes and one chunk at a time.

Nothing is ever written through a link, or over anything that is there: files are made with ``O_EXCL`` in a folder of
our own, links come last. What is written where has been checked by `worker_bootstrap.blueprint`; making the result
count is `worker_bootstrap.materialise`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Callable, NamedTuple, TypeVar

from worker_bootstrap.arrivals import Arrivals
from worker_bootstrap.blueprint import Blueprint, Run
from worker_bootstrap.crew import Crew
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.donor import Donors, seal
from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.handles import opened_folder
from worker_bootstrap.manifest import Chunk, File, Link
from worker_bootstrap.relocate import relocate
from worker_bootstrap.soundness import set_times
from worker_bootstrap.store import Store

_Share = TypeVar("_Share")
_Name = TypeVar("_Name")
Report = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""

JOB_BYTES = 8 << 20
"""What one process takes at a time: neighbours, so that two processes seldom write to one folder at once."""
FILE_COST_BYTES = 32 << 10
"""Making a file takes as long as writing so many bytes."""
JOB_NAMES = 256
"""The same for directories and links."""
ALONE_FILES = 200
"""So few files are written before another process would have started."""


class Work(NamedTuple):
    """How a build goes on: who is told, what is waited for, how many write, whether what was built may be started."""

    report: Report
    arrivals: Arrivals
    processes: int
    may_run: bool


class Writer:
    """Writes what *blueprint* says below *scratch*, as it will read at *prefix*.

    Parameters
    ----------
    store
        Holds the chunks.
    blueprint
        What to write; checked as a whole.
    donors
        Give files that need not be written.
    scratch
        An empty folder that nobody else can write to.
    prefix
        Where *scratch* will be renamed to.
    work
        Who is told about the progress, which chunks are there while others still come, and how many processes write.
    """

    def __init__(
        self, store: Store, blueprint: Blueprint, donors: Donors, scratch: str, prefix: str, work: Work
    ) -> None:
        self.store = store
        self.blueprint = blueprint
        self.donors = donors
        self.scratch = scratch
        self.prefix = prefix
        self.work = work
        self._processes = work.processes if blueprint.file_count + len(blueprint.links) > ALONE_FILES else 1
        self._done_bytes, self._total_bytes = 0, blueprint.size_bytes

    def write(self, meanwhile: Callable[[], None]) -> None:
        """Write everything; once.

        Parameters
        ----------
        meanwhile
            Called when everything is there, while folders are given their times. What it adds is not timed.

        Raises
        ------
        ChunkMissing
            If the store does not hold a chunk.
        TransferError
            If chunks were still to come, and will not.
        ManifestInvalid
            If content is not what its listing says.
        OSError
            If something cannot be written.
        """
        # While chunks still come, each is to be written as soon as it is there.
        runs = _joined(self.blueprint.runs) if self.work.arrivals.are_complete else self.blueprint.runs
        pile = _Pile()
        levels = [pile.add(self._make_directories, _parts(level)) for level in _levels(self.blueprint.directories)]
        numbers = dict(zip(map(id, runs), pile.add(self._write_run, runs)))
        links = pile.add(self._write_links, _parts(self.blueprint.links))
        times = pile.add(self._set_times, _parts(self.blueprint.directories))
        with Crew(pile.do, self._advance, self._processes) as crew:
            for level in levels:
                _give(crew, level)
            _give(crew, (numbers[id(run)] for run in self.work.arrivals.as_they_come(runs, self.store.has_chunk)))
            self._write_hard_links()
            _give(crew, links)
            for number in times:
                crew.give(number)
            meanwhile()
            crew.finish()

    def _make_directories(self, paths: Sequence[str]) -> int:
        with opened_folder(self.scratch) as root:
            for path in paths:
                os.mkdir(path, dir_fd=root)
                os.chmod(path, 0o755, dir_fd=root)
        return 0

    def _write_hard_links(self) -> None:
        with opened_folder(self.scratch) as root:
            for link in self.blueprint.hard_links:
                os.link(link.target, link.path, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)

    def _write_links(self, links: Sequence[Link]) -> int:
        with opened_folder(self.scratch) as root:
            for link in links:
                os.symlink(link.target, link.path, dir_fd=root)
        return 0

    def _set_times(self, paths: Sequence[str]) -> int:
        set_times(self.scratch, paths)
        return 0

    def _write_run(self, run: Run) -> int:
        """Write what no donor gives; returns the size of the run in bytes.

        Every byte is compared with its file's digest. So the chunks that they come from are compared with their own
        only where that fails: to say which of the two is wrong, and to find a sound copy in another store.
        """
        with opened_folder(self.scratch) as root:
            wanted = self.donors.give(run.files, root)
            if not wanted:
                return run.size_bytes
            try:
                self._write_files(run, wanted, root, self.store.read_unverified)
            except ManifestInvalid:
                for path in wanted:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path, dir_fd=root)
                self._write_files(run, wanted, root, self.store.read_chunk)
        return run.size_bytes

    def _write_files(self, run: Run, wanted: Collection[str], root: int, read: Callable[[Digest], bytes]) -> None:
        content = _Content(run.chunks, read)
        for file in run.files:
            if file.path not in wanted:
                content.skip(file.size_bytes)
                continue
            if file.relocation is None:
                actual = _write_file(file, content.read(file.size_bytes), root)
            else:
                data = b"".join(content.read(file.size_bytes))
                actual = digest_of(data)
                if actual == file.digest:
                    _write_file(file, [memoryview(relocate(data, file.relocation, self.prefix))], root)
            if actual != file.digest:
                reason = f"the content of {file.path!r} has the digest {actual}, not {file.digest}"
                raise ManifestInvalid(reason, self.prefix)

    def _advance(self, count: int) -> None:
        if count:
            self._done_bytes += count
            self.work.report(self._done_bytes, self._total_bytes)


def _write_file(file: File, pieces: Iterable[memoryview], root: int) -> Digest:
    """Write one file below the folder behind the handle *root*; returns the digest of what was written."""
    state = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(file.path, flags, 0o600, dir_fd=root)
    try:
        for piece in pieces:
            state.update(piece)
            while piece:
                piece = piece[os.write(handle, piece) :]
        seal(handle, file)
    finally:
        os.close(handle)
    return Digest(state.hexdigest())


class _Pile:
    """Jobs with numbers, for a crew."""

    def __init__(self) -> None:
        self._jobs: list[Callable[[], int]] = []

    def add(self, work: Callable[[_Share], int], shares: Iterable[_Share]) -> range:
        """*work* on each of *shares* becomes a job; returns their numbers."""
        before = len(self._jobs)
        self._jobs += [functools.partial(work, share) for share in shares]
        return range(before, len(self._jobs))

    def do(self, number: int) -> int:
        """The job with that number."""
        return self._jobs[number]()


def _give(crew: Crew, numbers: Iterable[int]) -> None:
    """Have these jobs done, and wait for that."""
    for number in numbers:
        crew.give(number)
    crew.wait()


def _levels(directories: Iterable[str]) -> list[list[str]]:
    """*directories* by depth: those of one level can be made at once, each after the one that it lies in."""
    levels: dict[int, list[str]] = {}
    for path in directories:
        levels.setdefault(path.count("/"), []).append(path)
    return [levels[depth] for depth in sorted(levels)]


def _parts(names: Sequence[_Name]) -> list[Sequence[_Name]]:
    return [names[start : start + JOB_NAMES] for start in range(0, len(names), JOB_NAMES)]


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Neighbouring runs put together, so that what one process takes is worth the taking."""
    joined: list[list[Run]] = []
    room = 0
    for run in runs:
        cost = run.size_bytes + FILE_COST_BYTES * len(run.files)
        if cost > room:
            joined.append([])
            room = JOB_BYTES
        joined[-1].append(run)
        room -= cost
    return [
        Run(tuple(file for run in parts for file in run.files), tuple(chunk for run in parts for chunk in run.chunks))
        for parts in joined
    ]


class _Content:
    """The concatenated bytes of some chunks, read one chunk at a time, and only where somebody wants bytes of it."""

    def __init__(self, chunks: Sequence[Chunk], read: Callable[[Digest], bytes]) -> None:
        self._chunks = iter(chunks)
        self._read = read
        self._rest = memoryview(b"")
        self._skipped = 0

    def read(self, count: int) -> Iterable[memoryview]:
        """The next *count* bytes, in pieces: to be consumed before the next call."""
        if self._skipped and count:
            self._pass()
        if count <= len(self._rest):
            return (self._taken(count),)
        return self._pieces(count)

    def skip(self, count: int) -> None:
        """Leave the next *count* bytes out."""
        self._skipped += count

    def _pass(self) -> None:
        """Go where reading goes on; chunks that are left out altogether are not loaded."""
        count, self._skipped = self._skipped, 0
        while count:
            if self._rest:
                count -= len(self._taken(count))
                continue
            chunk = next(self._chunks)
            if chunk.size_bytes > count:
                self._rest = self._loaded(chunk)
            else:
                count -= chunk.size_bytes

    def _pieces(self, count: int) -> Iterator[memoryview]:
        while count:
            if not self._rest:
                self._rest = self._loaded(next(self._chunks))
            piece = self._taken(count)
            count -= len(piece)
            yield piece

    def _taken(self, count: int) -> memoryview:
        piece, self._rest = self._rest[:count], self._rest[count:]
        return piece

    def _loaded(self, chunk: Chunk) -> memoryview:
        data = self._read(chunk.digest)
        if len(data) != chunk.size_bytes:
            raise ManifestInvalid(f"chunk {chunk.digest} has {len(data)} bytes, not {chunk.size_bytes}", "manifest")
        return memoryview(data)
