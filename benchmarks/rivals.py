"""What people use today, doing the same work: `tar` and conda-unpack, rattler's installer, uv.

Each raises `Skipped` with the reason where it cannot be run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

NOT_PYPI = {"python", "python_abi", "pip", "setuptools", "wheel"}
INSTALL_TIMEOUT_S = 1200


class Skipped(Exception):
    """A rival cannot be run here; the message says why."""


def archive_of(prefix: Path, cache: Path) -> Path:
    """A conda-pack archive (``.tar.zst``) of *prefix*, made once and kept in *cache*."""
    if shutil.which("tar") is None or shutil.which("zstd") is None:
        raise Skipped("tar or zstd is not installed")
    archive = cache / f"{prefix.name}.tar.zst"
    if not archive.exists():
        part = cache / f"{prefix.name}-part.tar.zst"
        program = (
            "import sys, conda_pack; conda_pack.pack(prefix=sys.argv[1], output=sys.argv[2], "
            "ignore_missing_files=True, ignore_editable_packages=True, force=True)"
        )
        _run([sys.executable, "-c", program, str(prefix), str(part)], "conda-pack failed")
        part.rename(archive)
    return archive


def unpack(archive: Path, destination: Path) -> float:
    """Seconds of ``tar --zstd -xf`` into *destination*, and ``conda-unpack`` there."""
    began = time.perf_counter()
    destination.mkdir()
    _run(["tar", "--zstd", "-xf", str(archive), "-C", str(destination)], "tar failed")
    _run([str(destination / "bin/python"), str(destination / "bin/conda-unpack")], "conda-unpack failed")
    return time.perf_counter() - began


_RATTLER = """
import asyncio, os, sys, time
from pathlib import Path
from rattler import PrefixRecord, install
prefix, cache, destination = sys.argv[1:]
records = [PrefixRecord.from_path(path) for path in sorted(Path(prefix, "conda-meta").glob("*.json"))]
async def main():
    began = time.perf_counter()
    await install(records, target_prefix=destination, cache_dir=cache, show_progress=False)
    print(time.perf_counter() - began, flush=True)
asyncio.run(main())
os._exit(0)  # py-rattler may crash when the interpreter ends after a large installation
"""


def rattler(prefix: Path, destination: Path) -> float:
    """Seconds in which rattler installs the packages of *prefix* from its warm cache, without starting Python."""
    sources = set()
    for path in prefix.glob("conda-meta/*.json"):
        record = json.loads(path.read_bytes())
        source = (record.get("link") or {}).get("source") or record.get("extracted_package_dir") or ""
        if not source or not os.path.isdir(source):
            raise Skipped(f"package {record.get('name')} is not in the package cache ({source or 'not recorded'})")
        sources.add(os.path.dirname(source))
    if len(sources) != 1:
        raise Skipped(f"the packages come from {len(sources)} caches" if sources else "no packages are recorded")
    printed = _run(
        [sys.executable, "-c", _RATTLER, str(prefix), sources.pop(), str(destination)], "rattler's installer failed"
    )
    return float(printed.split()[-1])


class Uv:
    """uv with a cache of its own that holds the wheels of one environment."""

    def __init__(self, prefix: Path, cache: Path) -> None:
        self._uv = self._found(cache)
        self._environ = {**os.environ, "UV_CACHE_DIR": str(cache / "uv"), "UV_LINK_MODE": "hardlink"}
        self._environ.pop("VIRTUAL_ENV", None)
        if not (prefix / "bin/python").exists():
            raise Skipped(f"{prefix} has no Python")
        self._python = prefix / "bin/python"
        self._requirements = cache / f"{prefix.name}-requirements.txt"
        self._requirements.write_text("\n".join(_requirements(prefix)) + "\n")
        self._warm = False

    def install(self, destination: Path) -> float:
        """Seconds of ``uv pip install`` of the environment's wheels from the warm cache into the new venv there."""
        if not self._warm:
            self._install(destination.with_name("warming"))
            self._warm = True
        return self._install(destination, "--offline")

    def _install(self, destination: Path, *options: str) -> float:
        self._call("venv", "--quiet", "--python", str(self._python), str(destination))
        began = time.perf_counter()
        self._call(
            *("pip", "install", "--quiet", "--no-deps", "--python", str(destination), *options),
            *("-r", str(self._requirements)),
        )
        return time.perf_counter() - began

    def _call(self, *arguments: str) -> None:
        _run([str(self._uv), *arguments], "uv failed", self._environ)

    @staticmethod
    def _found(cache: Path) -> Path:
        found = shutil.which("uv")
        if found:
            return Path(found)
        tools = cache / "uv-tool"
        if not (tools / "bin/uv").exists():
            _run([sys.executable, "-m", "venv", str(tools)], "no venv for uv")
            _run([str(tools / "bin/pip"), "install", "--quiet", "uv"], "uv cannot be installed")
        return tools / "bin/uv"


def _requirements(prefix: Path) -> list[str]:
    """``name==version`` of every Python distribution that lies in *prefix*."""
    found = set()
    for metadata in prefix.glob("lib/python3*/site-packages/*.dist-info/METADATA"):
        head = metadata.read_text(errors="replace").partition("\n\n")[0]
        fields = dict(re.findall(r"^(Name|Version): *(.+)$", head, re.MULTILINE))
        if {"Name", "Version"} <= fields.keys() and fields["Name"].lower() not in NOT_PYPI:
            found.add(f"{fields['Name']}=={fields['Version']}")
    if not found:
        raise Skipped(f"{prefix} holds no distributions")
    return sorted(found)


def _run(command: list[str], problem: str, environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=INSTALL_TIMEOUT_S, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise Skipped(f"{problem}: {lines[-1]}")
    return done.stdout
