"""What a store holds: environments, their sizes, when they were last used, and who uses them now.

Looks at every file of every built environment, so it takes about as long as ``du``. What of it may go is decided in
`worker_bootstrap.evict`. Read-only stores are not looked at: they are somebody else's to collect.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from worker_bootstrap import scratch
from worker_bootstrap.digest import Digest, EnvironmentId, is_digest
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.layout import SHORT_ID_LENGTH, Layout
from worker_bootstrap.lock import Lease, holders
from worker_bootstrap.store import Store

BLOCK_BYTES = 512
"""Unit of ``st_blocks``, whatever the file system's own blocks are (POSIX, ``sys/stat.h``)."""
CLOCK_LEEWAY_S = 60.0
"""A file server's clock may be so far ahead of ours; a later time was noted while a clock was wrong."""

_PREFIX_NAME = re.compile(rf"[0-9a-f]{{{SHORT_ID_LENGTH}}}")


class Holding(NamedTuple):
    """An environment in the writable store.

    *own_bytes* are what its prefix alone takes up on disk; *shared* the inodes that have names outside of it as well
    (other environments link to them) and their sizes. *chunks* are those that its manifest names, here or not.
    *builders* are the processes that build, mend or evict it, as far as the kernel tells.
    """

    environment_id: EnvironmentId
    built: bool
    in_use: bool
    used_at: float
    own_bytes: int
    shared: Mapping[int, int]
    chunks: Collection[Digest]
    builders: Collection[int] = ()


class Holdings(NamedTuple):
    """A whole store. *chunks* maps each digest to the bytes that its copies take up on disk.

    *leftovers_bytes* are those of builds, evictions and packs that were interrupted.
    *written_at* says of each chunk when the newest of its copies was written (seconds since the epoch).
    """

    environments: tuple[Holding, ...]
    chunks: Mapping[Digest, int]
    leftovers_bytes: int
    written_at: Mapping[Digest, float] = MappingProxyType({})

    @property
    def size_bytes(self) -> int:
        """What the store takes up on disk, without its small files."""
        shared = {inode: size for holding in self.environments for inode, size in holding.shared.items()}
        own_bytes = sum(holding.own_bytes for holding in self.environments)
        return own_bytes + sum(shared.values()) + sum(self.chunks.values()) + self.leftovers_bytes


def survey(store: Store, now: float | None = None) -> Holdings:
    """Look at everything in the writable store.

    Parameters
    ----------
    now
        Seconds since the epoch that stand for a time of use, or writing, that is still to come; None for this moment.

    Notes
    -----
    Leases that are held are noted as a use of their environment now: one that ran until a minute ago was used a minute
    ago, however long it ran. Safe while others use the store; what comes or goes meanwhile is seen or not.
    """
    layout = store.layout
    names = {path.stem for path in layout.manifests.glob("*.json")} | set(os.listdir(layout.ready_marks))
    known = [EnvironmentId(name) for name in sorted(names) if is_digest(name)]
    now = time.time() if now is None else now
    chunks, written_at = _chunks(layout)
    return Holdings(
        written_at={digest: _in_the_past(written, now) for digest, written in written_at.items()},
        environments=tuple(_holding(store, environment_id, now) for environment_id in known),
        chunks=chunks,
        leftovers_bytes=_leftovers_bytes(layout),
    )


def leftovers(layout: Layout) -> list[Path]:
    """Prefixes that no ready mark speaks of: of builds that were interrupted, or of evictions.

    What has another name than a prefix is not ours.
    """
    marked = {name[:SHORT_ID_LENGTH] for name in os.listdir(layout.ready_marks)}
    names = [name for name in os.listdir(layout.envs) if _PREFIX_NAME.fullmatch(name)]
    return [layout.envs / name for name in names if name not in marked]


def last_used(layout: Layout, environment_id: EnvironmentId) -> float:
    """When somebody packed, brought, built or last started from an environment (seconds since the epoch)."""
    times = [0.0]
    for path in (layout.manifest(environment_id), layout.ready(environment_id), layout.lease(environment_id)):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def settle_times(store: Store, now: float) -> None:
    """Put times that are still to come to *now* (seconds since the epoch): what they are of ages from then on.

    While a clock is wrong, or after it was, things are noted as used in years that it takes years to get to.
    """
    layout = store.layout
    for folder in (layout.manifests, layout.ready_marks, layout.leases):
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_digest(entry.name.partition(".")[0]):
                    _settle(entry, now)
    for digest, entry in chunk_files(layout):
        with contextlib.suppress(OSError):
            found = entry.stat()
            if _in_the_past(found.st_mtime, now) != found.st_mtime:
                store.lost([digest])  # which tells by a file's times whether it was read since the machine started
                _settle(entry, now)


