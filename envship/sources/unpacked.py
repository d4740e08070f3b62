"""What conda-pack, or an export, did to an environment, and how to undo it.

A prefix that comes from one of its archives holds files of its own, names the prefix that it was packed from in places
that only the script ``bin/conda-unpack`` lists (until that has run), and has scripts that leave their interpreter to
PATH. Source of the format: conda-pack's ``core.py`` (``_conda_unpack_template``, ``rewrite_shebang``).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import csv
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from envship.canonical import Content, Recorded, Treatment
from worker_bootstrap.digest import digest_of
from worker_bootstrap.manifest import Relocation
from worker_bootstrap.paths import PATH_LIMIT, is_file_name
from worker_bootstrap.relocate import PLACEHOLDER, RelocationError, relocate, restore

SCRIPT = "bin/conda-unpack"
SCRIPTS = frozenset(
    (SCRIPT, "bin/conda_unpack_progress.py", "bin/activate", "bin/activate.fish", "bin/deactivate"),
)
"""Files that conda-pack adds to every archive."""

_FORGOTTEN = re.compile(r"tmp[a-z0-9_]{8}")
"""What conda-pack forgets in folders that it made with ``--format no-archive``."""

_ACTIVATE = b"_conda_pack_activate() {"
"""How conda-pack's ``bin/activate`` begins."""
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
    exported
        By path: how files name the prefix whose content an export wrote as it was in the store.
    is_left_to_path
        Whether scripts leave their interpreter to PATH.
    """

    prefix: str
    older_prefixes: tuple[str, ...]
    kept_scripts: frozenset[str]
    exported: Mapping[str, Relocation]
    is_left_to_path: bool = True

    def added(self, path: str) -> bool:
        """Whether conda-pack added the file at *path*."""
        return path in SCRIPTS or _FORGOTTEN.fullmatch(path) is not None

    def treatment(self, path: str, treatment: Treatment) -> Treatment:
        """What undoes conda-pack's change of the file at *path* before *treatment*."""
        relocation = self.exported.get(path)
        if relocation is not None:
            return WithPlaceholder(self.prefix, relocation, treatment)
        if self.is_left_to_path and path.startswith("bin/"):
            return WithInterpreter(self.prefix, self.kept_scripts, treatment)
        return treatment


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


@dataclass(frozen=True)
class WithPlaceholder:
    """A file that was exported: its content is that in the store, or what conda-unpack made of it."""

    prefix: str
    relocation: Relocation
    inner: Treatment

    @property
    def key(self) -> str:
        return f"with placeholder {self.relocation} of {self.prefix} {self.inner.key}"

    def __call__(self, data: bytes) -> Content:
        placeholder = os.fsencode(self.relocation.placeholder)
        if placeholder in data:
            return Content(data, self.relocation)
        if self.relocation.mode == "binary":
            original = restore(data, self.relocation, self.prefix)
            with contextlib.suppress(RelocationError):
                if placeholder in original and relocate(original, self.relocation, self.prefix) == data:
                    return Content(original, self.relocation)
        return self.inner(data)


def read_unpacked(prefix: Path, recorded: frozenset[str]) -> Unpacked | None:
    """What conda-pack did to the conda environment at *prefix*; None where it has not been.

    Parameters
    ----------
    recorded
        Placeholders that packages recorded themselves: those name no prefix that was ever one.
    """
    rows = _rows(prefix)
    if rows is None:
        # With ``dest_prefix``, it writes the prefix of that place, and no script that would change it.
        return Unpacked(str(prefix), (), frozenset(), {}, is_left_to_path=False) if _has_activate(prefix) else None
    placeholders = {relocation.placeholder for relocation in rows.values() if relocation.mode == "text"}
    older = {text for text in placeholders - recorded if text.count("/") > 1}
    exported = {path: each for path, each in rows.items() if each.placeholder.startswith(PLACEHOLDER)}
    return Unpacked(str(prefix), tuple(sorted(older)), frozenset(_recorded_scripts(prefix)), exported)


def read_exported(prefix: Path) -> Unpacked:
    """What an export did to the environment at *prefix*, in which conda has no packages."""
    rows = _rows(prefix) or {}
    return Unpacked(str(prefix), (), frozenset(_recorded_scripts(prefix)), {**rows, **_interpreter_row(prefix, rows)})


def _interpreter_row(prefix: Path, rows: Mapping[str, Relocation]) -> dict[str, Relocation]:
    """The row of the interpreter, which conda-unpack runs in, and so neither changes nor lists.

    That of a conda package names its prefix as the other files of the package do.
    """
    executable = os.path.realpath(prefix / "bin" / "python")
    placeholders = sorted({each.placeholder for each in rows.values() if not each.placeholder.startswith(PLACEHOLDER)})
    if not placeholders:
        return {}
    with open(executable, "rb") as file:
        data = file.read()
    path = os.path.relpath(executable, os.path.realpath(prefix))
    found = [placeholder for placeholder in placeholders if os.fsencode(placeholder) in data]
    return {path: Relocation("binary", found[0])} if found else {}


def _rows(prefix: Path) -> dict[str, Relocation] | None:
    """By path, how the files name a prefix that ``bin/conda-unpack`` lists; None if there is no such script."""
    try:
        with open(prefix / SCRIPT, encoding="utf-8", errors="surrogateescape") as file:
            found = _RECORDS.search(file.read(_LIMIT_BYTES))
        if found is None:
            return None
        rows = {str(path): Relocation(mode, str(placeholder)) for path, placeholder, mode in ast.literal_eval(found[1])}
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return {path: relocation for path, relocation in rows.items() if _is_sound(relocation)}


def _is_sound(relocation: Relocation) -> bool:
    mode, placeholder = relocation
    is_path = placeholder.startswith("/") and 2 <= len(placeholder) <= PATH_LIMIT and "\0" not in placeholder
    return is_path and mode in ("text", "binary") and is_file_name(placeholder)


def _has_activate(prefix: Path) -> bool:
    """Whether ``bin/activate`` is that of conda-pack."""
    try:
        with open(prefix / "bin" / "activate", "rb") as file:
            return file.read(len(_ACTIVATE)) == _ACTIVATE
    except OSError:
        return False


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
