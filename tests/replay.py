"""A disk that forgets: what a power cut may leave of a recorded run.

`record` runs a program under ``strace``. `Disk` replays the system calls up to a cut and keeps apart what a running
system sees and what is on disk: a file's bytes by its own fsync, names by an fsync of their folder, everything by
syncfs. `Disk.crash` makes a real folder of one of the many states that a cut may leave: of what nobody synced, anything
may be there or not. That is weaker than what ext4 or xfs promise, and about what POSIX does.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Union

import pytest

REPLAY_MARKS = [
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
    pytest.mark.skipif(
        shutil.which("strace") is not None
        and subprocess.run(["strace", "-qq", "true"], capture_output=True, check=False).returncode != 0,
        reason="tracing is not allowed here",
    ),
]
"""For every module that records runs."""

SYNCS = ("fsync", "fdatasync", "syncfs", "sync")
CALLS = (
    *("openat", "open", "creat", "write", "pwrite64", "rename", "renameat", "renameat2", "link", "linkat", "symlink"),
    *("symlinkat", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "ftruncate", "truncate", "fchmod", "chmod"),
    *("fchmodat", "utimensat", *SYNCS),
)
_LINE = re.compile(r"\d+ +(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?[^>]*$")
_UNFINISHED = "<unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_ARGUMENT = re.compile(
    r'"((?:\\x[0-9a-f]{2})*)"| *(AT_FDCWD|\d+)<((?:\\x[0-9a-f]{2})*)>|([^,"<>{}]+|\{[^}]*\}|\[[^]]*\])'
)

Argument = Union[bytes, str, "Opened"]


class Opened(NamedTuple):
    """A file descriptor among the arguments of a call, as the path that it was opened by."""

    path: str


class Call(NamedTuple):
    """A system call that succeeded. *result* is what was opened."""

    name: str
    arguments: tuple[Argument, ...]
    result: str | None


def record(program: str, *arguments: str, trace: Path) -> list[Call]:
    """Run a Python program under ``strace``; return its calls. It must end with 0."""
    flags = ["-f", "-y", "-xx", "-s", "100000000", "-e", "signal=none"]
    subprocess.run(
        ["strace", *flags, "-e", "trace=" + ",".join(CALLS), "-o", trace, sys.executable, "-c", program, *arguments],
        check=True,
        timeout=120,
    )
    lines = _whole_lines(trace.read_text().splitlines())
    return [call for line in lines if (call := _parse(line)) is not None]


def _whole_lines(lines: Iterable[str]) -> Iterator[str]:
    """A call that another thread's call interrupts takes two lines; it counts where it ends."""
    begun: dict[str, str] = {}
    for line in lines:
        number, _, rest = line.partition(" ")
        if line.endswith(_UNFINISHED):
            begun[number] = line[: -len(_UNFINISHED)]
        elif (match := _RESUMED.match(rest.strip())) and number in begun:
            yield begun.pop(number) + rest.strip()[match.end() :]
        else:
            yield line


def _parse(line: str) -> Call | None:
    match = _LINE.match(line)
    if match is None or match[1] not in CALLS or match[3].startswith("-"):
        return None
    arguments: list[Argument] = []
    for text, number, opened, other in _ARGUMENT.findall(match[2]):
        if number:
            arguments.append(Opened(_text(opened)))
        elif other:
            if other.strip():
                arguments.append(other.strip())
        else:
            arguments.append(bytes.fromhex(text.replace("\\x", "")))
    return Call(match[1], tuple(arguments), _text(match[4]) if match[4] else None)


def _text(escaped: str) -> str:
    return os.fsdecode(bytes.fromhex(escaped.replace("\\x", "")))


class Keep(NamedTuple):
    """The chances of what nobody synced: that it is on disk all the same."""

    names: float
    data: float
    attributes: float


NOTHING = Keep(0.0, 0.0, 0.0)
JOURNAL = Keep(1.0, 0.0, 1.0)
"""What a journal keeps: names, sizes, times and modes, of files whose bytes had not been written yet."""
KEEPS = (
    *(JOURNAL, Keep(1.0, 0.0, 0.0), Keep(0.0, 1.0, 1.0)),
    *(Keep(0.5, 0.5, 0.5), Keep(0.9, 0.2, 0.2), Keep(0.2, 0.0, 0.0)),
)


