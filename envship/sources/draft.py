"""A package before it is read: which files it will have, where their bytes lie, and how these become canonical.

A `Plan` is what a source has to say about a prefix; `envship.pack` turns it into chunks and a manifest.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Union

from envship.canonical import Treatment
from envship.sources.tree import Status
from worker_bootstrap.digest import Digest
from worker_bootstrap.manifest import Directory, HardLink, Link


class Draft(NamedTuple):
    """One package of a plan. *items* in any order, no path twice. The rest is as in `manifest.Package`.

    *is_whole* tells that its files depend on no other package, and no other on them: it has all that it recorded,
    nobody else recorded any of it, and nothing of it leads to a project.
    """

    name: str
    version: str
    build: str
    kind: str
    items: Collection[Item]
    is_whole: bool = False

    def in_order(self) -> Iterable[Item]:
        """The items in the order of their paths."""
        return (
            self.items if isinstance(self.items, SortedItems) else sorted(self.items, key=operator.attrgetter("path"))
        )


class FileItem(NamedTuple):
    """A file to be read from *origin* (``lstat`` or ``stat``: *node*) and treated.

    *is_searched* tells that modules are imported from there, though it is not the library (`search_path`).
    """

    path: str
    origin: str
    node: Status
    treatment: Treatment
    is_searched: bool = False


class CodeItem(NamedTuple):
    """Byte code to be made for the module at *origin*; left out where it does not compile or is relocated.

    *cached* is where byte code may lie already. Where an installer recorded the digests of both files, byte code with
    its recorded digest belongs to a source with its own, whatever the times say.
    """

    path: str
    origin: str
    node: Status
    cached: str
    module_path: str
    source_digest: Digest | None = None
    cached_digest: Digest | None = None


class MadeItem(NamedTuple):
    """A file whose bytes are known already."""

    path: str
    data: bytes


Item = Union[FileItem, CodeItem, MadeItem, Link, HardLink, Directory]


class SortedItems(Collection[Item]):
    """Items that come in the order of their paths."""


@dataclass(frozen=True)
class Plan:
    """Everything that a pack of *prefix* will do.

    *interpreter* is an executable of the environment's own Python; *prefixes* are all spellings of the paths
    under which its files may name their own place.
    """

    prefix: str
    prefixes: tuple[str, ...]
    interpreter: str
    platform: str
    python: str
    environ: Mapping[str, str]
    drafts: Sequence[Draft]
    problems: Sequence[str]
