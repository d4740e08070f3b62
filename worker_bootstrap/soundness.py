"""A quick look at a built environment before it is used: is something missing, did somebody edit it?

Building gives every file and folder of an environment one fixed time of modification and keeps an *inventory* of their
names. Whoever adds, removes or replaces a file changes the time of its folder, and whoever edits one in place that of
the file. So one ``stat`` per folder finds every name that is missing or was replaced, and files are sampled.

What it cannot find: an edit in place outside of folders that changed and outside of the sample; an edit whose author
put the time back; a changed mode; a disk that returns other bytes than were written. `worker_bootstrap.verify` finds
all of these, and takes as long as reading everything. Added files are passed over here: programs leave caches behind.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.durable import content_of, publish
from worker_bootstrap.handles import opened_folder
from worker_bootstrap.layout import WRITTEN_AT_NS, Layout
from worker_bootstrap.mounts import NETWORK_FILE_SYSTEMS, file_system_of
from worker_bootstrap.store import Store

if TYPE_CHECKING:
    from worker_bootstrap.blueprint import Blueprint

LOOKS = 2000
"""Folders and files looked at in all. A ``stat`` takes 5-9 µs on a virtual machine: some 15 ms."""
SAMPLE = 500
"""Files looked at however many folders there are."""
INVENTORY_LIMIT_BYTES = 1 << 30

_HEADER = re.compile(rb"envship-inventory 2 (\d+) (\d+) (\d+) (\d+)")


class Inventory(NamedTuple):
    """The names in a prefix, relative to it, as the file system has them: each followed by a NUL, which none can hold.

    After each of *links* comes its target, after each of *made*, what was made there
    (`worker_bootstrap.relocated_code`), its digest. There may be 100,000: they are split when somebody asks for them.
    """

    folders: bytes
    files: bytes
    links: bytes
    made: bytes

    @classmethod
    def of(cls, blueprint: Blueprint, made: Mapping[str, Digest]) -> Inventory:
        """What building *blueprint* makes, and what else was *made* (path to digest)."""
        files = [file.path for run in blueprint.runs for file in run.files]
        files += [hard_link.path for hard_link in blueprint.hard_links]
        links = [text for link in blueprint.links for text in (link.path, link.target)]
        digests = [text for pair in made.items() for text in pair]
        return cls(_joined(["", *blueprint.directories]), _joined(files), _joined(links), _joined(digests))

    @classmethod
    def from_bytes(cls, data: bytes) -> Inventory:
        """Read what `to_bytes` wrote.

        Raises
        ------
        ValueError
            If it is not whole.
        """
        first, _, rest = data.partition(b"\n")
        header = _HEADER.fullmatch(first)
        ends = [*itertools.accumulate(map(int, header.groups()))] if header else [-1] * 4
        found = cls(*(rest[start:end] for start, end in zip([0, *ends], ends)))
        is_whole = ends[-1] == len(rest) and all(not part or part[-1] == 0 for part in found)
        if not is_whole or any(pairs.count(b"\0") % 2 for pairs in (found.links, found.made)):
            raise ValueError("an inventory that is not whole")
        return found

    def to_bytes(self) -> bytes:
        """A header with the four sizes, then all of it."""
        return b"envship-inventory 2 %d %d %d %d\n" % tuple(map(len, self)) + b"".join(self)


def _joined(names: Sequence[str]) -> bytes:
    return os.fsencode("\0".join((*names, ""))) if names else b""


def _split(names: bytes) -> list[bytes]:
    return names.split(b"\0")[:-1]


def _pairs(names: bytes) -> Iterator[tuple[bytes, bytes]]:
    parts = iter(_split(names))
    return zip(parts, parts)


def seal(
    layout: Layout, environment_id: EnvironmentId, blueprint: Blueprint, made: Mapping[str, Digest], root: str
) -> None:
    """Give all folders below *root* their time, and keep the inventory. Before the ready mark is written."""
    set_times(root, (*blueprint.directories, ""))
    keep_inventory(layout, environment_id, blueprint, made)


def set_times(root: str, folders: Iterable[str]) -> None:
    """Give *folders* of *root* (``""`` for itself) the time that says that nothing was added or removed since."""
    with opened_folder(root) as handle:
        for path in folders:
            os.utime(path or ".", ns=(WRITTEN_AT_NS, WRITTEN_AT_NS), dir_fd=handle)


def keep_inventory(
    layout: Layout, environment_id: EnvironmentId, blueprint: Blueprint, made: Mapping[str, Digest]
) -> None:
    """Keep the names of everything that building *blueprint* makes, and the digests of what else was *made*."""
    publish(layout.inventory(environment_id), Inventory.of(blueprint, made).to_bytes(), layout.tmp, sync=False)


def made_there(layout: Layout, environment_id: EnvironmentId) -> dict[str, Digest] | None:
    """What was made where an environment was built, and is in no listing: path to digest; None if that is not known."""
    try:
        inventory = _inventory(layout, environment_id)
    except ValueError:
        return None
    return {os.fsdecode(path): Digest(digest.decode("ascii", "replace")) for path, digest in _pairs(inventory.made)}


def _inventory(layout: Layout, environment_id: EnvironmentId) -> Inventory:
    """Raises `ValueError` if there is none that is whole."""
    return Inventory.from_bytes(content_of(layout.inventory(environment_id), INVENTORY_LIMIT_BYTES) or b"")


def sound_prefix(store: Store, environment_id: EnvironmentId) -> Path | None:
    """The prefix that `Store.built` gives, if a quick look finds nothing wrong with it.

    A store on a network file system is taken as it is, unless its interpreter is missing: thousands of machines that
    ask its server for every folder at once would be worse than what they might find.
    """
    layout = store.built_in(environment_id)
    if layout is None:
        return None
    prefix = layout.prefix(environment_id)
    if layout is not store.layout and file_system_of(prefix) in NETWORK_FILE_SYSTEMS:
        return prefix if os.access(prefix / "bin", os.X_OK) else None
    return prefix if next(damage(layout, environment_id), None) is None else None


def damage(layout: Layout, environment_id: EnvironmentId, looks: int = LOOKS) -> Iterator[str]:
    """Paths in a built environment that are missing or were altered, as far as a quick look can tell.

    Without an inventory, or with one that is damaged, the answer is the path of that.
    """
    prefix = layout.prefix(environment_id)
    try:
        inventory = _inventory(layout, environment_id)
    except ValueError:
        yield str(layout.inventory(environment_id))
        return
    try:
        with opened_folder(prefix) as root:
            yield from map(os.fsdecode, _damage(root, inventory, looks))
    except OSError:
        yield str(prefix)


def _damage(root: int, inventory: Inventory, looks: int) -> Iterator[bytes]:
    folders = _split(inventory.folders)
    changed = {folder for folder in folders if not _is_as_written(root, folder, stat.S_IFDIR)}
    if changed:
        yield from _look_closely(root, inventory, changed)
    for path in _sampled(inventory.files, max(SAMPLE, looks - len(folders))):
        if not _is_as_written(root, path, stat.S_IFREG):
            yield path


def _look_closely(root: int, inventory: Inventory, changed: set[bytes]) -> Iterator[bytes]:
    """What is wrong in folders in which something was added, removed or replaced, or which are gone."""
    for path in _split(inventory.files):
        if path.rpartition(b"/")[0] in changed and not _is_as_written(root, path, stat.S_IFREG):
            yield path
    for path, target in _pairs(inventory.links):
        if path.rpartition(b"/")[0] in changed and not _leads_to(root, path, target):
            yield path
    for path in changed:
        if not _is_folder(root, path):
            yield path


def _is_as_written(root: int, path: bytes, kind: int) -> bool:
    try:
        found = os.stat(path or b".", dir_fd=root, follow_symlinks=False)
    except OSError:
        return False
    return found.st_mtime_ns == WRITTEN_AT_NS and stat.S_IFMT(found.st_mode) == kind


def _is_folder(root: int, path: bytes) -> bool:
    try:
        # A link to one is none.
        return stat.S_ISDIR(os.stat(path or b".", dir_fd=root, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _leads_to(root: int, path: bytes, target: bytes) -> bool:
    try:
        return os.readlink(path, dir_fd=root) == target
    except OSError:
        return False


def _sampled(names: bytes, count: int) -> list[bytes]:
    """Some of *names*: neighbours, since their folder is in the kernel's cache after the first; others each time."""
    if names.count(b"\0") <= count:
        return _split(names)
    start = names.find(b"\0", random.randrange(len(names) - 1)) + 1
    found = names[start:].split(b"\0", count)[:-1]
    return found + names.split(b"\0", count - len(found))[: count - len(found)]
