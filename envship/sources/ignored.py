"""What of a source tree stays behind because git ignores it.

Modules (generated ones, compiled ones) do not, wherever they lie: a program needs them all the same. They do stay in
what was built from the project, in environments and in tools' own folders. Where git cannot say what it ignores (it is
not installed, takes too long, or the tree is no repository), the files named ``.gitignore`` are read here: names and
paths with ``*``, ``?``, ``[…]`` and ``**``, ``!``, and a slash at the end for folders; that a file is in the repository
all the same is not known then. Source: gitignore(5). Repositories in the tree (submodules and other clones, which git
does not enter) say for themselves what they ignore. See also `envship.sources.source_tree`.
"""

from __future__ import annotations

import fnmatch
import os
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from envship.sources.tree import Root
from envship.sources.version_control import VERSION_CONTROL

SKIPPED = (
    *VERSION_CONTROL,
    *(".venv", ".tox", ".nox", ".eggs", ".pixi", "node_modules", ".ipynb_checkpoints"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".idea", ".vscode", ".DS_Store"),
)
"""Names of what never goes along, whether git ignores it or not."""

ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")
"""Names of which one lies in every Python environment."""

_NOBODY_MISSES = frozenset((*SKIPPED, "__pycache__"))
_BUILT = ("build", "dist")
"""Folders of a project in which build backends leave copies of its modules."""
_MODULES = (".py", ".pyi", ".so", ".mo")
_GIT = ("git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false")
_GIT_TIMEOUT_S = 30
_COUNTED = 20_000
"""Files that are looked at to say how large something is that stays behind."""


class LeftOut(NamedTuple):
    """What stays behind: how large it is, and in a folder, the modules that do not stay."""

    size_bytes: int
    modules: Root | None = None


def ignored(root: str, wanted: Sequence[str] = ()) -> Mapping[str, LeftOut]:
    """Files and folders that stay behind of the tree at *root*, by their relative paths.

    *wanted* are absolute paths: a folder in which one of them lies (a build folder that an installation links to) does
    not stay, even if git ignores it.
    """
    found: dict[str, LeftOut] = {}
    for name in minimal(_names(root, wanted)):
        path = f"{root}/{name}"
        if _NOBODY_MISSES.intersection(name.split("/")) or any(is_in(part, path) for part in wanted):
            continue
        if not os.path.isdir(path) or os.path.islink(path):
            if not name.endswith(_MODULES) and os.path.lexists(path):
                found[name] = LeftOut(os.lstat(path).st_size)
        elif is_environment(path):
            found[name] = LeftOut(0)
        elif not name.endswith(".egg-info"):
            left_out = _folder(path)
            found[name] = left_out._replace(modules=None) if _is_built(root, name) else left_out
    return found


def is_in(path: str, folder: str) -> bool:
    """Whether *path* is *folder*, or lies in it by its name."""
    return path == folder or path.startswith(folder + "/")


def minimal(paths: Iterable[str]) -> list[str]:
    """*paths*, sorted, without those that lie in another one."""
    found: list[str] = []
    for path in sorted(set(paths), key=lambda path: path.split("/")):
        if not found or not is_in(path, found[-1]):
            found.append(path)
    return found


def is_environment(folder: str) -> bool:
    """Whether a folder of a project is a Python environment."""
    return any(os.path.exists(f"{folder}/{mark}") for mark in ENVIRONMENT_MARKS)


def _is_built(root: str, name: str) -> bool:
    folder, _, last = name.rpartition("/")
    return last in _BUILT and (not folder or os.path.exists(f"{root}/{folder}/.git"))


def _folder(path: str) -> LeftOut:
    """An ignored folder; of one with very many files, the size of some of them."""
    size_bytes = count = 0
    environments = []
    for folder, folders, names in os.walk(path):
        for name in list(folders):
            if name in _NOBODY_MISSES or is_environment(f"{folder}/{name}"):
                folders.remove(name)
                environments.append(f"{folder}/{name}"[len(path) + 1 :])
        for name in names[: max(0, _COUNTED - count)]:
            if not name.endswith(_MODULES):
                size_bytes += os.lstat(f"{folder}/{name}").st_size if os.path.lexists(f"{folder}/{name}") else 0
        count += len(names)
    return LeftOut(size_bytes, Root(path, tuple(sorted(environments)), SKIPPED, _MODULES))