@dataclass(eq=False)
class Node:
    """A file, folder or link. Of a file, *synced* is what is on disk for sure."""

    kind: str
    data: bytes = b""
    mode: int = 0o644
    mtime_ns: int = 0
    names: dict[str, Node] = field(default_factory=dict)
    on_disk: dict[str, Node] = field(default_factory=dict)
    synced: tuple[bytes, int, int] = (b"", 0o600, 0)

    def sync(self) -> None:
        self.synced = (self.data, self.mode, self.mtime_ns)

    def left(self, chance: random.Random, keep: Keep) -> tuple[bytes, int, int]:
        """What a power cut leaves of a file: bytes and attributes may each be as synced, or as last seen."""
        data, mode, mtime_ns = self.synced
        if data != self.data:
            luck = chance.random()
            if luck < keep.data:
                data = self.data
            elif luck > (1 + keep.data) / 2:  # the size is on disk, of the bytes only some
                whole = chance.randrange(len(self.data) + 1)
                data = self.data[:whole].ljust(len(self.data), b"\0")
        if chance.random() < keep.attributes:
            mode, mtime_ns = self.mode, self.mtime_ns
        return data, mode, mtime_ns


class Change(NamedTuple):
    """A change of names that is not known to be on disk: *removed* and *added* as (folder, name[, what])."""

    removed: tuple[tuple[Node, str], ...]
    added: tuple[tuple[Node, str, Node], ...]

    def touches(self, folder: Node) -> bool:
        return any(folder is each[0] for each in (*self.removed, *self.added))

    def apply(self) -> None:
        for folder, name in self.removed:
            folder.on_disk.pop(name, None)
        for folder, name, node in self.added:
            folder.on_disk[name] = node


