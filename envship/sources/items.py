"""From a file on disk to an item of a draft: links made relative, byte code put beside its module.

Shared by all sources; see `envship.sources.draft` for what the items are.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import stat
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence

from envship import elf
from envship.canonical import Own, Recorded, Treatment
from envship.errors import SourceProblems
from envship.options import NO_OPTIONS, PackOptions
from envship.sources import search_path, source_tree
from envship.sources.draft import CodeItem, FileItem, Item
from envship.sources.faults import SHOWN, Fault, report
from envship.sources.projects import PLACE
from envship.sources.symlinks import leads_back, target_inside
from envship.sources.tree import Found, Root, Status, Trees
from envship.sources.unpacked import Unpacked
from envship.sources.version_control import VERSION_CONTROL
from worker_bootstrap.manifest import Directory, HardLink, Link

logger = logging.getLogger("envship.sources")

_SPECIAL = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
_GO_ON = "Mend the packages, or pack them as they are: PackOptions(ignore_missing=True), --ignore-missing."
NAME_LIMIT_BYTES = 255
"""No file's name is longer."""
_MAKE_READABLE = "Make these folders readable, or remove them."
_REMOVE_SPECIAL = "Remove sockets, FIFOs and devices, or leave them out (--exclude)."
_COPY_LINKS = (
    "Replace links that lead outside, leave them out (--exclude), or copy what they point to: "
    "PackOptions(copy_outside_links=True), --copy-outside-links."
)