def _names(root: str, wanted: Sequence[str]) -> Iterator[str]:
    """What is ignored below *root*, as the repository that it lies in and each one below it say."""
    tops = [root]
    for top in tops:
        said = _by_git(top)
        names = [f"{top}/{name}" for name in (_by_hand(top) if said is None else said)]
        yield from (name[len(root) + 1 :] for name in names)
        passed_over = {name for name in names if not any(is_in(part, name) for part in wanted)}
        # Those of the loop that runs: repositories hold others.
        tops += _repositories_below(top, passed_over, wanted)


def _repositories_below(top: str, passed_over: Collection[str], wanted: Sequence[str]) -> Iterator[str]:
    """The nearest repositories below the folder *top*, of those that have to do with what is *wanted* (or of all)."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        entries = _entries(folder)
        if folder != top:
            names = {entry.name for entry in entries}
            if ".git" in names:
                yield folder
                continue
            if not names.isdisjoint(ENVIRONMENT_MARKS):
                continue
        for entry in entries:
            if entry.name not in _NOBODY_MISSES and entry.path not in passed_over and _concerns(entry.path, wanted):
                waiting += [entry.path] if entry.is_dir(follow_symlinks=False) else []


def _concerns(path: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(is_in(path, part) or is_in(part, path) for part in wanted)


def _by_git(root: str) -> list[str] | None:
    """What git says that it ignores, folders as a whole; None if it cannot say."""
    command = [*_GIT, "-C", root, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    names = [os.fsdecode(raw).rstrip("/") for raw in done.stdout.split(b"\0") if raw]
    # A tree that a repository around it ignores altogether is a tree of its own.
    return None if "." in names else names


class _Rule(NamedTuple):
    """A line of the ``.gitignore`` in the folder *base*."""

    base: str
    parts: tuple[str, ...]
    is_negated: bool
    is_for_folders: bool

    def matches(self, path: str, is_folder: bool) -> bool:
        if self.is_for_folders and not is_folder:
            return False
        names = path[len(self.base) + 1 :].split("/")
        if self.parts[0] == "**" and len(self.parts) == 2:
            return fnmatch.fnmatchcase(names[-1], self.parts[1])
        return _parts_match(names, self.parts)


def _by_hand(root: str) -> Iterator[str]:
    """What the ``.gitignore`` files in *root*, and in the project around it, say is ignored, folders as a whole.

    Repositories in it are passed over.
    """
    waiting = [(root, _rules_above(root))]
    while waiting:
        folder, rules = waiting.pop()
        rules = [*rules, *_rules(folder)]
        for entry in _entries(folder):
            if entry.name in _NOBODY_MISSES:
                continue
            is_folder = entry.is_dir(follow_symlinks=False)
            if _says_ignored(rules, entry.path, is_folder):
                yield entry.path[len(root) + 1 :]
            elif is_folder and not is_environment(entry.path) and not os.path.exists(f"{entry.path}/.git"):
                waiting.append((entry.path, rules))


def _says_ignored(rules: Sequence[_Rule], path: str, is_folder: bool) -> bool:
    # The last line that says something about a file counts.
    last = next((rule for rule in reversed(rules) if rule.matches(path, is_folder)), None)
    return last is not None and not last.is_negated


def _rules_above(root: str) -> list[_Rule]:
    """Those of the folders between the top of the project in which *root* lies and *root*."""
    above = [root]
    while above[-1] != "/":
        above.append(os.path.dirname(above[-1]))
    marks = (".git",), ("pyproject.toml", "setup.py")
    tops = (folder for names in marks for folder in above if any(os.path.exists(f"{folder}/{name}") for name in names))
    rules: list[_Rule] = []
    for folder in reversed(above[1 : above.index(next(tops, root)) + 1]):
        rules += _rules(folder)
        inner = above[above.index(folder) - 1]
        if _says_ignored(rules, inner, is_folder=True):
            # A tree of its own, as above.
            rules = []
    return rules


def _rules(folder: str) -> list[_Rule]:
    try:
        with open(f"{folder}/.gitignore", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip() for line in file]
    except OSError:
        return []
    return [_rule(folder, line) for line in lines if line.strip("/!") and not line.startswith("#")]


def _rule(folder: str, line: str) -> _Rule:
    is_negated = line.startswith("!")
    text = line[is_negated:].removeprefix("\\")
    pattern = text.rstrip("/")
    parts = pattern.lstrip("/").split("/")
    # Without a slash before its end, it is a name, at any depth.
    return _Rule(folder, tuple(parts if "/" in pattern else ["**", *parts]), is_negated, text.endswith("/"))


def _parts_match(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**":
        if len(parts) == 1:
            return bool(names)
        return any(_parts_match(names[start:], parts[1:]) for start in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _parts_match(names[1:], parts[1:])


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        # Whoever walks the tree says so.
        return []