class Disk:
    """Everything below *root*, which is empty at first (or holds a copy of *start*, safely on disk)."""

    def __init__(self, root: Path, start: Path | None = None) -> None:
        self.root = str(root)
        self.top = Node("folder")
        self.pending: list[Change] = []
        self.files: list[Node] = []
        if start is not None:
            self._load(self.top, start, {})
            self._sync_everything()

    # -- what happens

    def replay(self, calls: Iterable[Call]) -> None:
        for call in calls:
            handler = getattr(self, "_do_" + call.name.rstrip("64").replace("at2", "at"), None)
            if handler is not None:
                handler(call)

    def _do_openat(self, call: Call) -> None:
        flags = next(part for part in call.arguments if isinstance(part, str) and part.startswith("O_"))
        path = call.result
        if path is None or not self._inside(path):
            return
        parent, name = self._parent(path)
        node = parent.names.get(name) if name else parent
        if node is None:
            node = Node("file", mode=0o600)
            self.files.append(node)
            self._change((), ((parent, name, node),))
        elif "O_TRUNC" in flags:
            node.data = b""

    _do_open = _do_creat = _do_openat

    def _do_write(self, call: Call) -> None:
        node = self._opened(call)
        if node is not None and isinstance(call.arguments[1], bytes):
            node.data += call.arguments[1]

    def _do_pwrite(self, call: Call) -> None:
        node = self._opened(call)
        if node is not None and isinstance(call.arguments[1], bytes):
            offset = int(str(call.arguments[3]))
            data, new = node.data.ljust(offset, b"\0"), call.arguments[1]
            node.data = data[:offset] + new + data[offset + len(new) :]

    def _do_ftruncate(self, call: Call) -> None:
        node = self._opened(call)
        if node is not None:
            size = int(str(call.arguments[1]))
            node.data = node.data[:size].ljust(size, b"\0")

    def _do_fchmod(self, call: Call) -> None:
        node = self._opened(call)
        if node is not None:
            node.mode = int(str(call.arguments[1]), 8)

    def _do_chmod(self, call: Call) -> None:
        (path,) = self._paths(call)
        node = self._find(path)
        if node is not None:
            node.mode = int(str(call.arguments[-1] if call.name == "chmod" else call.arguments[2]), 8)

    _do_fchmodat = _do_chmod

    def _do_utimensat(self, call: Call) -> None:
        paths = self._paths(call)
        node = self._find(paths[0]) if paths else self._opened(call)
        seconds = re.findall(r"tv_sec=(\d+)", str(call.arguments))
        if node is not None and seconds:
            node.mtime_ns = int(seconds[-1]) * 10**9

    def _do_mkdir(self, call: Call) -> None:
        (path,) = self._paths(call)
        if self._inside(path) and path != self.root:
            parent, name = self._parent(path)
            self._change((), ((parent, name, Node("folder", mode=0o755)),))

    _do_mkdirat = _do_mkdir

    def _do_rename(self, call: Call) -> None:
        old, new = self._paths(call)
        if self._inside(old) and self._inside(new):
            (source, name), (target, new_name) = self._parent(old), self._parent(new)
            self._change(((source, name),), ((target, new_name, source.names[name]),))

    _do_renameat = _do_rename

    def _do_link(self, call: Call) -> None:
        old, new = self._paths(call)
        node = self._find(old)
        if node is not None and self._inside(new):
            parent, name = self._parent(new)
            self._change((), ((parent, name, node),))

    _do_linkat = _do_link

    def _do_symlink(self, call: Call) -> None:
        target = next(part for part in call.arguments if isinstance(part, bytes))
        path = self._paths(call)[-1]
        if self._inside(path):
            parent, name = self._parent(path)
            node = Node("link", data=target)
            node.sync()  # where a link leads is stored with its name
            self._change((), ((parent, name, node),))

    _do_symlinkat = _do_symlink

    def _do_unlink(self, call: Call) -> None:
        (path,) = self._paths(call)
        if self._inside(path):
            parent, name = self._parent(path)
            self._change(((parent, name),), ())

    _do_unlinkat = _do_rmdir = _do_unlink

    def _do_fsync(self, call: Call) -> None:
        node = self._opened(call)
        if node is None:
            return
        if node.kind == "file":
            node.sync()
            return
        for change in [change for change in self.pending if change.touches(node)]:
            change.apply()
            self.pending.remove(change)

    _do_fdatasync = _do_fsync

    def _do_syncfs(self, call: Call) -> None:
        self._sync_everything()

    _do_sync = _do_syncfs

    # -- what is left

    def crash(self, target: Path, chance: random.Random, keep: Keep) -> None:
        """Make *target* what a power cut may leave now."""
        # In one folder, changes get to the disk in their order.
        until: dict[int, bool] = {}
        for change in self.pending:
            folders = [each[0] for each in (change.added or change.removed)]
            if all(until.get(id(folder), True) for folder in folders) and chance.random() < keep.names:
                change.apply()
            else:
                until.update({id(folder): False for folder in folders})
        made: dict[int, Path] = {}
        self._make(self.top, target, chance, keep, made)

    def _make(self, node: Node, path: Path, chance: random.Random, keep: Keep, made: dict[int, Path]) -> None:
        if node.kind == "folder":
            path.mkdir(exist_ok=True)
            for name, child in node.on_disk.items():
                self._make(child, path / name, chance, keep, made)
            path.chmod(node.mode | 0o700)
            os.utime(path, ns=(node.mtime_ns, node.mtime_ns))
        elif node.kind == "link":
            os.symlink(os.fsdecode(node.data), path)
        elif id(node) in made:
            os.link(made[id(node)], path)
        else:
            data, mode, mtime_ns = node.left(chance, keep)
            path.write_bytes(data)
            path.chmod(mode)
            os.utime(path, ns=(mtime_ns, mtime_ns))
            made[id(node)] = path

    # -- names

    def _change(self, removed: tuple[tuple[Node, str], ...], added: tuple[tuple[Node, str, Node], ...]) -> None:
        for folder, name in removed:
            folder.names.pop(name, None)
        for folder, name, node in added:
            folder.names[name] = node
        self.pending.append(Change(removed, added))

    def _sync_everything(self) -> None:
        for change in self.pending:
            change.apply()
        self.pending.clear()
        for node in self.files:
            node.sync()

    def _load(self, node: Node, path: Path, known: dict[int, Node]) -> None:
        for entry in os.scandir(path):
            found = entry.stat(follow_symlinks=False)
            child = known.get(found.st_ino)
            if child is None:
                kind = "link" if entry.is_symlink() else "folder" if entry.is_dir() else "file"
                child = known[found.st_ino] = Node(kind, mode=found.st_mode & 0o7777, mtime_ns=found.st_mtime_ns)
            if child.kind == "folder":
                self._load(child, Path(entry.path), known)
            elif child.kind == "link":
                child.data = os.fsencode(os.readlink(entry.path))
            else:
                child.data = Path(entry.path).read_bytes()
                self.files.append(child)
            self._change((), ((node, entry.name, child),))

    def _inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + "/")

    def _parent(self, path: str) -> tuple[Node, str]:
        parts = [part for part in path[len(self.root) :].split("/") if part]
        node = self.top
        for part in parts[:-1]:
            node = node.names[part]
        return node, parts[-1] if parts else ""

    def _find(self, path: str) -> Node | None:
        if not self._inside(path):
            return None
        try:
            parent, name = self._parent(path)
        except KeyError:
            return None
        return parent.names.get(name) if name else parent

    def _opened(self, call: Call) -> Node | None:
        first = call.arguments[0]
        return self._find(first.path) if isinstance(first, Opened) else None

    def _paths(self, call: Call) -> list[str]:
        """The paths among the arguments, absolute: each may follow the folder that it is relative to."""
        found = []
        folder = ""
        for argument in call.arguments:
            if isinstance(argument, Opened):
                folder = argument.path
            elif isinstance(argument, bytes):
                found.append(os.path.normpath(os.path.join(folder, os.fsdecode(argument))))
        return found[-1:] if call.name.startswith("symlink") else found


def without(calls: Iterable[Call], unwanted: Callable[[Call], bool]) -> list[Call]:
    """The calls as they would be had nobody made those that are *unwanted*."""
    return [call for call in calls if not unwanted(call)]
