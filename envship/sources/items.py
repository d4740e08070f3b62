"""From a file on disk to an item of a draft: links made relative, byte code put beside its module.

Shared by all sources; see `envship.sources.draft` for what the items are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence

from envship.canonical import SYSTEM_PREFIXES, Own, Recorded, Treatment
from envship.options import NO_OPTIONS, PackOptions
from envship.sources.distributions import Distribution, outside_paths
from envship.sources.draft import CodeItem, FileItem, Item
from envship.sources.projects import PLACE
from envship.sources.tree import Found, Trees
from envship.sources.unpacked import Unpacked
from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.manifest import Directory, Link
from worker_bootstrap.paths import check_link


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

    Attributes
    ----------
    problems
        One line for everything that cannot be packed.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        trees: Trees,
        options: PackOptions = NO_OPTIONS,
        unpacked: Unpacked | None = None,
    ) -> None:
        self.trees = trees
        self.options = options
        self.unpacked = unpacked
        self.prefixes = tuple(dict.fromkeys(prefixes))
        self.problems: list[str] = []

    def own(self, path: str) -> Own:
        """The treatment of a file of which no installer recorded how it names its prefix."""
        return Own(self.prefixes, path)

    def check_path_files(self, site_path: str, files: Mapping[str, Found], known: Sequence[Distribution]) -> None:
        """Note the ``.pth`` files in the site folder that lead out of the environment, except for *known* projects."""
        if self.options.ignore_editable:
            return
        followed = {path for distribution in known if distribution.editable is not None for path in distribution.files}
        for path, found in files.items():
            if path.endswith(".pth") and os.path.dirname(path) == site_path and path not in followed:
                for folder in outside_paths(found.origin, self.prefixes):
                    self.problems.append(f"{path} adds {folder} to the module path, outside of the environment")

    def item(self, path: str, origin: str, node: os.stat_result, treatment: Treatment | None = None) -> Iterator[Item]:
        """The item of the file, link or empty folder at *origin*; none, and a problem, if there can be none."""
        if stat.S_ISREG(node.st_mode):
            treatment = treatment or self.own(path)
            if self.unpacked is not None:
                treatment = self.unpacked.treatment(path, treatment)
            yield FileItem(path, origin, node, treatment)
        elif stat.S_ISDIR(node.st_mode):
            yield Directory(path)
        elif stat.S_ISLNK(node.st_mode):
            yield from self._link(path, os.readlink(origin))
        else:
            self.problems.append(f"{path} is neither a file nor a link")

    def _link(self, path: str, target: str) -> Iterator[Link]:
        inside = target
        if target.startswith("/"):
            for prefix in self.prefixes:
                if prefix not in SYSTEM_PREFIXES and target.startswith(prefix + "/"):
                    inside = os.path.relpath(target[len(prefix) + 1 :], os.path.dirname(path) or ".")
                    break
        try:
            yield Link(path, check_link(path, inside))
        except ManifestInvalid:
            self.problems.append(f"{path} is a symbolic link to {target}, outside of the environment")


def with_byte_code(items: Iterable[Item], library: str, cache_tag: str) -> Iterator[Item]:
    """*items* and the byte code of the modules among them, in *library* (``lib/python3.11``) and in projects.

    Modules that name the prefix get none: their text, and with it their byte code, differs from prefix to prefix.
    """
    for item in items:
        yield item
        if not isinstance(item, FileItem) or not item.path.endswith(".py"):
            continue
        if not item.path.startswith((library + "/", PLACE + "/")):
            continue
        treatment = item.treatment
        if not isinstance(treatment, (Own, Recorded)) or getattr(treatment, "relocation", None) is not None:
            continue
        folder, name = os.path.split(item.path)
        cached = f"__pycache__/{name[:-3]}.{cache_tag}.pyc"
        yield CodeItem(
            path=f"{folder}/{cached}",
            origin=item.origin,
            node=item.node,
            cached=os.path.join(os.path.dirname(item.origin), cached),
            module_path=item.path,
            source_digest=treatment.digest if isinstance(treatment, Recorded) else None,
        )
