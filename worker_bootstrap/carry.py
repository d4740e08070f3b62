"""Carrying this package to machines where nothing of ours is installed.

A plugin that mixes in `Carried` pickles into a call of builtins alone: the sources of this package, a short loader,
and the name of the class to make. The receiving process imports the package from memory; `publish` writes it into the
store for interpreters that are started later. Does not carry any third-party package.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.layout import Layout

PACKAGE = "worker_bootstrap"

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

    Idempotent, and safe to be done by many processes at once: the folder appears whole, named by its content.
    """
    folder = layout.carried(package_digest())
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=layout.tmp))
    try:
        for name, text in package_sources().items():
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        building.chmod(0o755)
        building.rename(folder)
    except OSError:
        shutil.rmtree(building, ignore_errors=True)
        if not folder.exists():
            raise
    return folder