def _settle(entry: os.DirEntry[str], now: float) -> None:
    with contextlib.suppress(OSError):
        written = os.stat(entry.path).st_mtime
        settled = _in_the_past(written, now)
        if settled != written:
            os.utime(entry.path, (settled, settled))


def _in_the_past(noted: float, now: float) -> float:
    """A time that was noted, or *now* if that is still to come: in whole seconds, as every file system can note it."""
    return noted if noted <= time.time() + CLOCK_LEEWAY_S else math.floor(now)


def needed_chunks(store: Store) -> set[Digest]:
    """Every chunk that a manifest in any store of this host names."""
    return _named_by(store, store.environments())


def needed_elsewhere(store: Store) -> set[Digest]:
    """Every chunk that a manifest in a read-only store names; the writable one may be listed among those, too."""
    own = os.path.realpath(store.layout.root)
    others = [layout for layout in store.layouts[:-1] if os.path.realpath(layout.root) != own]
    return _named_by(store, {environment_id for layout in others for environment_id in store.environments_in(layout)})


def _named_by(store: Store, environments: Iterable[EnvironmentId]) -> set[Digest]:
    found: set[Digest] = set()
    for environment_id in environments:
        with contextlib.suppress(EnvshipError):
            found.update(store.read_manifest(environment_id).chunks)
    return found


def chunk_files(layout: Layout) -> Iterator[tuple[Digest, os.DirEntry[str]]]:
    """Every chunk's file, with the digest that it is named by."""
    for folder in layout.chunks.iterdir():
        with contextlib.suppress(NotADirectoryError, FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.partition(".")[0]
                if is_digest(name):
                    yield Digest(name), entry


def _holding(store: Store, environment_id: EnvironmentId, now: float) -> Holding:
    layout = store.layout
    prefix = layout.prefix(environment_id)
    lease = Lease(layout.lease(environment_id))
    in_use = False
    with contextlib.suppress(OSError):  # a file that cannot be opened: whoever evicts says so
        in_use = layout.lease(environment_id).exists() and not lease.is_free()
    if in_use:
        with contextlib.suppress(OSError):
            os.utime(lease.path)
    own_bytes = 0
    shared: dict[int, int] = {}
    # A file may have several names inside of one prefix; it is shared if it has more than we see here.
    seen: dict[int, int] = {}
    for inode, size, names in _files(prefix):
        if names == 1:
            own_bytes += size
        else:
            seen[inode] = seen.get(inode, 0) + 1
            if seen[inode] == names:
                own_bytes += size
                shared.pop(inode, None)
            else:
                shared[inode] = size
    chunks: Collection[Digest] = ()
    with contextlib.suppress(EnvshipError):
        chunks = frozenset(store.read_manifest(environment_id).chunks)
    built = layout.ready(environment_id).exists()
    used_at = time.time() if in_use else _in_the_past(last_used(layout, environment_id), now)
    builders = holders(layout.lock(environment_id))
    return Holding(environment_id, built, in_use, used_at, own_bytes, shared, chunks, builders)


def _chunks(layout: Layout) -> tuple[dict[Digest, int], dict[Digest, float]]:
    sizes: dict[Digest, int] = {}
    written_at: dict[Digest, float] = {}
    for digest, entry in chunk_files(layout):
        with contextlib.suppress(OSError):
            found = entry.stat()
            sizes[digest] = sizes.get(digest, 0) + found.st_blocks * BLOCK_BYTES
            written_at[digest] = max(written_at.get(digest, 0.0), found.st_mtime)
    return sizes, written_at


def _leftovers_bytes(layout: Layout) -> int:
    """What prefixes take up that no ready mark speaks of, and what nobody makes any more."""
    found_bytes = 0
    folders = [str(path) for path in leftovers(layout)]
    for entry in scratch.abandoned(layout, scratch.EVICTED):
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        else:
            with contextlib.suppress(OSError):
                found_bytes += entry.stat(follow_symlinks=False).st_blocks * BLOCK_BYTES
    return found_bytes + sum(size for folder in folders for _, size, _ in _files(folder))


def _files(folder: str | Path) -> Iterator[tuple[int, int, int]]:
    """(inode, bytes on disk, number of names) of all that lies in *folder*; a file once for each of its names."""
    waiting = [str(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder:
                    waiting.append(entry.path)
                yield found.st_ino, found.st_blocks * BLOCK_BYTES, 1 if is_folder else found.st_nlink
