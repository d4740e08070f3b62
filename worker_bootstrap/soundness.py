"""A quick look at a built environment before it is used: is something missing, did somebody edit it?

Building gives every file and folder of an environment one fixed time of modification and keeps an *inventory* of their
names. Whoever adds, removes or replaces a file changes the time of its folder, and whoever edits one in place that of
the file. So one ``stat`` per folder finds every name that is missing or was replaced, and files are sampled.

What it cannot find: an edit in place outside of folders that changed and outside of the sample; an edit whose author
put the time back; a changed mode; a disk that returns other bytes than were written. `worker_bootstrap.verify` finds
all of these, and takes as long as reading everything. Added files are passed over here: programs leave caches behind.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.durable import content_of, publish
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

_HEADER = b"envship-inventory 1"


class Inventory(NamedTuple):
    """The names in a prefix, relative to it, as the file system has them. *links* maps each to its target."""

    folders: tuple[bytes, ...]
    files: tuple[bytes, ...]
    links: dict[bytes, bytes]

    @classmethod
    def of(cls, blueprint: Blueprint) -> Inventory:
        """What building *blueprint* makes."""
        files = [file.path for run in blueprint.runs for file in run.files]
        files += [hard_link.path for hard_link in blueprint.hard_links]
        links = _encoded([link.path for link in blueprint.links])
        targets = _encoded([link.target for link in blueprint.links])
        return cls((b"", *_encoded(blueprint.directories)), _encoded(files), dict(zip(links, targets)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Inventory:
        """Read what `to_bytes` wrote.

        Raises
        ------
        ValueError
            If it is not whole.
        """
        first, _, rest = data.partition(b"\n")
        header, folders, files, links = first.rsplit(b" ", 3)
        counts = int(folders), int(files), int(links)
        names = tuple(rest.split(b"\0"))
        if header != _HEADER or len(names) != counts[0] + counts[1] + 2 * counts[2] + 1 or names[-1]:
            raise ValueError("an inventory that is not whole")
        after_files = counts[0] + counts[1]
        pairs = names[after_files:-1]
        return cls(names[: counts[0]], names[counts[0] : after_files], dict(zip(pairs[::2], pairs[1::2])))

    def to_bytes(self) -> bytes:
        """A header with the three counts, then every name (and target) followed by a NUL, which none can hold."""
        counts = b" %d %d %d\n" % (len(self.folders), len(self.files), len(self.links))
        names = [*self.folders, *self.files, *(part for link in self.links.items() for part in link)]
        return _HEADER + counts + b"\0".join((*names, b""))


def _encoded(names: Sequence[str]) -> tuple[bytes, ...]:
    """*names* as the file system has them: all at once, for there may be 100,000."""
    return tuple(os.fsencode("\0".join(names)).split(b"\0")) if names else ()


def seal(layout: Layout, environment_id: EnvironmentId, blueprint: Blueprint, root: str) -> None:
    """Give all folders below *root* their time, and keep the inventory. Before the ready mark is written."""
    set_times(root, (*blueprint.directories, ""))
    keep_inventory(layout, environment_id, blueprint)


def set_times(root: str, folders: Iterable[str]) -> None:
    """Give *folders* of *root* (``""`` for itself) the time that says that nothing was added or removed since."""
    for path in folders:
        os.utime(f"{root}/{path}", ns=(WRITTEN_AT_NS, WRITTEN_AT_NS))


def keep_inventory(layout: Layout, environment_id: EnvironmentId, blueprint: Blueprint) -> None:
    """Keep the names of everything that building *blueprint* makes."""
    publish(layout.inventory(environment_id), Inventory.of(blueprint).to_bytes(), layout.tmp, sync=False)


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
    prefix = os.fsencode(layout.prefix(environment_id))
    try:
        inventory = Inventory.from_bytes(content_of(layout.inventory(environment_id), INVENTORY_LIMIT_BYTES) or b"")
    except ValueError:
        yield str(layout.inventory(environment_id))
        return
    changed = {folder for folder in inventory.folders if not _is_as_written(prefix + b"/" + folder, stat.S_IFDIR)}
    if changed:
        yield from _look_closely(prefix, inventory, changed)
    for path in _sampled(inventory.files, max(SAMPLE, looks - len(inventory.folders))):
        if not _is_as_written(prefix + b"/" + path, stat.S_IFREG):
            yield os.fsdecode(path)


def _look_closely(prefix: bytes, inventory: Inventory, changed: set[bytes]) -> Iterator[str]:
    """What is wrong in folders in which something was added, removed or replaced, or which are gone."""
    for path in inventory.files:
        if path.rpartition(b"/")[0] in changed and not _is_as_written(prefix + b"/" + path, stat.S_IFREG):
            yield os.fsdecode(path)
    for path, target in inventory.links.items():
        if path.rpartition(b"/")[0] in changed and not _leads_to(prefix + b"/" + path, target):
            yield os.fsdecode(path)
    for path in changed:
        if not _is_folder(prefix + b"/" + path):
            yield os.fsdecode(path)


def _is_as_written(path: bytes, kind: int) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return found.st_mtime_ns == WRITTEN_AT_NS and stat.S_IFMT(found.st_mode) == kind


def _is_folder(path: bytes) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)  # a link to one is none
    except OSError:
        return False


def _leads_to(path: bytes, target: bytes) -> bool:
    try:
        return os.readlink(path) == target
    except OSError:
        return False


def _sampled(files: tuple[bytes, ...], count: int) -> Iterable[bytes]:
    """Some of *files*: neighbours, since their folder is in the kernel's cache after the first; others each time."""
    if len(files) <= count:
        return files
    start = random.randrange(len(files))
    return (*files[start : start + count], *files[: max(0, start + count - len(files))])
