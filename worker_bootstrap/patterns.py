"""Regular expressions that were compiled once, kept as byte code is: compiling them is a tenth of importing Dask.

The file is for one build of Python, and has the arguments of the function in C that makes a pattern; that one checks
the code that it is given. Whatever is not in it is compiled as always.
"""

from __future__ import annotations

import contextlib
import importlib
import marshal
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

CRC_BYTES = 4
"""What stands before the file's content, big-endian."""

Compiled = tuple[int, list[int], int, dict[str, int], tuple[Any, ...]]
"""(flags, code, number of groups, group numbers by name, group names by number). Source: ``re._compiler.compile``."""


@contextlib.contextmanager
def kept(folder: str) -> Iterator[None]:
    """Until the end of the block, take what is compiled from *folder*; leave it there if nothing was."""
    if sys.implementation.name != "cpython":
        yield
        return
    compiler: Any = importlib.import_module("re._compiler" if sys.version_info >= (3, 11) else "sre_compile")
    path = os.path.join(folder, f"patterns-{zlib.crc32(sys.version.encode()):08x}")
    known = _read(path)
    seen: dict[tuple[str, int], Compiled] = {}
    with contextlib.ExitStack() as stack:
        if known:
            stack.enter_context(_replaced(compiler, "compile", _taking(known, compiler.compile, compiler._sre.compile)))
        else:
            in_c = _Recorder(compiler._sre)
            stack.enter_context(_replaced(compiler, "_sre", in_c))
            stack.enter_context(_replaced(compiler, "compile", _noting(seen, compiler.compile, in_c)))
        yield
    if seen:
        _write(path, seen)


class _Recorder:
    """Stands for the module ``_sre``, and remembers what it was last asked to compile."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.asked: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def compile(self, *arguments: Any) -> Any:
        self.asked = list(arguments)
        return self._module.compile(*arguments)


def _taking(known: dict[tuple[str, int], Compiled], original: Any, in_c: Any) -> Callable[..., Any]:
    def compile(p: Any, flags: int = 0) -> Any:
        compiled = known.get((p, int(flags))) if type(p) is str else None
        if compiled is not None:
            with contextlib.suppress(Exception):  # made by other code than we think
                return in_c(p, *compiled)
        return original(p, flags)

    return compile


def _noting(seen: dict[tuple[str, int], Compiled], original: Any, in_c: _Recorder) -> Callable[..., Any]:
    def compile(p: Any, flags: int = 0) -> Any:
        in_c.asked = []
        pattern = original(p, flags)
        if type(p) is str and len(in_c.asked) == 6:
            _, final, code, groups, index, names = in_c.asked
            seen[p, int(flags)] = (int(final), [int(word) for word in code], int(groups), dict(index), tuple(names))
        return pattern

    return compile


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _read(path: str) -> dict[tuple[str, int], Compiled]:
    """What lies there; nothing if there is no file, or it is not as it was written."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        if zlib.crc32(data[CRC_BYTES:]) != int.from_bytes(data[:CRC_BYTES], "big"):
            return {}
        known: dict[tuple[str, int], Compiled] = marshal.loads(data[CRC_BYTES:])
    except (OSError, EOFError, ValueError, TypeError):
        return {}
    return known


def _write(path: str, seen: dict[tuple[str, int], Compiled]) -> None:
    """Leave it whole, or not at all: whoever comes next compiles otherwise, as this one did."""
    aside = f"{path}.{os.getpid()}"
    try:
        data = marshal.dumps(seen)
        with open(aside, "wb") as file:
            file.write(zlib.crc32(data).to_bytes(CRC_BYTES, "big") + data)
        os.replace(aside, path)
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            os.unlink(aside)
