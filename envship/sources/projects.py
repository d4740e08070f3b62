"""Projects installed in editable mode: their source trees come along, as they are now, and the links lead to them.

A tree lies in the environment at ``share/envship/projects/<name>``. Understood are the two ways in which build backends
link to a tree: lines of a ``.pth`` file, and the mapping of setuptools' finder module. Source: PEP 660.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from envship.canonical import PLACEHOLDER, Content, Own
from envship.sources.distributions import Distribution
from envship.sources.tree import Found, Root, Trees
from worker_bootstrap.manifest import Relocation

PLACE = "share/envship/projects"

_SKIPPED = (
    *(".git", ".hg", ".svn", ".venv", "venv", "node_modules", ".tox", ".nox", ".eggs", ".ipynb_checkpoints"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".idea", ".vscode"),
)
_MAPPING = re.compile(r"^MAPPING\b[^=]*=\s*(\{.*\})\s*$", re.MULTILINE)
_GIT_TIMEOUT_S = 30


@dataclass(frozen=True)
class Moved:
    """Text in which the path of a project is replaced by its place in the environment."""

    root: str
    place: str
    own: Own

    @property
    def key(self) -> str:
        return f"moved {self.root} {self.place} {self.own.key}"

    def __call__(self, data: bytes) -> Content:
        # The tree may hold the environment, or lie in it: what names the tree is replaced first.
        moved = data.replace(os.fsencode(self.root), os.fsencode(f"{PLACEHOLDER}/{self.place}"))
        return self.own(data) if moved == data else Content(moved, Relocation("text", PLACEHOLDER))


class Project:
    """The source tree that an editable distribution links to.

    Attributes
    ----------
    root
        Absolute path of the tree, without a trailing slash.
    place
        Where it will lie in the environment.
    links
        Paths in the environment of the files that name the tree.
    """

    def __init__(self, distribution: Distribution, files: Mapping[str, Found]) -> None:
        url = urlsplit(distribution.editable or "")
        self.root = os.path.normpath(unquote(url.path)) if url.scheme == "file" and url.path else ""
        self.place = f"{PLACE}/{distribution.name}"
        self.links: list[str] = []
        self._parts: list[str] = []
        for path in distribution.files:
            named = _named_paths(files[path].origin) if path in files and path.endswith((".pth", ".py")) else []
            inside = [name for name in named if name == self.root or name.startswith(self.root + "/")]
            if inside:
                self.links.append(path)
                self._parts += inside

    @property
    def is_understood(self) -> bool:
        """Whether the links were found, and all lead into the tree."""
        return bool(self._parts)

    def files(self, trees: Trees) -> Iterator[tuple[str, Found]]:
        """The files of the tree by their path in the environment: what git does not ignore, and compiled modules."""
        root = Root(self.root, tuple(_environments(self.root)), _SKIPPED)
        ignored = _ignored(self.root)
        for relative, node in trees.walk(root).items():
            origin = f"{self.root}/{relative}"
            wanted = any(origin == part or origin.startswith(part + "/") for part in self._parts)
            if wanted and (relative.endswith(".so") or not _is_in(relative, ignored)):
                yield f"{self.place}/{relative}", Found(origin, node)


def _named_paths(file: str) -> list[str]:
    """Absolute paths that a ``.pth`` file or a finder module of setuptools names."""
    text = Path(file).read_text(encoding="utf-8", errors="surrogateescape")
    if file.endswith(".pth"):
        return [os.path.normpath(line) for line in text.splitlines() if line.startswith("/")]
    found = _MAPPING.search(text) if "__editable__" in os.path.basename(file) else None
    try:
        mapping = ast.literal_eval(found[1]) if found else {}
    except (ValueError, SyntaxError):
        return []
    # A module's entry lacks the suffix in older versions of setuptools.
    names = [str(name) for name in mapping.values()]
    return [name if os.path.exists(name) else f"{name}.py" for name in names]


def _environments(root: str) -> Iterator[str]:
    """Environments that lie in the tree."""
    with os.scandir(root) as entries:
        for entry in entries:
            marks = ("pyvenv.cfg", "conda-meta")
            if entry.is_dir(follow_symlinks=False) and any(os.path.exists(f"{entry.path}/{mark}") for mark in marks):
                yield entry.name


def _ignored(root: str) -> frozenset[str]:
    """Files and folders that git ignores, relative to *root*; none where there is no git."""
    command = ["git", "-C", root, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(os.fsdecode(name).rstrip("/") for name in done.stdout.split(b"\0") if name)


def _is_in(relative: str, folders: Collection[str]) -> bool:
    while relative:
        if relative in folders:
            return True
        relative = os.path.dirname(relative)
    return False
