"""Byte code of modules that name their prefix: it differs from prefix to prefix, so it is made where they are built.

All other byte code is content of the environment. Without this, the first import of such a module (``_sysconfigdata…``,
``numpy.__config__``) would compile it in every process, or write into a prefix that others use.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

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


def compile_modules(scratch: str, prefix: str, modules: Sequence[str]) -> None:
    """Compile *modules*, written below *scratch*, which will be *prefix*, with the interpreter that lies there.

    Notes
    -----
    A module that cannot be compiled, or an interpreter that does not run, is passed over: what is lost is time, and
    whether the environment starts is found out when it is started.
    """
    interpreter = Path(scratch, "bin", "python")
    if not modules or not interpreter.exists():
        return
    try:
        subprocess.run(
            [str(interpreter), "-I", "-S", "-c", _PROGRAM],
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
