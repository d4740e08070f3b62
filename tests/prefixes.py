"""Real environments to pack: venvs in a second, and a true conda environment with neither conda nor a channel."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from envship.cli.machines import write_wheel
from envship.sources.tree import is_settled
from worker_bootstrap.manifest import Relocation
from worker_bootstrap.relocate import PLACEHOLDER, relocate, restore

from .cluster import eventually

BESIDE = Path(__file__).parents[2] / "shared" / "conda" / "channel"
CHANNEL = os.environ.get("ENVSHIP_TEST_CHANNEL") or (str(BESIDE) if BESIDE.is_dir() else "")
"""A real conda channel, a URL or a folder of packages: the one that is named, or lies beside the checkout; else ""."""
NEEDS_CHANNEL = pytest.mark.skipif(not CHANNEL, reason="ENVSHIP_TEST_CHANNEL names no conda channel")
ONLYHERE = '''"""Only in the packed environment."""


def f(x):
    return x + 41
'''


def small_venv(prefix: Path, wheels: Sequence[Path], *pip_options: str) -> Path:
    """A venv with nothing but *wheels*, made without the network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    if wheels:
        install(prefix, *pip_options, *map(str, wheels))
    return prefix


def install(prefix: Path, *arguments: str, python: str = "python") -> None:
    """``pip install`` of local files into *prefix*, by the pip that runs the tests.

    *python* is the name of the interpreter that pip runs in, which scripts call: that of ``bin/pip`` itself is
    ``python3.11``, the one that people start with ``python -m pip`` most often ``python``.
    """
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin" / python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", *arguments], check=True)


def settle(prefix: Path) -> None:
    """Wait until everything in *prefix* is old enough for its time stamps to be believed."""

    def looks_settled() -> bool:
        now_ns = time.time_ns()
        return all(is_settled(path.lstat(), now_ns) for path in prefix.rglob("*"))

    eventually(looks_settled, f"{prefix} is old enough")


def onlyhere_wheel(folder: Path, version: str = "1.0", source: str = ONLYHERE) -> Path:
    """A wheel of the module ``onlyhere``."""
    return write_wheel(folder, "onlyhere", version, source)


def console_script_wheel(folder: Path) -> Path:
    """A wheel of the module ``onlyhere`` with a console script, ``where``."""
    wheel = onlyhere_wheel(folder, source=ONLYHERE + "\n\ndef where():\n    import sys\n\n    print(sys.prefix)\n")
    name, text = "onlyhere-1.0.dist-info/entry_points.txt", b"[console_scripts]\nwhere = onlyhere:where\n"
    with zipfile.ZipFile(wheel) as archive:
        files = {other: archive.read(other) for other in archive.namelist()}
    digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
    files["onlyhere-1.0.dist-info/RECORD"] += f"{name},sha256={digest},{len(text)}\n".encode()
    with zipfile.ZipFile(wheel, "w") as archive:
        for other, data in {**files, name: text}.items():
            archive.writestr(other, data)
    return wheel


def conda_environments(folder: Path, *prefixes: Path, channel: str | None = None, specs: Sequence[str] = ()) -> None:
    """The same conda packages, installed at each of *prefixes* from a package cache of its own.

    `conda_packages` says what is in them, unless a *channel* and *specs* of what to install from it are given. In a
    process of its own, since py-rattler may crash when one ends.
    """
    script = Path(__file__).with_name("conda_packages.py")
    more = [] if channel is None else ["--channel", channel, *(part for spec in specs for part in ("--spec", spec))]
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *map(str, prefixes), *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def rename_module(wheel: Path, old: str, new: str) -> None:
    """Give the module of a wheel another path; pip does not compare the hashes in its RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace(old, new), data.replace(old.encode(), new.encode()))


def copy_of(original: Path, target: Path) -> Path:
    """A copy of the environment at *original*, moved: its text files name *target*."""
    shutil.copytree(original, target, symlinks=True)
    old, new = os.fsencode(original), os.fsencode(target)
    for path in target.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix != ".json":
            data = path.read_bytes()
            if b"\0" not in data and old in data:
                path.write_bytes(data.replace(old, new))
    return target


def clone_of(original: Path, target: Path) -> Path:
    """What ``conda create --clone`` makes: hard links, and of the files that name their prefix new ones."""
    shutil.copytree(original, target, symlinks=True, copy_function=os.link)
    named = {entry.get("_path"): entry for record in _records(original) for entry in record["paths_data"]["paths"]}
    for path in target.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        data, mode = path.read_bytes(), path.stat().st_mode
        entry = named.get(str(path.relative_to(target)), {})
        relocation = Relocation(entry.get("file_mode") or "text", entry.get("prefix_placeholder") or PLACEHOLDER)
        if "prefix_placeholder" not in entry and (b"\0" in data or os.fsencode(original) not in data):
            continue
        moved = relocate(restore(data, relocation, str(original)), relocation, str(target))
        path.unlink()
        path.write_bytes(moved)
        path.chmod(mode)
    return target


def _records(prefix: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in (prefix / "conda-meta").glob("*.json")]


def said(*command: object, **environ: str) -> str:
    """What *command* prints, with no variable of ours but *environ*."""
    clean = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **environ}
    done = subprocess.run([*map(str, command)], env=clean, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
