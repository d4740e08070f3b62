"""File systems that a test makes for itself: small, read-only, without execution, with reflinks, or odd. Needs root.

And a folder in memory, which needs nothing.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_mount = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a file system")

IMAGE_BYTES = {"btrfs": 128 << 20, "xfs": 320 << 20}
"""As small as ``mkfs`` lets them be."""

END_TIMEOUT_S = 20
"""So long a process that serves a file system may take to begin, or to end after it was unmounted."""

MEMORY = Path("/dev/shm")
MEMORY_BYTES = 1 << 30


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """A folder for thousands of small files, in memory if this system has one where there is room, and programs run."""
    found = os.statvfs(MEMORY) if os.access(MEMORY, os.W_OK) else None
    if found is None or found.f_flag & os.ST_NOEXEC or found.f_bavail * found.f_frsize < MEMORY_BYTES:
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="envship-test-") as name:
        yield Path(name)


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    """A file system in memory at *path*."""
    with _mounted(path, "-t", "tmpfs", "-o", options, "tmpfs"):
        yield path


@contextmanager
def with_reflinks(path: Path, kind: str) -> Iterator[Path]:
    """A *kind* (``btrfs`` or ``xfs``) file system in a file beside *path*."""
    tool = shutil.which(f"mkfs.{kind}") or shutil.which(f"mkfs.{kind}", path="/usr/sbin:/sbin")
    if tool is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    image = path.with_suffix(".img")
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES[kind])
    subprocess.run([tool, "-q", str(image)], check=True, capture_output=True)
    with _mounted(path, "-o", "loop", str(image)):
        yield path
    image.unlink()


@contextmanager
def odd(path: Path, folder: Path, *oddities: str, kind: str = "odd") -> Iterator[Path]:
    """*folder*, at *path* as well, with the *oddities* of `tests.odd_file_system`; for the kernel, a ``fuse.KIND``."""
    try:
        importlib.import_module("mfusepy")
    except (ImportError, OSError) as error:
        pytest.skip(f"needs mfusepy and libfuse: {error}")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    path.mkdir(exist_ok=True)
    program = [sys.executable, "-m", "tests.odd_file_system", str(folder), str(path), kind, *oddities]
    server = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + END_TIMEOUT_S
        while not os.path.ismount(path) and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if not os.path.ismount(path):
            server.kill()
            pytest.skip(f"cannot be mounted here: {server.communicate()[1].strip()[-300:]}")
        yield path
    finally:
        if os.path.ismount(path):
            # A lazy one lets go of it also where a failed test still has a file open there.
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        try:
            server.communicate(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()
            raise


@contextmanager
def overlay(path: Path, lower: Path) -> Iterator[Path]:
    """*lower* at *path* as a container has it that runs from an image: what is changed lies in memory."""
    with tmpfs(path.with_name(f"{path.name}-upper"), "size=50m") as memory:
        for name in ("upper", "work"):
            (memory / name).mkdir()
        options = f"lowerdir={lower},upperdir={memory}/upper,workdir={memory}/work"
        with _mounted(path, "-t", "overlay", "-o", options, "overlay"):
            yield path


def remount(path: Path, options: str) -> None:
    """Change the options of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True, capture_output=True)


@contextmanager
def _mounted(path: Path, *arguments: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)
