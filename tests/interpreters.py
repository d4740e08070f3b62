"""The interpreters of this machine besides the one that runs the tests."""

from __future__ import annotations

import functools
import glob
import os
import shutil
import subprocess
import sys

OLDEST_MINOR = 9
"""Python 3.9 is the oldest that the cluster's side runs on."""


@functools.cache
def interpreters() -> dict[str, str]:
    """Name (such as ``pyenv-3.12``) to executable: of the system, pyenv's, and python-build-standalone as uv has it."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    standalone = os.environ.get("UV_PYTHON_INSTALL_DIR", os.path.expanduser("~/.local/share/uv/python"))
    patterns = {
        "system": "/usr/bin/python3.*[0-9]",
        "local": "/usr/local/bin/python3.*[0-9]",
        "pyenv": f"{pyenv}/versions/3.*/bin/python3.*[0-9]",
        "standalone": f"{standalone}/cpython-3.*/bin/python3.*[0-9]",
    }
    found: dict[str, str] = {}
    for kind, pattern in patterns.items():
        for executable in sorted(glob.glob(pattern)):
            minor = os.path.basename(executable).removeprefix("python3.")
            is_this = os.path.realpath(executable) == os.path.realpath(sys.executable)
            if minor.isdigit() and int(minor) >= OLDEST_MINOR and not is_this and _starts(executable):
                found[f"{kind}-3.{minor}"] = executable
    return found


@functools.cache
def other_minors() -> dict[int, str]:
    """One interpreter for each minor version of Python 3 that is not this one's."""
    found: dict[int, str] = {}
    for name, executable in interpreters().items():
        minor = int(name.rpartition(".")[2])
        if minor != sys.version_info.minor:
            found.setdefault(minor, executable)
    for minor in range(OLDEST_MINOR, sys.version_info.minor + 4):
        elsewhere = shutil.which(f"python3.{minor}")
        if minor != sys.version_info.minor and elsewhere and minor not in found and _starts(elsewhere):
            found[minor] = elsewhere
    return found


def makes_venvs(python: str) -> bool:
    """Whether *python* has what ``python -m venv`` needs; Debian leaves that out."""
    return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True, check=False).returncode == 0


def _starts(python: str) -> bool:
    # pyenv puts launchers on PATH for versions that nobody has chosen.
    return subprocess.run([python, "-I", "-S", "-c", ""], capture_output=True, check=False).returncode == 0
