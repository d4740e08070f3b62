"""What links an environment to source trees elsewhere: lines of ``.pth`` files, and the modules of build backends.

Reads text and finds paths in it; what becomes of the trees is `envship.sources.projects`. Source: the module ``site``
of the standard library, PEP 660, and the modules that setuptools, ``editables`` (hatchling, PDM) and scikit-build-core
write, all of which hold absolute paths as string literals.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Collection, Iterator
from pathlib import Path


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


def paths_in_module(file: str) -> list[str]:
    """Absolute paths of files and folders that stand as string literals in a module; none if it is no Python."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (SyntaxError, ValueError):
        return []
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = []
    for text in texts:
        if text.startswith("/") and "\0" not in text and "\n" not in text:
            # A module's entry lacks the suffix in older versions of setuptools.
            paths = [path for path in (os.path.normpath(text), f"{text}.py") if os.path.exists(path)][:1]
            # A package is named by its folder, or by the module that makes it one.
            found += [os.path.dirname(path) if path.endswith("/__init__.py") else path for path in paths]
    return list(dict.fromkeys(found))


def is_inside(path: str, prefixes: Collection[str]) -> bool:
    """Whether *path*, or what it is a link to, lies in one of *prefixes*."""
    folders = tuple(prefix.rstrip("/") + "/" for prefix in prefixes)
    return any((form + "/").startswith(folders) for form in (path, os.path.realpath(path)))