class Collector:
    """Makes items of one prefix, and keeps what is wrong with it.

    Parameters
    ----------
    prefixes
        All spellings of the absolute paths under which the files may name their own place.
    trees
        The walks of this pack.
    options
        What the user said.
    unpacked
        What conda-pack did to the prefix, if it did.
    is_archive
        Whether the prefix comes out of an archive, which may name whatever it likes on this machine.
    inside
        Folders whose content goes along as part of the environment; by default, that of *prefixes*. The interpreter of
        a venv comes along without all else that lies below its prefix, which may be ``/usr``.

    Attributes
    ----------
    problems
        One line for everything that cannot be packed.
    remedies
        What can be done about it.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        trees: Trees,
        options: PackOptions = NO_OPTIONS,
        unpacked: Unpacked | None = None,
        is_archive: bool = False,
        inside: Sequence[str] | None = None,
    ) -> None:
        self.trees = trees
        self.options = options
        self.unpacked = unpacked
        self.is_archive = is_archive
        self.prefixes = tuple(dict.fromkeys(prefixes))
        self.inside = self.prefixes if inside is None else tuple(dict.fromkeys(inside))
        self.problems: list[str] = []
        self.remedies: dict[str, None] = {}

    def own(self, path: str) -> Own:
        """The treatment of a file of which no installer recorded how it names its prefix."""
        return Own(self._spellings, path)

    @functools.cached_property
    def _spellings(self) -> tuple[str, ...]:
        """The prefixes, and how JSON (Jupyter's ``kernel.json``) and URLs have those that are not all plain letters."""
        in_json = [json.dumps(prefix)[1:-1] for prefix in self.prefixes]
        in_urls = [urllib.parse.quote(os.fsencode(prefix)) for prefix in self.prefixes]
        return tuple(dict.fromkeys((*self.prefixes, *in_json, *in_urls)))

    def search(self, folders: Iterable[str]) -> None:
        """From now on, modules in *folders* of the environment are taken for ones that are imported."""
        self._searched.update(folders)

    def _is_searched(self, path: str) -> bool:
        return path.endswith(".py") and search_path.is_searched(path, self._searched)

    @functools.cached_property
    def _searched(self) -> set[str]:
        return set(search_path.named_by_path_files(self.trees, self.prefixes))

    def note(self, problem: str, remedy: str, path: str = "") -> None:
        """Keep *problem*, which there is not where *path* stays away anyway."""
        if not path or self.options.keeps(path):
            self.problems.append(problem)
            self.remedies[remedy] = None

    def settle(self, prefix: str, faults: Sequence[Fault]) -> list[str]:
        """End the collection; returns what the user chose to ignore of *faults*, one line for each package.

        Raises
        ------
        SourceProblems
            If anything is wrong; lists all of it.
        """
        if self.trees.unreadable:
            self.problems += sorted(self.trees.unreadable)
            self.remedies[_MAKE_READABLE] = None
        kept = [fault for fault in faults if self.options.keeps(fault.path)]
        lines = report(kept, SHOWN)
        shown = list(self.problems)
        if lines and not self.options.ignore_missing:
            shown += lines
            self.problems += report(kept)
            self.remedies[_GO_ON] = None
        if self.problems:
            raise SourceProblems(prefix, self.problems, " ".join(self.remedies), shown)
        for line in lines:
            logger.warning("packed all the same: %s", line)
        return lines

    def item(self, path: str, origin: str, node: Status, treatment: Treatment | None = None) -> Iterator[Item]:
        """The item of the file, link or empty folder at *origin*; none, and a problem, if there can be none.

        Several, where what a link points to is copied.
        """
        if stat.S_ISLNK(node.st_mode):
            yield from self._link(path, origin, ())
        else:
            yield from self._entry(path, origin, node, treatment)

    def copied(self, path: str, origin: str, chain: tuple[str, ...] = (), *, is_source: bool = False) -> Iterator[Item]:
        """The items of what the link *origin* points to, as if it lay at *path*. *chain* are the folders on the way.

        If it *is_source*, part of a project, then without what source trees leave behind.
        """
        real = os.path.realpath(origin)
        if not os.path.exists(real):
            self.note(f"{path} is a symbolic link to {os.readlink(origin)}, where nothing is", _COPY_LINKS, path)
            return
        if os.path.isdir(real) and leads_back(real, chain):
            self.note(f"{path} is a symbolic link to {real}, which holds the link itself", _COPY_LINKS, path)
            return
        for relative, (inner, node) in self._below(real, is_source):
            place = f"{path}/{relative}" if relative else path
            if stat.S_ISLNK(node.st_mode):
                yield from self._link(place, inner, (*chain, real), stays_in=(path, real), is_source=is_source)
            else:
                yield from self._entry(place, inner, node, None)

    def _below(self, real: str, is_source: bool) -> Iterator[tuple[str, Found]]:
        """What lies below the folder *real*, by relative path, or the file itself."""
        if is_source and os.path.isdir(real):
            yield from source_tree.files_below(real, [real], self.trees, self.prefixes)
            return
        for relative, node in self.trees.walk(Root(real, (), VERSION_CONTROL)).items():
            yield relative, Found(f"{real}/{relative}" if relative else real, node)

    def _entry(self, path: str, origin: str, node: Status, treatment: Treatment | None) -> Iterator[Item]:
        if stat.S_ISREG(node.st_mode):
            treatment = treatment or self.own(path)
            if self.unpacked is not None:
                treatment = self.unpacked.treatment(path, treatment)
            yield FileItem(path, origin, node, treatment, self._is_searched(path))
        elif stat.S_ISDIR(node.st_mode):
            yield Directory(path)
        else:
            kind = _SPECIAL.get(stat.S_IFMT(node.st_mode), "neither a file nor a link")
            self.note(f"{path} is {kind}", _REMOVE_SPECIAL, path)

    def _link(
        self,
        path: str,
        origin: str,
        chain: tuple[str, ...],
        *,
        stays_in: tuple[str, str] | None = None,
        is_source: bool = False,
    ) -> Iterator[Item]:
        if stays_in is None:
            target = target_inside(path, origin, self.prefixes)
        else:
            # Within what is copied, a link is kept that leads to another part of it.
            place, root = stays_in
            target = target_inside(path[len(place) + 1 :], origin, [root])
        if target is not None:
            yield Link(path, target)
        else:
            yield from self.outside_link(path, origin, chain, is_source=is_source)

    def outside_link(
        self, path: str, origin: str, chain: tuple[str, ...] = (), *, is_source: bool = False
    ) -> Iterator[Item]:
        """The items of a link that leads outside: what it points to, if the user wants that; else a problem."""
        if is_source and source_tree.stays_behind(os.path.realpath(origin)):
            return
        if self.options.copy_outside_links:
            yield from self.copied(path, origin, chain, is_source=is_source)
        else:
            outside = f"{path} is a symbolic link to {os.readlink(origin)}, outside of the environment"
            self.note(outside, _COPY_LINKS, path)


def with_byte_code(items: Iterable[Item], library: str, cache_tag: str) -> Iterator[Item]:
    """*items* and the byte code of the modules among them, in *library* (``lib/python3.11``), projects, and elsewhere.

    Elsewhere is where modules are imported from all the same: see `envship.sources.search_path`.

    Modules that name the prefix get none: their text, and with it their byte code, differs from prefix to prefix.
    """
    for item in items:
        yield item
        if not isinstance(item, FileItem) or not item.path.endswith(".py"):
            continue
        if not (item.is_searched or item.path.startswith((library + "/", PLACE + "/"))):
            continue
        treatment = item.treatment
        if not isinstance(treatment, (Own, Recorded)) or getattr(treatment, "relocation", None) is not None:
            continue
        path = _cached(item.path, cache_tag)
        if len(os.path.basename(path).encode("utf-8", "surrogateescape")) > NAME_LIMIT_BYTES:
            continue
        yield CodeItem(
            path=path,
            origin=item.origin,
            node=item.node,
            cached=_cached(item.origin, cache_tag),
            module_path=item.path,
            source_digest=treatment.digest if isinstance(treatment, Recorded) else None,
        )


def _cached(module: str, cache_tag: str) -> str:
    """Where the byte code of *module* lies."""
    folder, name = os.path.split(module)
    return f"{folder}/__pycache__/{os.path.splitext(name)[0]}.{cache_tag}.pyc"


def with_hard_links(items: Iterable[Item]) -> list[Item]:
    """*items*, sorted, in which other names of one file are links to the first of them.

    For files of no package only: whether the files of a package share an inode depends on how it was installed (from
    which cache, by link or copy), which must not show in the environment's identity.
    """
    first: dict[tuple[int, int], FileItem] = {}
    found: list[Item] = []
    for item in sorted(items, key=lambda item: item.path):
        if isinstance(item, FileItem) and item.node.st_nlink > 1:
            target = first.setdefault((item.node.st_dev, item.node.st_ino), item)
            if target is not item and _reads_alike(target, item):
                found.append(HardLink(item.path, target.path))
                continue
        found.append(item)
    return found


def _reads_alike(one: FileItem, other: FileItem) -> bool:
    """Whether the content of a file is the same at both paths: scripts and ELF files may differ with the folder."""
    if type(one.treatment) is not type(other.treatment):
        return False
    if os.path.dirname(one.path) == os.path.dirname(other.path):
        return True
    if one.path.startswith("bin/") or other.path.startswith("bin/"):
        return False
    try:
        with open(one.origin, "rb") as file:
            return not elf.is_elf(file.read(8))
    except OSError:
        return False
