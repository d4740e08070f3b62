"""Byte code that arrives valid: made by the environment's own interpreter, unchecked (PEP 552), the same everywhere.

Each `Compiler` is one process of that interpreter (`envship._bytecode_worker`), which reuses valid byte code that it
finds and compiles what has none. What had to be compiled is kept, by source, interpreter and name, for the next pack.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from envship.errors import NotAnEnvironment
from envship.sources.draft import CodeItem
from envship.sources.interpreter import clean_environ
from worker_bootstrap.digest import digest_of
from worker_bootstrap.store import publish

_WORKER = Path(__file__).with_name("_bytecode_worker.py")
# Not started by its path, which would let modules beside it stand before the standard library.
_START = "import sys; sys.path.pop(0); exec(compile(open(sys.argv[1], encoding='utf-8').read(), sys.argv[1], 'exec'))"
_FORM = b"names"
"""What `envship._bytecode_worker` makes: what was kept in another form is not used."""


class Compiler:
    """A process that makes byte code. Not for use by several threads at once; a context manager.

    Parameters
    ----------
    interpreter
        Executable of the environment's Python.
    kept
        Folder for what had to be compiled; made if it is not there.
    tmp
        Folder for temporary files on the same file system.
    """

    def __init__(self, interpreter: str, kept: Path, tmp: Path) -> None:
        self.interpreter = interpreter
        self.kept = kept
        self.tmp = tmp
        # A fixed hash seed: until 3.10, sets of constants are written in the order of their hashes.
        environ = {**clean_environ(), "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [interpreter, "-S", "-s", "-B", "-W", "ignore", "-c", _START, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            cwd="/",
            start_new_session=True,
        )
        try:
            self.magic = str(json.loads(self._read_line())["magic"])
        except (ValueError, KeyError) as error:
            self.close()
            raise NotAnEnvironment(interpreter, "its interpreter does not run") from error

    def make(self, item: CodeItem, source: bytes) -> bytes | None:
        """The byte code of the module *item*, whose text is *source*; None if it cannot be compiled.

        Raises
        ------
        NotAnEnvironment
            If the interpreter died.
        """
        request = {"size_bytes": len(source), "name": item.module_path}
        on_disk = {
            # As bytes: the interpreter may take names of files for another encoding than this one does.
            "cached": os.fsencode(item.cached).decode("latin-1"),
            "mtime": item.node.st_mtime_ns // 1_000_000_000,
            "source_digest": item.source_digest,
            "cached_digest": item.cached_digest,
        }
        return self._ask({**request, **on_disk}, source) or self._compiled(item, source, request) or None

    def close(self) -> None:
        """End the process. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compiled(self, item: CodeItem, source: bytes, request: Mapping[str, Any]) -> bytes:
        """What the compiler makes, or made of the same source before."""
        path = self._kept_path(item, source)
        with contextlib.suppress(OSError):
            return _checked(path.read_bytes())
        data = self._ask(request, source)
        if data:
            # Losing it to a full disk costs time only.
            with contextlib.suppress(OSError):
                publish(path, hashlib.sha256(data).digest() + data, self.tmp, sync=False)
        return data

    def _kept_path(self, item: CodeItem, source: bytes) -> Path:
        module_path = item.module_path.encode("utf-8", "surrogateescape")
        name = digest_of(b"\0".join((_FORM, self.magic.encode(), module_path, source)))
        return self.kept / name[:2] / name

    def _ask(self, request: Mapping[str, Any], source: bytes) -> bytes:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n" + source)
            self._process.stdin.flush()
            return self._read(int.from_bytes(self._read(4), "big"))
        except (BrokenPipeError, EOFError) as error:
            raise NotAnEnvironment(self.interpreter, "its interpreter died while it compiled") from error

    def _read(self, size_bytes: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size_bytes)
        if len(data) < size_bytes:
            raise EOFError
        return data

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def _checked(data: bytes) -> bytes:
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise OSError("damaged")
    return data[32:]
