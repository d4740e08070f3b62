"""Carrying this package to machines where nothing of ours is installed.

A plugin that mixes in `Carried` pickles into a call of builtins alone: the sources of this package, a short loader,
and the name of the class to make. The receiving process imports the package from memory; `publish` writes it into the
store for interpreters that are started later. Does not carry any third-party package.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import stat
import tempfile
import zlib
from pathlib import Path
from typing import Any

from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.durable import make_folder, sync_folder
from worker_bootstrap.layout import Layout

logger = logging.getLogger("envship.store")

PACKAGE = "worker_bootstrap"
BYTE_CODE = "__pycache__"
COMPILED = "compiled-"
"""Begins the names of what `worker_bootstrap.compiled` leaves there."""

# Runs on machines that have only the standard library; everything it needs is inside. A process that already holds
# other code under this name (from an earlier client) gets the new code; objects made from the old one keep working.
_LOADER = """
def load(payload, digest, module, name, arguments):
    import importlib, importlib.util, json, sys, zlib

    PACKAGE = "worker_bootstrap"
    loaded = sys.modules.get(PACKAGE)
    if loaded is None or getattr(loaded, "carried_digest", None) not in (None, digest):
        current = False
    elif getattr(loaded, "carried_digest", None) is None:
        from worker_bootstrap import carry
        current = carry.package_digest() == digest
    else:
        current = True
    if not current:
        sources = json.loads(zlib.decompress(payload))

        class Finder:
            def find_spec(self, fullname, path=None, target=None):
                file = fullname.replace(".", "/") + ".py"
                package = fullname.replace(".", "/") + "/__init__.py"
                if file in sources:
                    return importlib.util.spec_from_loader(fullname, self, origin="carried:" + file)
                if package in sources:
                    return importlib.util.spec_from_loader(fullname, self, origin="carried:" + package, is_package=True)

            def create_module(self, spec):
                return None

            def get_source(self, fullname):
                stem = fullname.replace(".", "/")
                return sources.get(stem + ".py") or sources[stem + "/__init__.py"]

            def exec_module(self, module):
                code = compile(self.get_source(module.__name__), module.__spec__.origin, "exec")
                if module.__name__ == PACKAGE:
                    module.carried_digest, module.carried_sources = digest, sources
                exec(code, module.__dict__)

        for other in [m for m in sys.modules if m == PACKAGE or m.startswith(PACKAGE + ".")]:
            del sys.modules[other]
        sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "envship_carried", False)]
        finder = Finder()
        finder.envship_carried = True
        sys.meta_path.insert(0, finder)
    return getattr(importlib.import_module(module), name)(*arguments)
