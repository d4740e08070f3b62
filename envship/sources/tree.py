"""The files below a folder, with what `lstat` says about each: one walk, no content read.

Byte code (``__pycache__``) is passed over: it follows from the sources, and importing a module must not look like a
change of the environment. See also `envship.scan_index`, which compares walks.
"""

from __future__ import annotations

import functools
import hashlib
import marshal
import operator
import os
import stat
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Union

FINE_TICK_NS = 50_000_000
"""Kernels stamp files with a clock that ticks every 1-10 ms; more, to be safe."""
COARSE_TICK_NS = 2_000_000_000
"""The coarsest clock of a file system still in use (FAT)."""


_IS_UTF8 = sys.getfilesystemencoding().lower().replace("-", "") == "utf8"


class Root(NamedTuple):
    """A folder (or a single file) to walk, without the relative paths and the folder names to pass over.

    With *suffixes*, files with other ones and empty folders do not count. Folders below it that hold something with a
    name among *skip_marks* are passed over. With *follow*, the folder may be reached by a symbolic link.
    """

    path: str
    skip_paths: tuple[str, ...] = ()
    skip_names: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    skip_marks: tuple[str, ...] = ()
    follow: bool = False


class SlimStatus(NamedTuple):
    """What is of use in an `os.stat_result`, in a third of the memory."""

    st_mode: int
    st_ino: int
    st_dev: int
    st_nlink: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int


Status = Union[os.stat_result, SlimStatus]
_fields_of = operator.attrgetter(*SlimStatus._fields)
_marking = operator.attrgetter("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_mode")


class Found(NamedTuple):
    """A file, link or empty folder: its absolute path, and what `lstat` says."""

    origin: str
    node: Status


@dataclass
class Walk:
    """What one walk of a root found.

    Attributes
    ----------
    nodes
        By relative path, sorted.
    changed_ns
        By absolute path of each folder: when an entry of it was last added, removed or replaced.
    unreadable
        One line for every folder that could not be looked into.
    """

    nodes: Mapping[str, Status] = field(default_factory=dict)
    changed_ns: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    @property
    def marks(self) -> Mapping[str, str]:
        """The `mark` of every path."""
        return {path: mark(path, node) for path, node in self.nodes.items()}

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """The `fingerprint` of everything."""
        return fingerprint(self.nodes, self.nodes.values())


class Trees:
    """Walks of roots, each done once; together, what a pack has seen of the file system.

    Parameters
    ----------
    earlier
        Walks that need not be done again; they count from when they are asked for.
    slim
        Whether to keep what is found in little memory, which takes a tenth longer.

    Attributes
    ----------
    started_ns
        Wall clock before the first walk: whatever was changed later has a later time stamp.
    """

    def __init__(self, earlier: Trees | None = None, slim: bool = False) -> None:
        self._slim = slim
        self.started_ns: int = earlier.started_ns if earlier else time.time_ns()
        self._earlier: Mapping[Root, Walk] = earlier._walked if earlier else {}
        self._walked: dict[Root, Walk] = {}
        self._visible: dict[Root, Mapping[str, Status]] = {}

    def walk(self, root: Root) -> Mapping[str, Status]:
        """Relative path to `lstat` result of every file, link and empty folder; ``""`` for a root that is a file.

        A root that does not exist has no files; a folder that cannot be read is `unreadable`.
        """
        nodes = self._walk(root).nodes
        return self._visible.get(root, nodes)

    def everything(self, root: Root) -> Mapping[str, Status]:
        """As `walk`, hidden or not."""
        return self._walk(root).nodes

    def found(self, root: Root, place: str = "") -> dict[str, Found]:
        """The walk of the folder *root* as paths in an environment where the folder lies at *place*."""
        before = place + "/" if place else ""
        walked = self.walk(root).items()
        return {before + portable(path): Found(f"{root.path}/{path}", node) for path, node in walked if path}

    def hide(self, root: Root, paths: Collection[str]) -> None:
        """Leave *paths* out of what `walk` and `found` tell of *root* from now on; they still count otherwise."""
        hidden = frozenset(paths)
        self._visible[root] = {path: node for path, node in self._walk(root).nodes.items() if path not in hidden}

    def show_all(self) -> None:
        """Hide nothing any more."""
        self._visible.clear()

    @property
    def roots(self) -> tuple[Root, ...]:
        """What has been walked so far, in that order."""
        return tuple(self._walked)

    @property
    def unreadable(self) -> list[str]:
        """One line for every folder that could not be looked into."""
        return [line for walk in self._walked.values() for line in walk.unreadable]

    def fingerprint(self) -> str:
        """A digest of everything walked: equal if no file was added, removed, replaced or written to."""
        state = hashlib.sha256()
        for root, walk in self._walked.items():
            state.update(repr(root).encode("utf-8", "surrogateescape") + walk.fingerprint)
        return state.hexdigest()

    def changed(self) -> list[str]:
        """Absolute paths of what was added, removed or replaced since the walks.

        What was written to in place is not looked for: who reads a file compares it with what the walk saw of it.
        """
        found = []
        for root, before in self._walked.items():
            if all(_changed_ns(folder) == then for folder, then in before.changed_ns.items()):
                continue
            try:
                now = _walk(root)
            except OSError as error:
                found.append(str(error.filename or root.path))
                continue
            found += [f"{root.path}/{path}".rstrip("/") for path, _ in before.marks.items() ^ now.marks.items()]
        return sorted(set(found))

    @property
    def is_settled(self) -> bool:
        """Whether every file was last changed long enough before the walk for its time stamp to tell of a change."""
        return all(is_settled(node, self.started_ns) for walk in self._walked.values() for node in walk.nodes.values())

    def _walk(self, root: Root) -> Walk:
        if root not in self._walked:
            self._walked[root] = self._earlier.get(root) or _walk(root, self._slim)
        return self._walked[root]


