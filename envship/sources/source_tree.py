"""The files of a source tree that go along with an environment: what somebody wrote, not what git or tools left there.

Left out are the folders of version control, caches, environments, and what git ignores; of that, modules stay in
(generated ones, compiled ones), and whoever leaves out more than a little is told so.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from dask.utils import format_bytes

from envship.sources.tree import Found, Root, Trees, portable

logger = logging.getLogger("envship.sources")

SKIPPED = (
    *(".git", ".hg", ".svn", ".venv", ".tox", ".nox", ".eggs", ".pixi", "node_modules", ".ipynb_checkpoints"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".idea", ".vscode", ".DS_Store"),
)
SAID_OVER_BYTES = 1 << 20
"""Whatever git ignores is left out; more than this is not left out without saying so."""

_MODULES = (".py", ".pyi", ".so", ".mo")
_GIT = ("git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false")
_GIT_TIMEOUT_S = 30
_COUNTED = 20_000
"""Files that are looked at to say how large something is that stays behind."""


def files_below(root: str, parts: Sequence[str], trees: Trees) -> Iterator[tuple[str, Found]]:
    """The files of *parts*, absolute paths of files and folders in *root*; each by its path relative to *root*."""
    ignored = _ignored(root)
    # A part that git ignores as a whole (a build folder that an installation links to) is wanted all the same.
    ignored = {
        path: size for path, size in ignored.items() if not any(_is_in(part, f"{root}/{path}") for part in parts)
    }
    _say(root, parts, ignored)
    # An edit of it may change what goes along.
    trees.walk(Root(f"{root}/.gitignore"))
    for part in parts:
        inside = os.path.relpath(part, root)
        before = "" if inside == "." else inside + "/"
        skipped = [path[len(before) :] for path in ignored if path.startswith(before)]
        walked = trees.walk(Root(part, (*sorted(skipped), *_environments(part)), SKIPPED))
        for relative, node in walked.items():
            path = before + relative if relative else inside
            yield portable(path), Found(part if path == "." else f"{root}/{path}", node)


def minimal(paths: Sequence[str]) -> list[str]:
    """*paths*, sorted, without those that lie in another one."""
    found: list[str] = []
    for path in sorted(set(paths), key=lambda path: path.split("/")):
        if not found or not _is_in(path, found[-1]):
            found.append(path)
    return found


def repository(folder: str) -> str:
    """The folder of the project that *folder* is part of: the nearest one above with a mark of one, or itself."""
    above = folder
    while above != "/":
        if any(os.path.exists(f"{above}/{mark}") for mark in (".git", "pyproject.toml", "setup.py")):
            return above
        above = os.path.dirname(above)
    return folder


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _environments(folder: str) -> Iterator[str]:
    """Environments that lie in a project."""
    if not os.path.isdir(folder):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            marks = ("pyvenv.cfg", "conda-meta")
            if entry.is_dir(follow_symlinks=False) and any(os.path.exists(f"{entry.path}/{mark}") for mark in marks):
                yield entry.name


def _ignored(root: str) -> Mapping[str, int]:
    """Files and folders in *root* that git ignores, modules excepted, and their size; none where there is no git."""
    command = [*_GIT, "-C", root, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for raw in done.stdout.split(b"\0"):
        name = os.fsdecode(raw).rstrip("/")
        is_known = set(name.split("/")) & {*SKIPPED, "__pycache__"}
        if name and not is_known and not name.endswith((*_MODULES, ".egg-info")):
            found[name] = _size_bytes(f"{root}/{name}")
    return found


def _size_bytes(path: str) -> int:
    """How large a file or folder is; of a folder with very many files, how large some of them are."""
    if not os.path.isdir(path) or os.path.islink(path):
        return os.lstat(path).st_size if os.path.lexists(path) else 0
    size_bytes = count = 0
    for folder, _, names in os.walk(path):
        for name in names:
            count += 1
            try:
                size_bytes += os.lstat(f"{folder}/{name}").st_size
            except OSError:
                continue
        if count > _COUNTED:
            break
    return size_bytes


def _say(root: str, parts: Sequence[str], ignored: Mapping[str, int]) -> None:
    mine = {path: size for path, size in ignored.items() if any(_is_in(f"{root}/{path}", part) for part in parts)}
    if sum(mine.values()) > SAID_OVER_BYTES:
        largest = sorted(mine, key=lambda path: -mine[path])[:5]
        names = ", ".join(f"{path} ({format_bytes(mine[path])})" for path in largest)
        more = f" and {len(mine) - len(largest)} more" if len(mine) > len(largest) else ""
        logger.warning("of the project %s, what git ignores stays here: %s%s", root, names, more)
