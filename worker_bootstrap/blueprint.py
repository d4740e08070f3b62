"""What will be written where: all listings of an environment, checked together before anything is written.

A listing is valid by itself (`worker_bootstrap.manifest`); whether a path is used twice, lies below a file or a link,
or a chain of links leaves the prefix, shows only when all packages are looked at. Pure: no I/O.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from typing import Callable, NamedTuple

from worker_bootstrap import relocate
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import ManifestInvalid, MaterialiseError, PrefixTooLong
from worker_bootstrap.manifest import (
    ENTRY_LIMIT,
    Chunk,
    Directory,
    Entry,
    File,
    HardLink,
    Link,
    Listing,
    Manifest,
)
from worker_bootstrap.paths import PATH_LIMIT

RELOCATABLE_LIMIT_BYTES = 1 << 30
"""A file that names its prefix is relocated in memory; the largest real ones (LLVM, Qt) have some 150 MB."""
BLOCK_BYTES = 4096
"""What a file occupies is rounded up to this on common file systems."""
DIRECTORY_LIMIT_CHARACTERS = 256 << 20
"""Of all names of directories together: a few MB of long paths could stand for gigabytes of them."""
PROBLEM_LIMIT = 20


class Run(NamedTuple):
    """Some consecutive files of a package and the chunks whose bytes are exactly theirs: what one thread writes."""

    files: tuple[File, ...]
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        return sum(chunk.size_bytes for chunk in self.chunks)


class Blueprint(NamedTuple):
    """An environment as things to write, in this order: directories, runs, hard links, links.

    Links come last, so that there is none in the tree through which anything could be written.
    """

    directories: tuple[str, ...]
    runs: tuple[Run, ...]
    hard_links: tuple[HardLink, ...]
    links: tuple[Link, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of content to write."""
        return sum(run.size_bytes for run in self.runs)

    def needed_bytes(self, shared: Callable[[File], bool]) -> int:
        """Room that the files will take on disk, but for those that are *shared*."""
        sizes = (file.size_bytes for run in self.runs for file in run.files if not shared(file))
        return sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes) + BLOCK_BYTES * len(self.directories)

    @property
    def needed_inodes(self) -> int:
        return self.file_count + len(self.directories) + len(self.links)

    @property
    def file_count(self) -> int:
        return sum(len(run.files) for run in self.runs)


def read_listings(
    manifest: Manifest, read_chunk: Callable[[Digest], bytes], checked: Container[Digest] = ()
) -> list[Listing]:
    """The listing of each package, in their order.

    Parameters
    ----------
    manifest
        The environment.
    read_chunk
        Returns the verified bytes of a chunk.
    checked
        Listings that were read before, when an environment was built that has them as well.

    Raises
    ------
    ManifestInvalid
        If one breaks the format, has another size than the manifest says, or all hold too many entries. What lies
        behind that is not read.
    """
    listings: list[Listing] = []
    count = 0
    for package in manifest.packages:
        data = read_chunk(package.listing.digest)
        if len(data) != package.listing.size_bytes:
            reason = f"{len(data)} bytes, the manifest says {package.listing.size_bytes}"
            raise ManifestInvalid(reason, f"listing of {package.name!r}")
        read = Listing.from_checked_bytes if package.listing.digest in checked else Listing.from_bytes
        listings.append(read(data))
        count += len(listings[-1].entries)
        if count > ENTRY_LIMIT:
            raise ManifestInvalid(f"more than {ENTRY_LIMIT} entries", f"environment {manifest.id}")
    return listings


def draw(manifest: Manifest, listings: Sequence[Listing], prefix: str) -> Blueprint:
    """Check an environment as a whole and lay out how it is written to *prefix*.

    Parameters
    ----------
    manifest
        The environment.
    listings
        One for each of ``manifest.packages``, in their order.
    prefix
        Where it will run.

    Raises
    ------
    ManifestInvalid
        If sizes do not add up, a path is used twice or lies below something that is no directory, or a link leads
        out of the prefix. All such problems are listed (the first 20).
    PrefixTooLong
        If a binary file has no room for *prefix*.
    MaterialiseError
        If a file that must be relocated is too large for that, or a path below *prefix* too long for the system.
    """
    entries = [entry for listing in listings for entry in listing.entries]
    directories = _directories(entries)
    links = {entry.path: entry for entry in entries if isinstance(entry, Link)}
    problems = [*_conflicts(entries, directories), *_escapes(links.values())]
    runs: list[Run] = []
    for package, listing in zip(manifest.packages, listings):
        try:
            runs += split(tuple(listing.files), package.chunks)
        except ValueError as error:
            problems.append(f"package {package.name!r}: {error}")
    if problems:
        raise ManifestInvalid("; ".join(problems[:PROBLEM_LIMIT]), f"environment {manifest.id}")
    _check_lengths(manifest, entries, prefix)
    _check_relocations(manifest, runs, prefix)
    return Blueprint(
        directories=tuple(sorted(directories)),
        runs=tuple(runs),
        hard_links=tuple(entry for entry in entries if isinstance(entry, HardLink)),
        links=tuple(links.values()),
    )