def portable(path: str) -> str:
    """*path*, a name from this machine's file system, as UTF-8 has it, whatever the locale of this process."""
    if path.isascii() or _IS_UTF8:
        return path
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def mark(path: str, node: Status) -> str:
    """What changes if the file at *path* is replaced or written to: the numbers that `_marking` takes."""
    return f"{path}\0{node.st_size} {node.st_mtime_ns} {node.st_ctime_ns} {node.st_ino} {node.st_mode}\0"


def fingerprint(paths: Iterable[str], nodes: Iterable[Status]) -> bytes:
    """A digest of what the `mark` of each of *paths*, with its node, tells: in half the time that these would take."""
    state = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape") + b"\0\0")
    # In the form without references between objects, which depends on nothing but the numbers.
    state.update(marshal.dumps(list(map(_marking, nodes)), 2))
    return state.digest()


def is_settled(node: Status, started_ns: int) -> bool:
    """False if a later change could bear the same time stamp ("racily clean", as git says)."""
    changed_ns = node.st_ctime_ns if node.st_ctime_ns > node.st_mtime_ns else node.st_mtime_ns
    tick_ns = FINE_TICK_NS if changed_ns % 1_000_000_000 else COARSE_TICK_NS
    return changed_ns < started_ns - tick_ns


def _changed_ns(folder: str) -> int:
    """When an entry of the folder was last added, removed or replaced; 0 if it is gone."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def _walk(root: Root, slim: bool = False) -> Walk:
    """What lies below *root*."""
    try:
        node = os.stat(root.path) if root.follow else os.lstat(root.path)
    except (FileNotFoundError, NotADirectoryError):
        return Walk()
    if not stat.S_ISDIR(node.st_mode):
        return Walk({"": node})
    found: dict[str, Status] = {}
    changed_ns: dict[str, int] = {}
    unreadable: list[str] = []
    names = frozenset((*root.skip_names, "__pycache__"))
    paths = frozenset(root.skip_paths)
    waiting = [("", root.path)]
    while waiting:
        relative, folder = waiting.pop()
        changed_ns[folder] = _changed_ns(folder)
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned) if root.skip_marks and relative else scanned
                if isinstance(entries, list) and any(entry.name in root.skip_marks for entry in entries):
                    continue
                is_empty = True
                for entry in entries:
                    is_empty = False
                    name = entry.name
                    path = relative + name
                    if name in names or path in paths:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((path + "/", entry.path))
                        continue
                    if root.suffixes and not name.endswith(root.suffixes):
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                        found[path] = SlimStatus._make(_fields_of(status)) if slim else status
                    except FileNotFoundError:
                        # Gone by now: as if it had gone a moment earlier.
                        continue
            if is_empty and relative and not root.suffixes:
                found[relative[:-1]] = os.lstat(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            if root.suffixes:
                # Nothing in it is asked for by name: what cannot be read there is not missed.
                continue
            unreadable.append(f"{folder} cannot be read: {error.strerror}")
    return Walk({path: found[path] for path in sorted(found)}, changed_ns, unreadable)
