"""Which module may import which: what travels to the cluster needs nothing but Dask."""

from __future__ import annotations

import ast
import json
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import worker_bootstrap
from envship.cli.machines import bare_environ

from .interpreters import OLDEST_MINOR, makes_venvs, other_minors

PACKAGE = Path(worker_bootstrap.__file__).parent
WITHOUT_DASK = (
    *("errors", "digest", "paths", "layout", "manifest", "codec", "lock", "durable", "handles", "mounts"),
    *("ready_mark", "founding", "store", "location", "staging"),
    *("relocate", "relocated_code", "blueprint", "arrivals", "donor", "crew", "writer", "materialise", "build"),
    *("soundness", "repair", "verify", "stock", "holdings", "evict", "shared", "carry"),
    *("interpreter", "activation", "launch", "standby", "worker_options"),
    *("tracker", "choice", "assignments", "promises", "mistrust", "ledger", "swap_account"),
)
"""Modules that must not import Dask: they run in processes that have to start at once, and in tests without it."""
DASK = {"distributed", "dask", "tornado", "psutil", "cloudpickle", "click", "msgpack", "fsspec", "yaml"}
OPTIONAL = {"zstandard", "prometheus_client"}
MODULES = sorted(module.name for module in pkgutil.iter_modules([str(PACKAGE)]))


def imported(module: str) -> Iterator[str]:
    """Top-level names of everything that a module imports, wherever in it."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_what_travels_needs_nothing_but_dask(module: str) -> None:
    allowed = {"worker_bootstrap", *sys.stdlib_module_names, *OPTIONAL}
    if module not in WITHOUT_DASK:
        allowed |= DASK
    assert set(imported(module)) <= allowed


def test_no_module_is_forgotten() -> None:
    assert set(WITHOUT_DASK) <= set(MODULES)


def test_what_needs_no_dask_imports_nothing_that_does(tmp_path: Path) -> None:
    """Each of them, with all that it imports, where there is no Dask."""
    command = [sys.executable, "-c", IMPORT_WITHOUT, str(PACKAGE.parent), " ".join(DASK), *WITHOUT_DASK]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


IMPORT_WITHOUT = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2].split():
    sys.modules[name] = None
for module in sys.argv[3:]:
    try:
        importlib.import_module("worker_bootstrap." + module)
    except ImportError as error:
        print(module, error)
"""


# -- with the oldest Python


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_what_travels_is_written_for_the_oldest_python(module: str) -> None:
    """Also where there is none to try it. Annotations are never evaluated, so they may be newer than the rest."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"), feature_version=(3, OLDEST_MINOR))
    postponed = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    assert postponed or module == "__init__"
    assert [node.lineno for node in evaluated(tree) if is_union(node)] == [], "`X | Y` of types needs Python 3.10"


def evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """*node* and all that lies in it, without annotations."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from evaluated(child)


def is_union(node: ast.AST) -> bool:
    """Whether *node* is ``X | Y`` with a side that can only be a type, or None."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)):
        return False
    sides = {ast.unparse(side) for side in (node.left, node.right)}
    return not sides.isdisjoint({"None", "Any", "bool", "bytes", "float", "int", "str", "dict", "list", "set", "tuple"})


# -- with nothing but Dask installed

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import worker_bootstrap
for module in pkgutil.iter_modules(worker_bootstrap.__path__):
    importlib.import_module("worker_bootstrap." + module.name)
for name in ("zstandard", "envship"):
    assert name not in sys.modules, name
from worker_bootstrap import codec
print(*codec.available())
"""


def pythons() -> Iterator[Any]:
    """This interpreter and the oldest, which is missed aloud."""
    yield sys.executable
    oldest = other_minors().get(OLDEST_MINOR)
    missing = f"there is no Python 3.{OLDEST_MINOR} here that makes venvs"
    usable = oldest is not None and makes_venvs(oldest)
    yield pytest.param(oldest, marks=pytest.mark.skipif(not usable, reason=missing), id=f"3.{OLDEST_MINOR}")


@pytest.mark.parametrize("python", [*pythons()])
def test_every_module_imports_where_only_distributed_is(python: str, base_venv: Path, tmp_path: Path) -> None:
    if python == sys.executable:
        bare = base_venv / "bin/python"
    else:
        subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
        bare = tmp_path / "venv/bin/python"
        subprocess.run([bare, "-m", "pip", "install", "-q", "distributed"], check=True, capture_output=True)
    shutil.copytree(PACKAGE, tmp_path / "code/worker_bootstrap", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [bare, "-c", IMPORT_ALL, tmp_path / "code"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "zlib raw\n"


# -- on every Python that the client's side is for

IMPORT_EVERYTHING = """
import importlib, pkgutil
import envship, worker_bootstrap
for package in (envship, worker_bootstrap):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_the_client_side_installs_imports_and_packs(minor: int, tmp_path: Path) -> None:
    python = sys.executable if minor == sys.version_info.minor else other_minors().get(minor)
    if python is None or not makes_venvs(python):
        pytest.skip(f"there is no Python 3.{minor} here that makes venvs")
    venv = tmp_path / "venv"
    subprocess.run([python, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin/python", "-m", "pip", "install", "-q", PACKAGE.parent], check=True, capture_output=True)
    subprocess.run(
        [venv / "bin/python", "-W", "error::SyntaxWarning", "-c", IMPORT_EVERYTHING], check=True, cwd=tmp_path
    )
    environ = {**bare_environ(), "ENVSHIP_STORE": str(tmp_path / "store")}
    packed = subprocess.run(
        [venv / "bin/envship", "pack", venv, "--json"], env=environ, capture_output=True, text=True, check=False
    )
    assert packed.returncode == 0, packed.stderr
    assert json.loads(packed.stdout)["versions"]["python"].startswith(f"3.{minor}.")
