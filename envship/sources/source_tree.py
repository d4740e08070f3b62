"""The files of a source tree that go along with an environment: what somebody wrote, not what git or tools left there.

Left out are the folders of version control, caches, environments, and what git ignores (`envship.sources.ignored`);
whoever leaves out more than a little is told so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence

from dask.utils import format_bytes

from envship.sources.ignored import ENVIRONMENT_MARKS, SKIPPED, LeftOut, ignored, is_environment, is_in
from envship.sources.tree import Found, Root, Trees, portable
from envship.sources.version_control import VERSION_CONTROL

logger = logging.getLogger("envship.sources")

SAID_OVER_BYTES = 1 << 20
"""Whatever git ignores is left out; more than this is not left out without saying so."""


def files_below(
    root: str, parts: Sequence[str], trees: Trees, prefixes: Sequence[str] = ()
) -> Iterator[tuple[str, Found]]:
    """The files of *parts*, absolute paths of files and folders in *root*; each by its path relative to *root*.

    *prefixes* are folders that are no part of it, wherever they lie: the environment that the tree goes along with.
    """
    left_out = ignored(root, parts)
    _say(root, parts, left_out)
    # An edit of one may change what goes along.
    for folder in sorted({root, *map(repository, parts)}):
        trees.walk(Root(f"{folder}/.gitignore"))
    for part in parts:
        inside = os.path.relpath(part, root)
        before = "" if inside == "." else inside + "/"
        skipped = [path[len(before) :] for path in left_out if path.startswith(before)]
        skip_paths = (*sorted(skipped), *_below(part, prefixes))
        walked = trees.walk(Root(part, skip_paths, SKIPPED, skip_marks=ENVIRONMENT_MARKS))
        for relative, node in walked.items():
            path = before + relative if relative else inside
            yield portable(path), Found(part if path == "." else f"{root}/{path}", node)
        for name, (_, modules) in left_out.items():
            if modules is not None and is_in(modules.path, part):
                modules = modules._replace(skip_paths=(*modules.skip_paths, *_below(modules.path, prefixes)))
                for relative, found in trees.found(modules, portable(name)).items():
                    yield relative, found


def stays_behind(path: str) -> bool:
    """Whether *path*, which a link in a project points to, is nothing that goes along, as a whole."""
    return os.path.basename(path) in VERSION_CONTROL or is_environment(path)


def repository(folder: str) -> str:
    """The folder of the project that *folder* is part of: the nearest one above with a mark of one, or itself."""
    above = folder
    while above != "/":
        if any(os.path.exists(f"{above}/{mark}") for mark in (".git", "pyproject.toml", "setup.py")):
            return above
        above = os.path.dirname(above)
    return folder


def _below(folder: str, paths: Sequence[str]) -> list[str]:
    """Those of *paths* that lie in *folder*, relative to it."""
    return sorted({path[len(folder) + 1 :] for path in paths if path.startswith(folder + "/")})


def _say(root: str, parts: Sequence[str], left_out: Mapping[str, LeftOut]) -> None:
    mine = {path: size for path, (size, _) in left_out.items() if any(is_in(f"{root}/{path}", part) for part in parts)}
    if sum(mine.values()) > SAID_OVER_BYTES:
        largest = sorted(mine, key=lambda path: -mine[path])[:5]
        names = ", ".join(f"{path} ({format_bytes(mine[path])})" for path in largest)
        more = f" and {len(mine) - len(largest)} more" if len(mine) > len(largest) else ""
        logger.warning("of the project %s, what git ignores stays here: %s%s", root, names, more)