"""
_CALL = "(lambda scope: (exec(loader, scope), scope['load'](payload, digest, module, name, arguments))[1])({})"


@functools.cache
def package_sources() -> dict[str, str]:
    """The sources of this package: path below ``site-packages`` to text, sorted."""
    import worker_bootstrap

    carried = getattr(worker_bootstrap, "carried_sources", None)
    if carried is not None:
        return dict(carried)
    root = Path(worker_bootstrap.__file__ or "").parent
    return {f"{PACKAGE}/{path.name}": path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))}


@functools.cache
def package_digest() -> Digest:
    """Digest of `package_sources`: two processes with the same digest run the same code of ours."""
    return digest_of(json.dumps(package_sources(), sort_keys=True).encode())


@functools.cache
def _payload() -> bytes:
    return zlib.compress(json.dumps(package_sources(), sort_keys=True).encode(), 9)


class Carried:
    """Mix-in for plugins: unpickling needs nothing but the standard library and what the class imports.

    Notes
    -----
    Subclasses return their constructor's arguments, picklable with builtins alone, from `arguments`.
    """

    def arguments(self) -> tuple[Any, ...]:
        """What the constructor is called with on the other side."""
        return ()

    def __reduce__(self) -> tuple[Any, ...]:
        scope = {
            "loader": _LOADER,
            "payload": _payload(),
            "digest": package_digest(),
            "module": type(self).__module__,
            "name": type(self).__qualname__,
            "arguments": self.arguments(),
        }
        return (eval, (_CALL, scope))


def publish(layout: Layout) -> Path:
    """Write this package into the store, for interpreters to come; return the folder to put on their ``sys.path``.

    Notes
    -----
    Idempotent, and safe to be done by many processes at once: the folder appears whole, named by its content, and is on
    disk when this returns. One that is there is compared with what it should be, file by file (some 2 ms), since what
    lies there is run: a power cut may have left less, and before it had its mode, others may have written to it. It is
    mended by renames, so processes that run from it go on.
    """
    folder = layout.carried(package_digest())
    if _is_sound(folder):
        return folder
    building = Path(tempfile.mkdtemp(dir=layout.tmp))
    try:
        _write(building)
        make_folder(folder.parent)
        _put(building, folder, layout.tmp)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _folders(root: Path) -> list[Path]:
    """The folders of a published package. That of byte code as well: Python would make it as the umask says."""
    return [root, root / PACKAGE, root / PACKAGE / BYTE_CODE]


def _is_sound(folder: Path) -> bool:
    """Whether the package lies there, all of it, and nobody else could write to it."""
    try:
        if not all(stat.S_ISDIR(os.lstat(path).st_mode) and _is_ours(os.lstat(path)) for path in _folders(folder)):
            return False
        return not _strangers(folder) and all(
            _content(folder / name) == text.encode() for name, text in package_sources().items()
        )
    except OSError:
        return False


def _strangers(folder: Path) -> list[Path]:
    """What lies beside and between our modules, and would be imported in their place, or in that of Python's."""
    ours = {PACKAGE, f"{PACKAGE}/{BYTE_CODE}", *package_sources()}
    found = [path for path in folder.iterdir() if not path.name.startswith(COMPILED)]
    return [path for path in (*found, *(folder / PACKAGE).iterdir()) if str(path.relative_to(folder)) not in ours]


def _content(path: Path) -> bytes | None:
    """The bytes of a regular file that nobody else could write to."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        return file.read() if stat.S_ISREG(found.st_mode) and _is_ours(found) else None


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _write(building: Path) -> None:
    """The package below *building*, on disk, with modes that the umask has no say in."""
    building.chmod(0o755)
    for path in _folders(building):
        make_folder(path)
    for name, text in package_sources().items():
        (building / name).write_text(text, encoding="utf-8")
        (building / name).chmod(0o644)
    for name in package_sources():  # after the last was written: then most of them have little to wait for
        with open(building / name, "rb") as file:
            os.fsync(file.fileno())
    for path in _folders(building):
        sync_folder(path)


def _put(building: Path, folder: Path, tmp: Path) -> None:
    """Move what is below *building* to *folder*, or, if there is one already, in the place of what lies there."""
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if not _is_sound(folder):  # or another process was first
            _replace(building, folder, tmp)
    sync_folder(folder.parent)


def _replace(building: Path, folder: Path, tmp: Path) -> None:
    """File by file: processes run from there."""
    logger.warning("%s is not as it was written: it is written anew", folder)
    for path in _folders(folder):
        _own(path, tmp)
    for path in _strangers(folder):
        _set_aside(path, tmp)
    for name in package_sources():
        if os.path.isdir(folder / name):
            _set_aside(folder / name, tmp)
        os.replace(building / name, folder / name)
    # What was compiled may be of other sources, or half of it; whoever misses it compiles again.
    compiled = [*(folder / PACKAGE / BYTE_CODE).iterdir(), *folder.glob(f"{COMPILED}*")]
    for path in compiled:
        with contextlib.suppress(OSError):
            path.unlink()
    for path in _folders(folder):
        sync_folder(path)


def _own(path: Path, tmp: Path) -> None:
    """Make *path* a folder that only we can write to; whatever else lies there is moved away."""
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.geteuid()):
            os.chmod(path, 0o755)
        else:
            _set_aside(path, tmp)
    make_folder(path)


def _set_aside(path: Path, tmp: Path) -> None:
    os.rename(path, tempfile.mkdtemp(dir=tmp) + "/" + path.name)
