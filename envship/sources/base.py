"""The interpreter of a venv as a package: executable, standard library, libpython, and what these need.

In the environment it lies as in any prefix (``bin/python3.11``, ``lib/python3.11``): started from there, Python finds
its library beside itself (``getpath``: the landmark ``lib/pythonX.Y/os.py``), so that neither ``pyvenv.cfg`` nor the
original interpreter is needed. Shared libraries of the system (``/lib``, ``/usr/lib``) stay where they are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from envship import elf
from envship.canonical import Treatment
from envship.sources.conda_base import OPENSSL, has_openssl, treatments
from envship.sources.draft import Draft, FileItem, Item
from envship.sources.interpreter import Interpreter
from envship.sources.items import Collector
from envship.sources.tree import Root, Trees
from worker_bootstrap.manifest import Link

_LEFT_OUT = (
    *("site-packages", "dist-packages", "test", "idlelib", "turtledemo", "lib2to3/tests", "unittest/test"),
    *("distutils/tests", "sqlite3/test", "ctypes/test", "tkinter/test", "EXTERNALLY-MANAGED"),
)
"""Parts of the standard library that no cluster needs, and packages, which are packages of their own."""

_SYSTEM_FOLDERS = ("/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/")


def base_roots(interpreter: Interpreter) -> list[Root]:
    """What has to be walked for `base_draft`."""
    executable = Root(interpreter.executable)
    library = _library_root(interpreter.stdlib)
    headers = _library_root(interpreter.include)
    roots = [executable, library, headers, *(Root(path) for path in _libraries(interpreter))]
    if has_openssl(interpreter):
        roots.append(Root(f"{interpreter.base_prefix}/{OPENSSL}"))
    if interpreter.platstdlib != interpreter.stdlib:
        roots.append(_library_root(interpreter.platstdlib))
    return roots


def _library_root(folder: str) -> Root:
    return Root(folder, _LEFT_OUT, follow=True)


def base_draft(interpreter: Interpreter, trees: Trees, collector: Collector) -> Draft:
    """The package ``python`` of a venv.

    Parameters
    ----------
    interpreter
        Asked for its libraries.
    """
    short = interpreter.short_version
    items: dict[str, Item] = {}
    recorded = treatments(interpreter, collector)
    binary = f"bin/python{short}"
    treatment = recorded.get(interpreter.executable) or collector.own(binary)
    items[binary] = FileItem(binary, interpreter.executable, os.stat(interpreter.executable), treatment)
    items["bin/python"] = Link("bin/python", f"python{short}")
    items["bin/python3"] = Link("bin/python3", f"python{short}")
    if interpreter.platlibdir != "lib":
        items[interpreter.platlibdir] = Link(interpreter.platlibdir, "lib")
    for folder, place in (
        (interpreter.platstdlib, f"lib/python{short}"),
        (interpreter.stdlib, f"lib/python{short}"),
        (interpreter.include, f"include/python{short}"),
    ):
        for item in _tree(folder, place, trees, collector, recorded):
            items[item.path] = item
    for path in _libraries(interpreter):
        name = os.path.basename(path)
        items[f"lib/{name}"] = _library(name, path, collector, recorded)
        # What needs it asks for it by the name that it has inside (libz.so.1), which was a link to the file.
        inner = elf.soname(Path(path).read_bytes())
        if inner and "/" not in inner:
            items.setdefault(f"lib/{inner}", Link(f"lib/{inner}", name))
    if has_openssl(interpreter):
        for path, (origin, node) in trees.found(Root(f"{interpreter.base_prefix}/{OPENSSL}"), OPENSSL).items():
            items.update((item.path, item) for item in collector.item(path, origin, node, recorded.get(origin)))
    if any(path.endswith("/dist-packages") for path in interpreter.site):
        # Debian's interpreter looks for packages in dist-packages unless it runs in a venv.
        items[f"lib/python{short}/dist-packages"] = Link(f"lib/python{short}/dist-packages", "site-packages")
    return Draft("python", interpreter.version, "", "python", list(items.values()))


def _library(name: str, origin: str, collector: Collector, recorded: Mapping[str, Treatment]) -> FileItem:
    place = f"lib/{name}"
    return FileItem(place, origin, os.stat(origin), recorded.get(origin) or collector.own(place))


def _tree(
    folder: str, place: str, trees: Trees, collector: Collector, recorded: Mapping[str, Treatment]
) -> Iterator[Item]:
    for path, (origin, node) in trees.found(_library_root(folder), place).items():
        if path.endswith((".a", ".o", ".pyc")) or ("/config-" in path and path.endswith(".so")):
            continue
        if stat.S_ISLNK(node.st_mode):
            # Distributions link parts of the library elsewhere (Debian: /etc): the content counts.
            if not os.path.isfile(origin):
                continue
            inside = os.path.realpath(origin).startswith(os.path.realpath(folder) + "/")
            if not inside or os.readlink(origin).startswith("/"):
                yield FileItem(path, origin, os.stat(origin), collector.own(path))
                continue
        yield from collector.item(path, origin, node, recorded.get(origin))


def _libraries(interpreter: Interpreter) -> list[str]:
    """Shared libraries outside of the system's folders and of the standard library."""
    inside = (interpreter.stdlib + "/", interpreter.platstdlib + "/")
    return sorted(
        {
            path
            for path in interpreter.loaded
            if path.startswith("/") and os.path.isfile(path) and not path.startswith((*_SYSTEM_FOLDERS, *inside))
        }
        - {interpreter.executable}
    )
