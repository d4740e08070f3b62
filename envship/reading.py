"""From an item of a draft to its canonical bytes: reads files, asks for byte code, collects what cannot be read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from envship.bytecode import Compiler
from envship.canonical import Content, names_prefix
from envship.chunking import LIMIT_BYTES
from envship.large_files import LargeContent, large_content
from envship.sources.draft import CodeItem, FileItem, Plan

_HELD_BYTES = 4 << 20
"""So much text of modules is held until it is asked for a second time: in a folder, its byte code stands together."""


class Reader:
    """Reads the items of one plan. Safe to use from several threads; a context manager.

    Attributes
    ----------
    problems
        One line for every file that could not be read.
    doubts
        One line for every file that may not work elsewhere.
    changed
        Absolute paths of files that turned out to have changed since the walk.
    held_bytes
        Text of modules that has been read and will be asked for again.
    """

    def __init__(self, plan: Plan, kept: Path, tmp: Path) -> None:
        self.problems: list[str] = []
        self.doubts: list[str] = []
        self.changed: list[str] = []
        self.held_bytes = 0
        self._plan = plan
        self._kept = kept
        self._tmp = tmp
        self._compilers: dict[int, Compiler] = {}
        self._held: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for compiler in self._compilers.values():
            compiler.close()

    def content(self, item: FileItem) -> Content | None:
        """The canonical content of a file; None, and a problem, if it cannot be read."""
        data = self._text(item) if item.path.endswith(".py") else self._read(item)
        if data is None:
            return None
        content = item.treatment(data)
        if content.doubt:
            self.doubts.append(f"{item.path} {content.doubt}")
        return content

    def byte_code(self, item: CodeItem) -> bytes | None:
        """The byte code of a module; None if it has none, or names the prefix."""
        source = self._text(item)
        if source is None or names_prefix(source, self._plan.prefixes):
            return None
        return self._compiler().make(item, source)

    def large_content(self, item: FileItem) -> LargeContent:
        """The canonical content of a file that `is_streamed`.

        Raises
        ------
        OSError
            Now, or from its pieces: if the file cannot be read.
        """
        return large_content(lambda: self._pieces(item), item.treatment)

    def _pieces(self, item: FileItem) -> Iterator[bytes]:
        with open(item.origin, "rb") as file:
            self._compare(item, os.fstat(file.fileno()))
            while piece := file.read(LIMIT_BYTES):
                yield piece
            self._compare(item, os.fstat(file.fileno()))

    def note(self, item: FileItem | CodeItem, error: OSError) -> None:
        """A file could not be read: it is gone since the walk, or there is something wrong with it."""
        if isinstance(error, FileNotFoundError):
            self.changed.append(item.origin)
        else:
            self.problems.append(f"{item.path} cannot be read: {error.strerror}")

    def _text(self, item: FileItem | CodeItem) -> bytes | None:
        """The text of a module, which is wanted twice, as a file and for its byte code, and read once."""
        with self._lock:
            text = self._held.pop(item.origin, None)
            if text is not None:
                self.held_bytes -= len(text)
                return text
        text = self._read(item)
        if text is not None and len(text) <= _HELD_BYTES:
            with self._lock:
                if self.held_bytes + len(text) > _HELD_BYTES:
                    self._held.clear()
                    self.held_bytes = 0
                self.held_bytes += len(text) - len(self._held.get(item.origin, b""))
                self._held[item.origin] = text
        return text

    def _read(self, item: FileItem | CodeItem) -> bytes | None:
        try:
            handle = os.open(item.origin, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = _read_all(handle, item.node.st_size)
                # What changed before it was opened shows afterwards, too.
                self._compare(item, os.fstat(handle))
                return data
            finally:
                os.close(handle)
        except OSError as error:
            self.note(item, error)
            return None

    def _compare(self, item: FileItem | CodeItem, now: os.stat_result) -> None:
        seen = item.node
        if (
            now.st_mtime_ns != seen.st_mtime_ns
            or now.st_ctime_ns != seen.st_ctime_ns
            or now.st_size != seen.st_size
            or now.st_ino != seen.st_ino
        ):
            self.changed.append(item.origin)

    def _compiler(self) -> Compiler:
        me = threading.get_ident()
        with self._lock:
            if me not in self._compilers:
                self._compilers[me] = Compiler(self._plan.interpreter, self._kept, self._tmp)
            return self._compilers[me]


def _read_all(handle: int, size_bytes: int) -> bytes:
    """The rest of a file of which *size_bytes* are expected: one system call where it has as many."""
    data = os.read(handle, size_bytes + 1)
    while len(data) != size_bytes and (more := os.read(handle, size_bytes + 1)):
        data += more
    return data
