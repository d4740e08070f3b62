"""What conda-pack did to an environment, and how to undo it.

A prefix that comes from one of its archives holds files of its own, names the prefix that it was packed from in places
that only the script ``bin/conda-unpack`` lists (until that has run), and has scripts that leave their interpreter to
PATH. Source of the format: conda-pack's ``core.py`` (``_conda_unpack_template``, ``rewrite_shebang``).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from envship.canonical import Content, Recorded, Treatment
from worker_bootstrap.digest import digest_of

SCRIPT = "bin/conda-unpack"
SCRIPTS = frozenset(
    (SCRIPT, "bin/conda_unpack_progress.py", "bin/activate", "bin/activate.fish", "bin/deactivate"),
)
"""Files that conda-pack adds to every archive."""

_FORGOTTEN = re.compile(r"tmp[a-z0-9_]{8}")
"""What conda-pack forgets in folders that it made with ``--format no-archive``."""

_LIMIT_BYTES = 64 << 20
_RECORDS = re.compile(r"^_prefix_records = (\[.*?^\])", re.MULTILINE | re.DOTALL)
_LEFT_TO_PATH = re.compile(rb"\A#!/usr/bin/env ((?:python|pypy)[0-9.]*t?)(?=[ \t\r\n]|\Z)")


@dataclass(frozen=True)
class Unpacked:
    """What is to be undone at *prefix*.

    Attributes
    ----------
    older_prefixes
        Prefixes that files may name besides the present one.
    kept_scripts
        Digests of scripts that pip's packages brought as they are: nothing in them was rewritten.
    """

    prefix: str
    older_prefixes: tuple[str, ...]
    kept_scripts: frozenset[str]

    def added(self, path: str) -> bool:
        """Whether conda-pack added the file at *path*."""
        return path in SCRIPTS or _FORGOTTEN.fullmatch(path) is not None

    def treatment(self, path: str, treatment: Treatment) -> Treatment:
        """What undoes conda-pack's change of the file at *path* before *treatment*."""
        return WithInterpreter(self.prefix, self.kept_scripts, treatment) if path.startswith("bin/") else treatment


@dataclass(frozen=True)
class WithInterpreter:
    """A script whose interpreter was left to PATH: it gets the path back that every installer writes."""

    prefix: str
    kept: frozenset[str]
    inner: Treatment

    @property
    def key(self) -> str:
        return f"with interpreter of {self.prefix} {self.inner.key}"

    def __call__(self, data: bytes) -> Content:
        full = _LEFT_TO_PATH.sub(rb"#!" + self.prefix.encode() + rb"/bin/\1", data)
        if full == data or digest_of(data) in self.kept:
            return self.inner(data)
        if isinstance(self.inner, Recorded):
            again = self.inner(full)
            return again if digest_of(again.data) == self.inner.digest else self.inner(data)
        return self.inner(full)


def read_unpacked(prefix: Path, recorded: frozenset[str]) -> Unpacked | None:
    """What conda-pack did to the environment at *prefix*; None where it has not been.

    Parameters
    ----------
    recorded
        Placeholders that packages recorded themselves: those name no prefix that was ever one.
    """
    try:
        with open(prefix / SCRIPT, encoding="utf-8", errors="surrogateescape") as file:
            found = _RECORDS.search(file.read(_LIMIT_BYTES))
        rows = ast.literal_eval(found[1]) if found else []
        placeholders = {str(placeholder) for _, placeholder, mode in rows if mode == "text"}
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    if found is None:
        return None
    older = {text for text in placeholders - recorded if text.startswith("/") and text.count("/") > 1}
    return Unpacked(str(prefix), tuple(sorted(older)), frozenset(_recorded_scripts(prefix)))


def _recorded_scripts(prefix: Path) -> Iterator[str]:
    """Digests of the scripts that the RECORDs of pip's packages list."""
    for record in prefix.glob("lib/python*/site-packages/*.dist-info/RECORD"):
        # One that cannot be read is a problem of its package, which is told of where that is planned.
        with (
            contextlib.suppress(OSError, ValueError, csv.Error),
            open(record, encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            for row in csv.reader(line for line in file if line.startswith("../../../bin/")):
                if len(row) > 1 and row[1].startswith("sha256="):
                    text = row[1][len("sha256=") :]
                    yield base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).hex()
