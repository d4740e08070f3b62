"""What an interpreter does with the byte code of an environment, and whether that is the byte code of its sources."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

UNCHECKED = (1).to_bytes(4, "little")
"""Flags of byte code that is used without a look at its source (PEP 552)."""


def compiled(python: Path, *modules: str, **environ: str) -> list[str]:
    """What an import of *modules* compiles or writes: the interpreter's own account."""
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    command = [python, "-v", "-c", code, *modules]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", **environ}, capture_output=True, text=True, check=True, cwd="/"
    )
    lines = done.stderr.splitlines()
    assert any(line.startswith("# code object from '") for line in lines)
    # Quoted is the path of byte code that is used, without quotes that of a source that is compiled.
    return [line for line in lines if line.startswith(("# created ", "# wrote ", "# code object from /"))]


def unlike_its_source(prefix: Path) -> list[Path]:
    """Byte code below *prefix* that an interpreter would use, or look at, without its being that of its module.

    The interpreter must be of the version that runs the tests.
    """
    found = []
    for path in prefix.rglob("__pycache__/*.pyc"):
        module = path.parent.parent / (path.name.partition(".")[0] + ".py")
        header = path.read_bytes()[:16]
        made_of = importlib.util.source_hash(module.read_bytes()) if module.exists() else b""
        if header != importlib.util.MAGIC_NUMBER + UNCHECKED + made_of:
            found.append(path)
    return found
