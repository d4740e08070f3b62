"""What links an environment to source trees elsewhere: lines of ``.pth`` files, and the modules of build backends.

Reads text and finds paths in it; what becomes of the trees is `envship.sources.projects`. Source: the module ``site``
of the standard library, PEP 660, and the modules that setuptools, ``editables`` (hatchling, PDM) and scikit-build-core
write, all of which hold absolute paths as string literals.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from envship.canonical import SYSTEM_PREFIXES


def lines_of(path_file: str, text: str) -> Iterator[tuple[str, str | None]]:
    """Each line of a ``.pth`` file (its end included), and the folder that it adds to ``sys.path``, if it adds one."""
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        adds = stripped and not line.startswith(("#", "import ", "import\t"))
        yield line, os.path.normpath(os.path.join(os.path.dirname(path_file), stripped)) if adds else None


def read(file: str) -> str:
    """The text of a ``.pth`` file, as lenient as ``site``."""
    return Path(file).read_text(encoding="utf-8", errors="surrogateescape")


def folders_outside(path_file: str, prefixes: Collection[str]) -> list[str]:
    """What a ``.pth`` file adds to ``sys.path`` that exists and lies outside of *prefixes*."""
    named = (folder for _, folder in lines_of(path_file, read(path_file)) if folder is not None)
    return [folder for folder in dict.fromkeys(named) if os.path.exists(folder) and not is_inside(folder, prefixes)]


def folders_inside(path_file: str, prefixes: Sequence[str]) -> list[str]:
    """What a ``.pth`` file adds to ``sys.path`` that lies in the environment at *prefixes*: paths in it."""
    named = (folder for _, folder in lines_of(path_file, read(path_file)) if folder is not None)
    return [place for folder in named for place in places_inside(folder, prefixes)]


def places_inside(path: str, prefixes: Sequence[str]) -> list[str]:
    """Where in the environment at *prefixes* the file or folder *path* lies, by its name and links resolved."""
    found = {
        form[len(prefix) + 1 :]
        for form in (path, os.path.realpath(path))
        for prefix in prefixes
        if prefix not in SYSTEM_PREFIXES and (form + "/").startswith(prefix + "/")
    }
    return sorted(found)


def modules_inside(file: str, prefixes: Sequence[str]) -> list[str]:
    """Modules and packages in the environment at the first of *prefixes* that stand as string literals in a module."""
    places = [place for text in _literals(file) for place in places_inside(os.path.normpath(text), prefixes)]
    return [module for place in places if place for module in _modules(place, f"{prefixes[0]}/")]


def paths_in_module(file: str) -> list[str]:
    """Absolute paths of files and folders that stand as string literals in a module; none if it is no Python."""
    found = [path for text in _literals(file) for path in _modules(os.path.normpath(text))]
    return list(dict.fromkeys(found))


def _literals(file: str) -> list[str]:
    """String literals of a module that may be absolute paths; none if it is no Python."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (SyntaxError, ValueError):
        return []
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if text.startswith("/") and "\0" not in text and "\n" not in text]


def _modules(path: str, before: str = "") -> list[str]:
    """The file or folder *path*, if it, with *before* in front of it, exists."""
    # A module's entry lacks the suffix in older versions of setuptools.
    paths = [name for name in (path, f"{path}.py") if os.path.exists(before + name)][:1]
    # A package is named by its folder, or by the module that makes it one.
    return [os.path.dirname(name) if name.endswith("/__init__.py") else name for name in paths]


def is_inside(path: str, prefixes: Collection[str]) -> bool:
    """Whether *path*, or what it is a link to, lies in one of *prefixes*."""
    folders = tuple(prefix.rstrip("/") + "/" for prefix in prefixes)
    return any((form + "/").startswith(folders) for form in (path, os.path.realpath(path)))