def split(files: Sequence[File], chunks: Sequence[Chunk]) -> Iterator[Run]:
    """Split a package wherever a chunk ends together with a file.

    Raises
    ------
    ValueError
        If the files hold more or fewer bytes than the chunks.
    """
    in_files = in_chunks = 0
    run_files: list[File] = []
    run_chunks: list[Chunk] = []
    waiting = iter(chunks)
    for file in files:
        run_files.append(file)
        in_files += file.size_bytes
        while in_chunks < in_files:
            chunk = next(waiting, None)
            if chunk is None:
                raise ValueError(f"its files hold {sum(f.size_bytes for f in files)} bytes, its chunks {in_chunks}")
            run_chunks.append(chunk)
            in_chunks += chunk.size_bytes
        if in_chunks == in_files:
            yield Run(tuple(run_files), tuple(run_chunks))
            run_files, run_chunks = [], []
    if run_files or next(waiting, None) is not None:
        raise ValueError(f"its files hold {in_files} bytes, its chunks more")


def _directories(entries: Sequence[Entry]) -> set[str]:
    directories: set[str] = set()
    room = DIRECTORY_LIMIT_CHARACTERS
    last = ""
    for entry in entries:
        path = entry.path if isinstance(entry, Directory) else entry.path.rpartition("/")[0]
        if path == last:
            continue
        last = path
        while path and path not in directories:
            directories.add(path)
            room -= len(path)
            path = path.rpartition("/")[0]
        if room < 0:
            raise ManifestInvalid(f"more than {DIRECTORY_LIMIT_CHARACTERS} characters", "names of directories")
    return directories


def _conflicts(entries: Sequence[Entry], directories: set[str]) -> Iterator[str]:
    # Two packages may both ask for the same empty directory.
    paths = [entry.path for entry in entries if not isinstance(entry, Directory)]
    taken = set(paths)
    if len(taken) == len(paths) and taken.isdisjoint(directories):
        return
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            yield f"{path!r} stands in two packages"
        elif path in directories:
            yield f"{path!r} has entries below it and is no directory"
        seen.add(path)


def may_leave(links: Mapping[str, str]) -> list[str]:
    """The paths among *links* (path to target) that could lead out of the prefix together with others.

    Each target by itself stays inside (`paths.check_link`) as long as its ``..`` climb real directories; after a link,
    ``..`` climbs from wherever that one leads. That no link has another one as a parent is the caller's to see to.
    """
    return [path for path, target in links.items() if _climbs_after_link(path, target, links)]


def _escapes(links: Collection[Link]) -> Iterator[str]:
    targets = {link.path: link.target for link in links}
    for path in may_leave(targets):
        yield f"the link {path!r} may leave the prefix: {targets[path]!r}"


def _climbs_after_link(path: str, target: str, links: Container[str]) -> bool:
    here = path.split("/")[:-1]
    through_link = False
    for part in target.split("/"):
        if part == "..":
            if through_link or not here:
                return True
            here.pop()
        elif part not in ("", "."):
            here.append(part)
            through_link = through_link or "/".join(here) in links
    return False


def _check_lengths(manifest: Manifest, entries: Sequence[Entry], prefix: str) -> None:
    """Names are looked up from a handle of the prefix, where the system minds only what lies below."""
    room = PATH_LIMIT - len(os.fsencode(prefix)) - len("/")
    paths = [entry.path for entry in entries]
    if max(map(len, paths), default=0) <= room // 4:  # a character takes four bytes at most
        return
    for path in paths:
        if len(os.fsencode(path)) > room:
            raise MaterialiseError(manifest.id, path, f"file name too long: {room} bytes below {prefix} are left")


def _check_relocations(manifest: Manifest, runs: Sequence[Run], prefix: str) -> None:
    tightest: File | None = None
    for run in runs:
        for file in run.files:
            if file.relocation is None:
                continue
            if file.size_bytes > RELOCATABLE_LIMIT_BYTES:
                raise MaterialiseError(manifest.id, file.path, f"{file.size_bytes} bytes are too many to relocate")
            if not relocate.fits(file.relocation, prefix) and (tightest is None or _room(file) < _room(tightest)):
                tightest = file
    if tightest is not None:
        raise PrefixTooLong(manifest.id, tightest.path, prefix, _room(tightest))


def _room(file: File) -> int:
    assert file.relocation is not None
    return len(file.relocation.placeholder.encode("utf-8", "surrogateescape"))
