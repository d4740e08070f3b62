"""Where in an environment modules are imported from besides its library: what path files in it, and installs, name.

Folders there get byte code like the library, so that nobody compiles them where the environment is built. Folders
outside of it are `envship.sources.projects`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from envship.sources import path_files
from envship.sources.distributions import Distribution
from envship.sources.ignored import is_in
from envship.sources.tree import Found, Trees

_PATH_FILE = re.compile(r"lib/python[0-9.]+t?/site-packages/[^/]+\.pth")
_OTHER_THINGS = ("bin", "conda-meta", "etc", "include", "lib", "lib64", "libexec", "share", "var")
"""Folders of every prefix that are no packages, though the prefix itself is searched for modules."""


def named_by_path_files(trees: Trees, prefixes: Sequence[str]) -> list[str]:
    """What path files of the environment, which is at the first of *prefixes* and was walked, name inside of it."""
    walks = (trees.walk(root) for root in trees.roots if root.path == prefixes[0])
    files = [path for walk in walks for path in walk if _PATH_FILE.fullmatch(path)]
    named = (path_files.folders_inside(f"{prefixes[0]}/{path}", prefixes) for path in files)
    return sorted({folder for folders in named for folder in folders})


def named_by_install(distribution: Distribution, files: Mapping[str, Found], prefixes: Sequence[str]) -> Iterator[str]:
    """What modules and symbolic links of an editable *distribution*, whose source is in the environment, lead to."""
    for path in distribution.files:
        if path in files:
            origin = files[path].origin
            if os.path.islink(origin):
                yield from path_files.places_inside(os.path.realpath(origin), prefixes)
            elif path.endswith(".py"):
                yield from path_files.modules_inside(origin, prefixes)


def is_searched(path: str, folders: Iterable[str]) -> bool:
    """Whether the module at *path* is imported from one of *folders*; ``""`` is the environment's own."""
    return any(is_in(path, folder) if folder else path.split("/")[0] not in _OTHER_THINGS for folder in folders)
