"""Source trees outside of an environment to which it links: they come along, as they are now, and the links lead there.

A tree lies in the environment at ``share/envship/projects/<name>``. Followed are the projects that are installed in
editable mode, whatever build backend did it, and ``.pth`` files that lead outside, whoever wrote them (``conda
develop``, a person). See `envship.sources.path_files` for the links, `envship.sources.source_tree` for the files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from dask.utils import format_bytes

from envship.canonical import SYSTEM_PREFIXES, Content, Own
from envship.sources import path_files, source_tree
from envship.sources.distributions import Distribution
from envship.sources.ignored import is_in, minimal
from envship.sources.tree import Found, Root, Trees
from envship.sources.version_control import without_version_control
from worker_bootstrap.manifest import Relocation
from worker_bootstrap.relocate import PLACEHOLDER

PLACE = "share/envship/projects"
LINKING = (".pth", ".egg-link")
"""How the names of files end that may link to a project, besides modules of one in editable mode."""
_DEVELOPED_SCRIPT = re.compile(r"^# EASY-INSTALL-DEV-SCRIPT: .*\n(?:.*\n){1,4}__file__ = '(/[^'\\]+)'$", re.MULTILINE)
"""What setuptools writes for a script of such a project, which runs it where it is."""
_LONGEST_SCRIPT_BYTES = 8192
_REBUILDING = "_editable_loader.py"
"""What meson-python writes: a module that builds the project anew whenever it is imported."""


class Tree(NamedTuple):
    """A folder (or file) outside of the environment, and the place where it will lie."""

    root: str
    place: str


@dataclass(frozen=True)
class Moved:
    """Text in which the paths of source trees are replaced by their places in the environment.

    *path_file* is the ``.pth`` file that the text is of, whose lines may be relative; otherwise empty.
    """

    trees: tuple[Tree, ...]
    own: Own
    path_file: str = ""

    @property
    def key(self) -> str:
        return f"moved {self.trees} {self.path_file} {self.own.key}"

    def __call__(self, data: bytes) -> Content:
        places = {prefix: PLACEHOLDER for prefix in self.own.prefixes if prefix not in SYSTEM_PREFIXES}
        places.update((tree.root, f"{PLACEHOLDER}/{tree.place}") for tree in self.trees)
        text = data.decode("utf-8", "surrogateescape")
        if self.path_file:
            roots = [tree.root for tree in self.trees]
            lines = path_files.lines_of(self.path_file, text)
            text = "".join(_plain_line(line, folder, roots) for line, folder in lines)
        # One pass, the longest first: a tree may lie in the environment's folder, or the environment in the tree.
        names = "|".join(re.escape(name) for name in sorted(places, key=len, reverse=True))
        moved = re.sub(rf"(?:{names})(?![\w-]|\.\w)", lambda match: places[match[0]], text)
        relocation = Relocation("text", PLACEHOLDER) if PLACEHOLDER in moved else None
        return Content(moved.encode("utf-8", "surrogateescape"), relocation)


class Project:
    """A project outside of the environment.

    Attributes
    ----------
    name
        Of the distribution, or of the ``.pth`` file.
    links
        Paths in the environment of the files, or symbolic links, that name its trees, and which.
    trees
        Where its parts lie, symbolic links resolved that are named themselves, and will lie.
    problem
        Why it cannot be followed; empty if it can.
    """

    def __init__(self, name: str, links: Mapping[str, Sequence[str]], root: str = "") -> None:
        self.name = name
        self.links = links
        folder = re.sub(r"[^\w.-]", "_", name).strip(".") or "path"
        spelled = minimal([path for paths in links.values() for path in paths])
        self._aliases = {path: os.path.realpath(path) for path in spelled if os.path.islink(path)}
        root = self._aliases.get(root, root)
        named = minimal([self._aliases.get(path, path) for path in spelled])
        everything = [path for path in named if path in {*SYSTEM_PREFIXES, os.path.expanduser("~")}]
        self.problem = f"{', '.join(links)}: {everything[0]} is too much to take along" if everything else ""
        inside = [path for path in named if root and (path == root or path.startswith(root + "/"))]
        self._parts: list[tuple[Tree, list[str]]] = []
        if inside:
            self._parts.append((Tree(root, f"{PLACE}/{folder}"), inside))
        for path in named:
            if path not in inside:
                number = len(self._parts)
                place = f"{PLACE}/{folder}-{number}" if number else f"{PLACE}/{folder}"
                self._parts.append((Tree(path, place), [path]))

    @property
    def trees(self) -> tuple[Tree, ...]:
        return tuple(tree for tree, _ in self._parts)

    def files(self, trees: Trees, prefixes: Sequence[str]) -> Iterator[tuple[str, Found, Tree]]:
        """The files by their path in the environment, which is at *prefixes*, and the tree that each lies in."""
        for alias in self._aliases:
            # It may lead elsewhere the next time.
            trees.walk(Root(alias))
        for tree, parts in self._parts:
            for relative, found in source_tree.files_below(tree.root, parts, trees, prefixes):
                yield (tree.place if relative == "." else f"{tree.place}/{relative}"), found, tree

    def has(self, path: str) -> bool:
        """Whether what lies at *path* on this machine is part of the project."""
        parts = [part for _, parts in self._parts for part in parts]
        return path_files.is_inside(path, [*parts, *map(os.path.realpath, parts)])

    def place_of(self, path: str) -> str:
        """Where in the environment *path*, a part of the project on this machine, will lie."""
        tree = next(tree for tree in self.trees if is_in(path, tree.root))
        return tree.place + path[len(tree.root) :]

    def moved(self, path: str, origin: str, own: Own) -> Moved:
        """How the link at *path*, which is the file *origin*, is treated."""
        aliases = (Tree(alias, self.place_of(real)) for alias, real in self._aliases.items())
        return Moved((*self.trees, *aliases), own, origin if path.endswith(".pth") else "")


def place_inside(distribution: Distribution, prefixes: Sequence[str]) -> str | None:
    """Where in the environment the tree of an editable *distribution* lies (pip puts checkouts at ``src/NAME``).

    With the repository that it is a folder of, if that lies in the environment, too. The first of *prefixes* is where
    the environment is; it may name itself by the others, one of which it may have come from, in an archive.
    """
    root = _root_of(distribution)
    prefix = next((prefix for prefix in prefixes if root.startswith(prefix + "/")), None)
    if prefix is None:
        return None
    top = folder = root[len(prefix) + 1 :]
    while folder:
        if os.path.exists(f"{prefixes[0]}/{folder}/.git"):
            top = folder
        folder = os.path.dirname(folder)
    return top


def without_leavings(
    files: dict[str, Found], distributions: Sequence[Distribution], prefixes: Sequence[str], trees: Trees
) -> dict[str, Found]:
    """*files* without what stays behind of source trees, wherever in the environment at the first of *prefixes*."""
    files = without_version_control(files, distributions, prefixes[0])
    for place in filter(None, (place_inside(each, prefixes) for each in distributions)):
        root = f"{prefixes[0]}/{place}"
        if not os.path.isdir(root):
            continue
        kept = {f"{place}/{path}" for path, _ in source_tree.files_below(root, [root], trees)}
        files = {path: found for path, found in files.items() if path in kept or not path.startswith(place + "/")}
    return files


def project_of(distribution: Distribution, files: Mapping[str, Found], prefixes: Sequence[str]) -> Project | None:
    """The project that an editable *distribution* links to; None if it lies in the environment anyway."""
    root = _root_of(distribution)
    if root and path_files.is_inside(root, prefixes):
        return None
    links: dict[str, list[str]] = {}
    problem = "in a way that cannot be followed"
    for path in distribution.files:
        if path not in files:
            continue
        if path.endswith(_REBUILDING):
            problem = "in a way that builds it again on every import"
            links.clear()
            break
        origin, node = files[path]
        linked = _linked(origin, root, prefixes) if stat.S_ISLNK(node.st_mode) else None
        named = linked if linked is not None else _named_in(origin, root, prefixes)
        if named or linked is not None:
            links[path] = named
    project = Project(distribution.name, links, root)
    if not links:
        project.problem = (
            f"{distribution.name} {distribution.version} is installed in editable mode from {distribution.editable}, "
            + problem
        )
    return project


def _linked(origin: str, root: str, prefixes: Sequence[str]) -> list[str] | None:
    """The folder that a symbolic link, of ``flit install --symlink``, leads to; none if to a module, which is a file.

    None in place of a list if it leads to nothing of the project in *root*.
    """
    real = os.path.realpath(origin)
    if path_files.is_inside(real, prefixes):
        return None
    if os.path.isdir(real):
        return [real]
    return [] if root and os.path.isfile(real) and is_in(real, os.path.realpath(root)) else None


def _named_in(origin: str, root: str, prefixes: Sequence[str]) -> list[str]:
    """What a file of a project in editable mode, which lies in *root*, names of it."""
    if not origin.endswith((".pth", ".py")):
        return []
    if origin.endswith(".pth"):
        return path_files.folders_outside(origin, prefixes)
    named = [name for name in path_files.paths_in_module(origin) if not path_files.is_inside(name, prefixes)]
    return [name for name in named if _is_part(name, root)]


def _root_of(distribution: Distribution) -> str:
    """The folder that an editable distribution was installed from; empty if there is none."""
    url = urlsplit(distribution.editable or "")
    return os.path.normpath(unquote(url.path)) if url.scheme == "file" and url.path else ""


def _is_part(path: str, root: str) -> bool:
    """Whether a path that a module names is part of the project: in its folder, or a module or package elsewhere."""
    if root and (path + "/").startswith(root + "/"):
        return True
    return path.endswith(".py") or os.path.exists(f"{path}/__init__.py")


def linked_by_path_files(
    site_path: str, files: Mapping[str, Found], known: Sequence[Distribution], prefixes: Sequence[str]
) -> list[Project]:
    """The projects to which ``.pth`` files in the site folder link, except for those of *known* editable ones."""
    followed = {path for distribution in known if distribution.editable is not None for path in distribution.files}
    found = []
    for path, (origin, _) in files.items():
        if path.endswith(".pth") and os.path.dirname(path) == site_path and path not in followed:
            folders = path_files.folders_outside(origin, prefixes)
            if folders:
                name = os.path.basename(path)[: -len(".pth")]
                links = {path: folders, **dict(_egg_links(site_path, files, folders))}
                found.append(Project(name, links))
    return found


def too_large(project: Project, sizes: Mapping[str, int], limit_bytes: int) -> str | None:
    """What to say of a project whose files, with their *sizes*, are more than *limit_bytes*."""
    total_bytes = sum(sizes.values())
    if total_bytes <= limit_bytes:
        return None
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    names = ", ".join(f"{path} ({format_bytes(sizes[path])})" for path in largest)
    size, limit = format_bytes(total_bytes), format_bytes(limit_bytes)
    return f"the project {project.name} holds {size}, more than {limit}; largest: {names}"


def _egg_links(site_path: str, files: Mapping[str, Found], folders: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """What ``setup.py develop`` writes besides its line in ``easy-install.pth``: where the project is, and scripts."""
    roots = []
    for path, (origin, _) in files.items():
        if path.endswith(".egg-link") and os.path.dirname(path) == site_path:
            lines = path_files.read(origin).splitlines()
            named = [line for line in lines if line in folders]
            if named:
                yield path, named
                # The second line leads from where the modules are to where setup.py is.
                roots.append(os.path.normpath(os.path.join(named[0], *lines[1:2])))
    for path, (origin, _) in files.items() if roots else ():
        if path.startswith("bin/") and os.path.isfile(origin) and os.path.getsize(origin) < _LONGEST_SCRIPT_BYTES:
            script = _DEVELOPED_SCRIPT.search(path_files.read(origin))
            if script and os.path.isfile(script[1]) and path_files.is_inside(script[1], roots):
                yield path, [script[1]]


def _plain_line(line: str, folder: str | None, roots: Sequence[str]) -> str:
    """A line of a ``.pth`` file, with the plain form of the folder that it adds if that lies in one of *roots*."""
    if folder is None or not any(folder == root or folder.startswith(root + "/") for root in roots):
        return line
    return line.replace(line.strip(), folder)
