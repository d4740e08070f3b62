"""Which module may import which: what travels to the cluster needs nothing but Dask."""

from __future__ import annotations

import ast
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import worker_bootstrap

from .interpreters import OLDEST_MINOR, makes_venvs, other_minors

PACKAGE = Path(worker_bootstrap.__file__).parent
WITHOUT_DASK = (
    *("errors", "digest", "manifest", "layout", "codec", "lock", "relocate", "blueprint", "activation"),
    *(
        "store",
        "location",
        "donor",
        "durable",
        "mounts",
        "ready_mark",
        "arrivals",
        "relocated_code",
        "writer",
        "materialise",
        "verify",
        "tracker",
    ),
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


OLDEST = [python for minor, python in other_minors().items() if minor == OLDEST_MINOR and makes_venvs(python)]


@pytest.mark.parametrize("python", [sys.executable, *OLDEST])
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
