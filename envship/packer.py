"""From a prefix, or an archive, to a manifest in a store: planned, written, and compared with what is there afterwards.

No step of it needs Dask, so that it can run in a process of its own: see `envship.packing_process`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from envship.crew import Written, write_with_processes, write_with_threads
from envship.errors import NotAnEnvironment, SourceProblems
from envship.head_start import HeadStart
from envship.options import PackOptions
from envship.package_writer import Packed
from envship.reading import Reader
from envship.scan_index import Known, ScanIndex, Whole, context, fingerprint_of, index_folder, signature
from envship.sources.archive import unpacked
from envship.sources.conda import NOT_CONTENT
from envship.sources.draft import CodeItem, Draft, FileItem, MadeItem, Plan
from envship.sources.items import with_hard_links
from envship.sources.locate import is_conda
from envship.sources.plan import plan as plan_prefix
from envship.sources.tree import Root, Trees
from envship.sources.unpacked import SCRIPT
from envship.sources.version_control import VERSION_CONTROL
from envship.spool import Spool
from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.manifest import Manifest, Package
from worker_bootstrap.store import Store

logger = logging.getLogger("envship.packer")

Report = Callable[[str, int, int], None]
"""Called with a stage (``scan``, ``pack``), bytes done and bytes in all; from any thread, up to ten times a second."""

_REPORT_EVERY_S = 0.1
_ATTEMPTS = 3
"""So often is a prefix packed that changes meanwhile."""
_WRITERS_OF_MANY = 2
"""Processes that write, where there are so many files that each needs the memory of several."""
_LISTING_LIMIT = 50_000
"""Entries of one listing, which must fit into a chunk."""
_PROJECT_LISTING_LIMIT = 4_000
"""The same for projects: each edit ships a listing."""


class _Done(NamedTuple):
    """A pack: what came of it, what it saw, and what is to be known of its packages."""

    manifest: Manifest
    trees: Trees
    known: Known


class Packer:
    """Packs into *store*.

    Parameters
    ----------
    processes
        How many write packages. 1: threads of this process do; more: nobody else may have threads in it.
    scratch
        Where archives are unpacked; None: where the store keeps what is being made.
    """

    def __init__(
        self,
        store: Store,
        options: PackOptions,
        report: Report | None,
        processes: int = 1,
        scratch: Path | None = None,
    ) -> None:
        self._store = store
        self._options = options
        self._progress = _Progress(report)
        self._processes = processes
        self._scratch = scratch or store.layout.tmp

    def pack(self, place: Path, trees: Trees, index: ScanIndex) -> EnvironmentId:
        """Pack what lies at *place*; *trees* may know some of it already.

        Raises
        ------
        PackError, ArchiveInvalid, StoreFull
            As `envship.pack.pack`.
        """
        if place.is_dir():
            done = self._prefix(place, trees, index)
            seen, known = done.trees, done.known
        else:
            seen, known = Trees(), Known()
            seen.walk(Root(str(place), follow=True))
            done = self._archive(place)
        environment_id = self._store.write_manifest(done.manifest)
        index.save(seen, environment_id, known)
        return environment_id

    def _archive(self, archive: Path) -> _Done:
        with unpacked(archive, self._scratch) as prefix:
            try:
                return self._prefix(prefix, Trees(slim=True), ScanIndex.none(self._store), is_archive=True)
            except SourceProblems as error:
                raise SourceProblems(str(archive), error.problems, error.remedy, error.shown) from error
            except NotAnEnvironment as error:
                raise NotAnEnvironment(str(archive), error.reason) from error

    def _prefix(self, prefix: Path, trees: Trees, index: ScanIndex, is_archive: bool = False) -> _Done:
        """Pack a prefix, again if it changed meanwhile: what is packed was there at one moment."""
        for _ in range(_ATTEMPTS):
            done, changed = self._attempt(prefix, trees, index, is_archive)
            if not changed:
                return done
            trees = Trees(slim=True)
        remedy = "Pack again when nothing writes to it any more."
        raise SourceProblems(str(prefix), [f"{path} changed while it was packed" for path in changed], remedy)

    def _attempt(self, prefix: Path, trees: Trees, index: ScanIndex, is_archive: bool) -> tuple[_Done, list[str]]:
        with self._head_start(prefix):
            whole, plan = self._planned(prefix, trees, index, is_archive)
            drafts = [part for draft in plan.drafts for part in _parts(draft) if draft.items]
            plan = replace(plan, drafts=())
            keys = [signature(draft, plan, trees.started_ns) for draft in drafts]
        with Spool(self._store.layout.tmp) as spool:
            packed = [self._known(key, index) for key in keys]
            written = self._write_unknown(drafts, packed, plan, spool)
            # What is packed is what the walk saw: readers compared what they read, the index what was not read.
            changed = sorted({*written.changed, *trees.changed()})
            if written.problems and not changed:
                problems = sorted(written.problems)
                raise SourceProblems(str(prefix), problems, "Make these files readable, or remove them.")
            for line in sorted(written.doubts):
                logger.warning("packed, but it may not work elsewhere: %s", line)
            rows = list(zip(drafts, keys, packed, strict=True))
            packages = [_package(draft, found) for draft, _, found in rows if found is not None]
            assert changed or len(packages) == len(drafts)
            known = Known(
                {key: found for _, key, found in rows if key and found},
                [*whole, *_whole_of(prefix, trees, [(draft, found) for draft, key, found in rows if key and found])],
                context(plan),
            )
        packages += [each.package for each in whole]
        return _Done(Manifest(plan.platform, plan.python, packages, plan.environ), trees, known), changed

    def _head_start(self, prefix: Path) -> contextlib.AbstractContextManager[object]:
        if self._processes == 1 or self._options.filters:
            return contextlib.nullcontext()
        try:
            skip = (*VERSION_CONTROL, *(NOT_CONTENT if is_conda(prefix) else ()))
            return HeadStart(str(prefix), skip, self._store)
        except BlockingIOError:  # no process can be started; whether one must be will show
            return contextlib.nullcontext()

    def _write_unknown(self, drafts: list[Draft], packed: list[Packed | None], plan: Plan, spool: Spool) -> Written:
        """Write those of *drafts* that are not *packed* yet."""
        sizes = [_size_bytes(draft) for draft in drafts]
        processes = min(self._processes, _WRITERS_OF_MANY) if spool.take_over(drafts) else self._processes
        unknown = [number for number, found in enumerate(packed) if found is None]
        # The largest first, lest one be left with it at the end.
        unknown.sort(key=lambda number: sizes[number], reverse=True)
        self._progress.start("pack", sum(sizes[number] for number in unknown))
        written = self._write([drafts[number] for number in unknown], plan, processes)
        for place, package in written.packages.items():
            packed[unknown[place]] = package
        return written

    def _planned(self, prefix: Path, trees: Trees, index: ScanIndex, is_archive: bool) -> tuple[list[Whole], Plan]:
        """Packages that need not even be planned, and the plan of the others; of all, where that cannot do."""
        whole = self._whole(prefix, trees, index)
        if whole:
            # What the others miss may be there, but hidden: a package that came later may record a path of theirs.
            with contextlib.suppress(SourceProblems):
                plan = plan_prefix(prefix, trees, self._options, is_archive)
                if context(plan) == index.known.context:
                    return whole, plan
            trees.show_all()
        return [], plan_prefix(prefix, trees, self._options, is_archive)

    def _whole(self, prefix: Path, trees: Trees, index: ScanIndex) -> list[Whole]:
        """Packages that need not even be planned, because nothing that they depend on has changed; hides their files.

        The interpreter always is: what all others depend on follows from it.
        """
        root = next((root for root in index.roots if root.path == str(prefix)), None)
        if root is None or self._options.ignore_missing:
            return []
        nodes = trees.walk(root)
        if SCRIPT in nodes:
            return []
        found = [
            each
            for each in index.known.whole
            if each.package.name != "python"
            and fingerprint_of(each.paths, nodes) == each.fingerprint
            and not self._store.lost(_digests(each.package))
        ]
        hidden = {path for each in found for path in each.paths}
        if any(path.endswith(".pyc") and path not in hidden for path in nodes):
            # Whether it is anything of its own depends on a module that may be hidden.
            return []
        trees.hide(root, hidden)
        return found

    def _known(self, key: str | None, index: ScanIndex) -> Packed | None:
        found = index.known.packages.get(key) if key else None
        return None if found is None or self._store.lost(_digests(found)) else found

    def _write(self, drafts: Sequence[Draft], plan: Plan, processes: int) -> Written:
        new_reader = functools.partial(Reader, plan, index_folder(self._store) / "bytecode", self._store.layout.tmp)
        if processes > 1 and len(drafts) > 1:
            return write_with_processes(drafts, new_reader, self._store, self._progress.add, processes)
        return write_with_threads(drafts, new_reader, self._store, self._progress.add)


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


def _package(draft: Draft, packed: Packed) -> Package:
    return Package(draft.name, draft.version, draft.build, draft.kind, *packed)


def _digests(packed: Packed | Package) -> list[Digest]:
    return [packed.listing.digest, *(chunk.digest for chunk in packed.chunks)]


def _whole_of(prefix: Path, trees: Trees, packed: Sequence[tuple[Draft, Packed]]) -> Iterator[Whole]:
    """What the next pack need not plan, if it is still there then."""
    root = next((root for root in trees.roots if root.path == str(prefix)), None)
    if root is None:
        return
    nodes = trees.everything(root)
    for draft, found in packed:
        if any(isinstance(item, FileItem) and item.origin != f"{root.path}/{item.path}" for item in draft.items):
            # What a link out of the prefix points to changes without a trace in the prefix.
            continue
        if any(item.path.endswith(".py") and not item.path.startswith(("lib/python", "bin/")) for item in draft.items):
            # Whether such a module has byte code depends on path files of others.
            continue
        paths = tuple(item.path for item in draft.items if not isinstance(item, (CodeItem, MadeItem)))
        fingerprint = fingerprint_of(paths, nodes) if draft.is_whole else None
        if fingerprint is not None:
            yield Whole(_package(draft, found), paths, fingerprint)


def _size_bytes(draft: Draft) -> int:
    return sum(item.node.st_size for item in draft.items if isinstance(item, FileItem))


def _parts(draft: Draft) -> Sequence[Draft]:
    """*draft* itself, or several where its listing would not fit into a chunk."""
    limit = _PROJECT_LISTING_LIMIT if draft.kind == "project" else _LISTING_LIMIT
    parts = [draft]
    if len(draft.items) > limit:
        items = list(draft.in_order())
        parts = [
            draft._replace(build=f"{draft.build}#{number}", items=items[start : start + limit], is_whole=False)
            for number, start in enumerate(range(0, len(items), limit))
        ]
    if draft.kind in ("files", "project"):
        # A hard link names a file of its own listing.
        return [part._replace(items=with_hard_links(part.items)) for part in parts]
    return parts
