"""Modules that name their prefix: which they are, and byte code that is valid where they lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from worker_bootstrap.digest import digest_of
from worker_bootstrap.manifest import Entry, File, Link, Relocation
from worker_bootstrap.relocated_code import compile_modules, compiler_of, modules_without_code

SHORT = f"{sys.version_info.major}.{sys.version_info.minor}"
TEXT = Relocation("text", "/placeholder")


def test_modules_that_are_relocated_where_they_may_be_imported_from() -> None:
    entries: list[Entry] = [
        File(path, 1, digest_of(b"x"), False, relocation)
        for path, relocation in (
            ("lib/python3.11/a.py", TEXT),
            ("lib/python3.11/plain.py", None),
            ("lib/python3.11/a.txt", TEXT),
            ("bin/script.py", TEXT),
            ("lib/python3.1/other.py", TEXT),
            ("share/envship/projects/mine/b.py", TEXT),
            ("mylibs/c.py", TEXT),
            ("lib/pkg/d.py", TEXT),
        )
    ]
    entries.append(Link("lib/python3.11/link.py", "a.py"))
    assert modules_without_code(entries, "3.11.7") == [
        *("lib/python3.11/a.py", "share/envship/projects/mine/b.py", "mylibs/c.py", "lib/pkg/d.py")
    ]


def test_what_is_compiled_aside_is_valid_where_it_will_lie(tmp_path: Path) -> None:
    """The source may be as old or new as it likes, and one that cannot be compiled is passed over."""
    scratch, prefix = tmp_path / "scratch", tmp_path / "prefix"
    library = f"lib/python{SHORT}"
    (scratch / library).mkdir(parents=True)
    (scratch / "bin").mkdir()
    (scratch / "bin" / "python").symlink_to(sys.executable)
    (scratch / library / "good.py").write_text("def where():\n    return where.__code__.co_filename\n")
    (scratch / library / "broken.py").write_text("def where(:\n")
    modules = [f"{library}/broken.py", f"{library}/good.py"]
    compile_modules(str(scratch), str(prefix), modules, str(scratch / "bin" / "python"))
    scratch.rename(prefix)
    (code,) = (prefix / library / "__pycache__").iterdir()
    assert code.read_bytes()[4:8] == b"\1\0\0\0"
    before = code.stat().st_mtime_ns
    command = [sys.executable, "-c", "import good; print(good.where())"]
    said = subprocess.run(command, cwd=prefix / library, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == f"{prefix}/{library}/good.py"
    assert code.stat().st_mtime_ns == before


def test_an_interpreter_that_does_not_run_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    compile_modules(str(tmp_path), "/prefix", ["lib/a.py"], f"{tmp_path}/bin/python")
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    compile_modules(str(tmp_path), "/prefix", ["lib/a.py"], f"{tmp_path}/bin/python")


def test_an_interpreter_that_may_not_run_is_stood_in_for_by_one_of_its_version() -> None:
    assert compiler_of("/env", f"{SHORT}.99", may_run=True) == "/env/bin/python"
    assert compiler_of("/env", f"{SHORT}.99", may_run=False) == sys.executable
    assert compiler_of("/env", "3.1.0", may_run=False) is None
