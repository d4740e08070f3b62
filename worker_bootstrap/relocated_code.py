"""Byte code of modules that name their prefix: it differs from prefix to prefix, so it is made where they are built.

All other byte code is content of the environment. Without this, the first import of such a module (``_sysconfigdata…``,
``numpy.__config__``) would compile it in every process, or write into a prefix that others use.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from worker_bootstrap.digest import Digest, digest_of_file
from worker_bootstrap.manifest import Entry, File

logger = logging.getLogger("envship.relocated_code")

TIMEOUT_S = 120.0
ELSEWHERE = ("bin/", "lib/python")
"""Where scripts lie, and libraries of other interpreters, which nobody imports. Any other folder may be searched."""

# Unchecked (PEP 552), like the byte code that comes with an environment: times play no part.
_PROGRAM = """\
import json, py_compile, sys
scratch, prefix, modules = json.load(sys.stdin)
for module in modules:
    try:
        py_compile.compile(
            scratch + "/" + module, dfile=prefix + "/" + module, doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    except (py_compile.PyCompileError, ValueError, OSError):
        pass
"""


def modules_without_code(entries: Iterable[Entry], python: str) -> list[str]:
    """Paths of modules that are relocated, for an environment whose interpreter has the version *python*.

    In its library, or wherever else a path file may lead: to a project, or to a folder that somebody put there.
    """
    library = f"lib/python{'.'.join(python.split('.')[:2])}/"
    return [
        entry.path
        for entry in entries
        if isinstance(entry, File)
        and entry.relocation is not None
        and entry.path.endswith(".py")
        and (entry.path.startswith(library) or not entry.path.startswith(ELSEWHERE))
    ]


def folders_of(root: str, modules: Iterable[str]) -> Iterator[str]:
    """The folders of *root* that compiling *modules* changes."""
    for folder in {os.path.dirname(module) for module in modules}:
        yield folder
        if os.path.isdir(f"{root}/{folder}/__pycache__"):
            yield f"{folder}/__pycache__"


def compiler_of(scratch: str, python: str, *, may_run: bool) -> str | None:
    """What compiles for an environment at *scratch* whose interpreter has the version *python*: that, if it *may_run*.

    Otherwise this process's own, if it is of the same minor version, so that no program of the environment is started.
    """
    if may_run:
        return f"{scratch}/bin/python"
    return sys.executable if python.split(".")[:2] == list(map(str, sys.version_info[:2])) else None


def compile_again(prefix: Path, entries: Iterable[Entry], python: str, *, may_run: bool) -> dict[str, Digest]:
    """Make the byte code of the modules among *entries* that are relocated anew; returns as `compile_modules`."""
    modules = modules_without_code(entries, python)
    for path in _made_of(prefix, modules):
        path.unlink()
    made = compile_modules(str(prefix), str(prefix), modules, compiler_of(str(prefix), python, may_run=may_run))
    for name in made:
        with open(prefix / name, "rb") as file:
            os.fsync(file.fileno())  # the mark may be durable: it says that all is on disk
    return made


def _made_of(prefix: Path, modules: Iterable[str]) -> Iterator[Path]:
    for module in modules:
        folder, name = os.path.split(prefix / module)
        yield from list(Path(folder, "__pycache__").glob(glob.escape(name[: -len(".py")]) + ".*.pyc"))


def compile_modules(scratch: str, prefix: str, modules: Sequence[str], interpreter: str | None) -> dict[str, Digest]:
    """Compile *modules*, written below *scratch*, which will be *prefix*, with *interpreter*.

    Returns the digest of each file of byte code by its path relative to *prefix*: no listing says what it should be.

    Notes
    -----
    A module that cannot be compiled, or an interpreter that does not run, is passed over: what is lost is time, and
    whether the environment starts is found out when it is started.
    """
    if not modules or interpreter is None or not os.path.exists(interpreter):
        return {}
    try:
        subprocess.run(
            [interpreter, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([scratch, prefix, modules]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath},
            cwd="/",
            timeout=TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the byte code of %d modules that name their prefix was not made: %s", len(modules), error)
    root = Path(scratch)
    return {str(path.relative_to(root)): digest_of_file(path) for path in _made_of(root, modules)}
