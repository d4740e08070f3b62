"""Files that a new environment takes over from environments built in the same store.

What two environments have in common, unchanged, is shared on disk: as a reflink where the file system has them, as a
hard link elsewhere, so that a one-package change costs links, not an unpack. A file that somebody edited is not taken:
every file that we write has one fixed time of modification, and an edit changes it. Files that name their prefix are
never shared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from worker_bootstrap import ready_mark
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import EnvshipError, SettingInvalid
from worker_bootstrap.handles import opened_folder
from worker_bootstrap.layout import WRITTEN_AT_NS
from worker_bootstrap.manifest import File, Listing, Manifest, Package
from worker_bootstrap.store import Store

LINK_MODES = ("auto", "reflink", "hardlink", "copy")
DONOR_LIMIT = 4
"""Environments looked at, the last built first: reading a manifest takes some 10 ms."""

NO_SUCH_WAY = frozenset((errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.EPERM))
"""Answers of a file system that does not share files like that, or of a kernel that does not allow it."""

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int), the same on all architectures that Python has wheels for


class Donors:
    """Gives files of other environments to a new one, as long as that works.

    Parameters
    ----------
    sources
        Path in the prefix to the prefix of an environment that has the same file there; see `find`.
    link_mode
        ``reflink``, ``hardlink``, ``auto`` (the first of these that works), or ``copy`` (nothing is shared).

    Raises
    ------
    SettingInvalid
        For any other link mode.

    Notes
    -----
    Safe to use from several threads. A donor that is evicted meanwhile, or damaged in whatever way, is one that has
    nothing to give.
    """

    def __init__(self, sources: Mapping[str, Path], link_mode: str) -> None:
        if link_mode not in LINK_MODES:
            raise SettingInvalid("link-mode", link_mode, "one of " + ", ".join(LINK_MODES))
        self._ways = {"auto": [_reflink, _hard_link], "reflink": [_reflink], "hardlink": [_hard_link]}.get(
            link_mode, []
        )
        self._sources = sources if self._ways else {}

    def has(self, file: File) -> bool:
        """Whether there is a donor for *file* (which may turn out not to be able to give it)."""
        return bool(self._ways) and file.path in self._sources

    def give(self, files: Iterable[File], root: int) -> frozenset[str]:
        """Make *files* below the folder behind the handle *root*; returns the paths of those that no donor has.

        What a donor has, but somebody touched, counts as not had.
        """
        sources = self._sources
        with contextlib.ExitStack() as stack:
            handles: dict[Path, int | None] = {}

            def is_given(file: File) -> bool:
                prefix = sources.get(file.path)
                if prefix is None:
                    return False
                if prefix not in handles:
                    handles[prefix] = None
                    with contextlib.suppress(OSError):  # evicted meanwhile
                        handles[prefix] = stack.enter_context(opened_folder(prefix))
                donor = handles[prefix]
                return donor is not None and self._give(file, donor, root)

            return frozenset(file.path for file in files if not is_given(file))

    def _give(self, file: File, donor: int, root: int) -> bool:
        for way in tuple(self._ways):
            try:
                if not _is_untouched(donor, file):
                    return False
                way(donor, root, file)
                return True
            except OSError as error:
                if error.errno not in NO_SUCH_WAY:
                    # Of this file, evicted or damaged, or of where it is to lie: whoever writes it there finds out.
                    return False
                with contextlib.suppress(ValueError):  # another thread found out at the same time
                    self._ways.remove(way)
        return False


Donor = tuple[Manifest, Path]
"""An environment that is built, and where."""


def find(store: Store, manifest: Manifest, listings: Sequence[Listing], donors: Sequence[Donor]) -> dict[str, Path]:
    """For each file that one of *donors* has, unchanged: its path, and that environment's prefix."""
    found: dict[str, Path] = {}
    waiting = list(zip(manifest.packages, listings))
    for other, prefix in donors:
        theirs = {package.listing.digest for package in other.packages}
        rest = []
        for package, listing in waiting:
            if package.listing.digest in theirs:
                found.update((file.path, prefix) for file in listing.files if file.relocation is None)
            else:
                rest.append((package, listing))
        waiting = rest
        for package, listing in waiting:
            for file in _common(store, package, listing, other):
                found.setdefault(file.path, prefix)
    return found


def built(store: Store, manifest: Manifest) -> list[Donor]:
    """Environments that are built in *store*, the last one first, and may have something in common with *manifest*."""
    marks = []
    for mark in store.layout.ready_marks.iterdir():
        with contextlib.suppress(OSError):
            marks.append((mark.stat().st_mtime, mark.name))
    held = {str(environment_id): environment_id for environment_id in store.environments()}
    names = [name for _, name in sorted(marks, reverse=True) if name in held and name != manifest.id]
    found = []
    for name in names[:DONOR_LIMIT]:
        prefix = store.layout.prefix(held[name])
        if ready_mark.is_valid(store.layout.ready(held[name]), prefix):
            with contextlib.suppress(EnvshipError):
                found.append((store.read_manifest(held[name]), prefix))
    return found


def listings_of(donors: Sequence[Donor]) -> frozenset[Digest]:
    """The listings that were read, and checked, when *donors* were built."""
    return frozenset(package.listing.digest for manifest, _ in donors for package in manifest.packages)


def _common(store: Store, package: Package, listing: Listing, other: Manifest) -> Iterator[File]:
    """Files of a changed package that its counterpart has as well, and that do not name their prefix."""
    counterpart = next((p for p in other.packages if (p.name, p.kind) == (package.name, package.kind)), None)
    if counterpart is None:
        return
    try:
        theirs = set(Listing.from_bytes(store.read_chunk(counterpart.listing.digest)).files)
    except EnvshipError:  # evicted, or damaged: then there is nothing to compare with
        return
    yield from (file for file in listing.files if file.relocation is None and file in theirs)


def _is_untouched(donor: int, file: File) -> bool:
    found = os.stat(file.path, dir_fd=donor, follow_symlinks=False)
    mode = found.st_mode
    return (
        found.st_mtime_ns == WRITTEN_AT_NS
        and found.st_size == file.size_bytes
        and stat.S_ISREG(mode)
        and bool(mode & stat.S_IXUSR) == file.executable
    )


def _hard_link(donor: int, root: int, file: File) -> None:
    os.link(file.path, file.path, src_dir_fd=donor, dst_dir_fd=root, follow_symlinks=False)


def _reflink(donor: int, root: int, file: File) -> None:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    with contextlib.ExitStack() as stack:
        origin = os.open(file.path, os.O_RDONLY | flags, dir_fd=donor)
        stack.callback(os.close, origin)
        copy = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=root)
        stack.callback(os.close, copy)
        try:
            fcntl.ioctl(copy, _FICLONE, origin)
            seal(copy, file)
        except OSError:
            os.unlink(file.path, dir_fd=root)
            raise


def seal(handle: int, file: File) -> None:
    """Give a file that has been written its mode, and the time that says that nobody touched it since."""
    os.fchmod(handle, 0o755 if file.executable else 0o644)
    os.utime(handle, ns=(WRITTEN_AT_NS, WRITTEN_AT_NS))
