"""What importing Dask compiles, kept as byte code is: regular expressions, and the source that data classes generate.

Compiling takes a seventh of an import. The file that keeps it is for one build of Python; whatever is not in it is
compiled as always.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from worker_bootstrap import generated, patterns

CRC_BYTES = 4
"""What stands before the file's content, big-endian."""

PARTS: dict[str, Callable[..., contextlib.AbstractContextManager[None]]] = {
    "patterns": patterns.kept,
    "generated": generated.kept,
}
"""Context managers, given what is known, or None, and where to leave what was compiled because it was not."""


@contextlib.contextmanager
def kept(folder: str) -> Iterator[None]:
    """Until the end of the block, take what is compiled from *folder*; leave it there if nothing was."""
    if sys.implementation.name != "cpython":
        yield
        return
    path = os.path.join(folder, f"compiled-{zlib.crc32(sys.version.encode()):08x}")
    known = _read(path)
    seen: dict[str, dict[Any, Any]] = {name: {} for name in PARTS}
    with contextlib.ExitStack() as stack:
        for name, part in PARTS.items():
            stack.enter_context(part(known.get(name), seen[name]))
        yield
    if not known and any(seen.values()):
        _write(path, seen)


def _read(path: str) -> dict[str, dict[Any, Any]]:
    """What lies there; nothing if there is no file, or it is not as it was written."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        if zlib.crc32(data[CRC_BYTES:]) != int.from_bytes(data[:CRC_BYTES], "big"):
            return {}
        known: dict[str, dict[Any, Any]] = marshal.loads(data[CRC_BYTES:])
    except (OSError, EOFError, ValueError, TypeError):
        return {}
    return known


def _write(path: str, seen: dict[str, dict[Any, Any]]) -> None:
    """Leave it whole, or not at all: whoever comes next compiles otherwise, as this one did."""
    aside = f"{path}.{os.getpid()}"
    try:
        data = marshal.dumps(seen)
        with open(aside, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # it is run, so nobody else may write to it whatever the umask is
            file.write(zlib.crc32(data).to_bytes(CRC_BYTES, "big") + data)
        os.replace(aside, path)
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            os.unlink(aside)
