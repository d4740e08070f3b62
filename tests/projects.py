"""Projects on disk, to be installed in editable mode by real build backends."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

BACKENDS = {
    "setuptools": ("setuptools.build_meta", ""),
    "hatchling": ("hatchling.build", '[tool.hatch.build.targets.wheel]\npackages = ["{package}"]\n'),
    "hatchling-exact": (
        "hatchling.build",
        '[tool.hatch.build.targets.wheel]\npackages = ["{package}"]\n[tool.hatch.build]\ndev-mode-exact = true\n',
    ),
    "flit": ("flit_core.buildapi", ""),
}
GIT = ("git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main")


def project(folder: Path, name: str, backend: str = "setuptools", package: str = "", more: str = "") -> Path:
    """A project of one package, *name*, at *folder*/*name*. *package*: where it lies in it (default: its name)."""
    build_backend, settings = BACKENDS[backend]
    root = folder / name
    where = root / (package or name)
    where.mkdir(parents=True)
    (where / "__init__.py").write_text(f'"""The package {name}."""\n\n__version__ = "1.0"\nVALUE = 1\n')
    (where / "inner.py").write_text("import os\n\nHERE = os.path.dirname(os.path.abspath(__file__))\n")
    (where / "data.txt").write_text("text of " + name)
    (root / "unrelated.txt").write_text("no part of the package")
    (root / "pyproject.toml").write_text(
        f'[build-system]\nrequires = []\nbuild-backend = "{build_backend}"\n'
        f'[project]\nname = "{name}"\nversion = "1.0"\ndescription = "d"\n'
        + settings.format(package=package or name)
        + more
    )
    return root


def install_editable(prefix: Path, *roots: Path, settings: str = "", more: Sequence[str] = ()) -> None:
    """``pip install -e`` (*more* without ``-e``), with the build backends of the environment that runs the tests."""
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin/python"), "--disable-pip-version-check"]
    options = [
        "-q",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        *(["--config-settings", settings] if settings else []),
    ]
    editable = [argument for root in roots for argument in ("-e", str(root))]
    environ = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "PIP_ROOT_USER_ACTION": "ignore"}
    subprocess.run([*pip, "install", *options, *editable, *more], check=True, env=environ)


def git(root: Path, *arguments: str) -> None:
    """Run git in *root*, with an author and without the settings of whoever runs the tests."""
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    subprocess.run([*GIT, "-C", str(root), *arguments], check=True, env=environ, capture_output=True)
