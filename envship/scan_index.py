"""What the last pack of a prefix saw, so that packing it unchanged is little more than a walk.

An index is a hint, never the truth: whatever is damaged, was written by another version, or leaves a doubt (files that
changed at about the time of the walk, chunks that the store lost) means reading again. One JSON file for each prefix in
``<store>/index``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from envship._version import __version__
from envship.options import PackOptions
from envship.package_writer import Packed
from envship.sources.draft import CodeItem, Draft, FileItem, MadeItem, Plan
from envship.sources.tree import Root, Status, Trees, fingerprint, is_settled, mark
from worker_bootstrap.digest import Digest, EnvironmentId, is_digest
from worker_bootstrap.manifest import Chunk, Package
from worker_bootstrap.store import Store, publish


def index_folder(store: Store) -> Path:
    """Where indexes and kept byte code lie."""
    return store.layout.root / "index"


class Whole(NamedTuple):
    """A package whose files depend on no other package, all of them below one prefix.

    *fingerprint* is equal as long as the files at *paths* are what they were.
    """

    package: Package
    paths: tuple[str, ...]
    fingerprint: str


class Known(NamedTuple):
    """What became of the packages of a prefix.

    *packages* is by `signature`; *whole* holds if nothing of *context*, what all packages depend on, has changed.
    """

    packages: Mapping[str, Packed] = MappingProxyType({})
    whole: Sequence[Whole] = ()
    context: str = ""


@dataclass
class ScanIndex:
    """The index of one prefix: two files, of which the first is enough if nothing changed."""

    path: Path
    tmp: Path
    roots: tuple[Root, ...] = ()
    fingerprint: str = ""
    environment_id: EnvironmentId | None = None

    @classmethod
    def load(cls, store: Store, prefix: str, options: PackOptions) -> ScanIndex:
        """The index of *prefix*, packed with *options*, in *store*; an empty one if there is none that can be used."""
        key = hashlib.sha256(f"{prefix}\0{options.key}".encode("utf-8", "surrogateescape")).hexdigest()
        index = cls(index_folder(store) / f"{key}.json", store.layout.tmp)
        try:
            raw = json.loads(index.path.read_bytes())
            if raw["rules"] != rules():
                return index
            index.roots = tuple(map(_root, raw["roots"]))
            if is_digest(raw["environment"]):
                index.fingerprint, index.environment_id = raw["fingerprint"], EnvironmentId(raw["environment"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(index.path, index.tmp)
        return index

    @classmethod
    def none(cls, store: Store) -> ScanIndex:
        """An index that knows nothing."""
        return cls(index_folder(store) / "none.json", store.layout.tmp)

    @functools.cached_property
    def known(self) -> Known:
        """What became of the packages; nothing if that cannot be read."""
        try:
            raw = json.loads(self._details.read_bytes())
            if raw["rules"] != rules():
                return Known()
            packages = {key: _packed(row) for key, row in raw["packages"].items()}
            return Known(packages, [_whole(row) for row in raw["whole"]], raw["context"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return Known()

    def unchanged(self, trees: Trees) -> EnvironmentId | None:
        """The environment that was packed, if *trees* finds every file that it came from as it was."""
        if self.environment_id is None:
            return None
        try:
            for root in self.roots:
                trees.walk(root)
        except OSError:
            return None
        return self.environment_id if trees.fingerprint() == self.fingerprint else None

    def save(self, trees: Trees, environment_id: EnvironmentId, known: Known) -> None:
        """Keep what *trees* saw, and what became of the packages; the environment itself only if that is certain."""
        details = {"rules": rules(), **known._asdict(), "packages": dict(known.packages)}
        publish(self._details, json.dumps(details).encode(), self.tmp, sync=False)
        certain = trees.is_settled
        raw = {
            "rules": rules(),
            "roots": [list(root) for root in trees.roots],
            "fingerprint": trees.fingerprint() if certain else "",
            "environment": environment_id if certain else None,
        }
        publish(self.path, json.dumps(raw).encode(), self.tmp, sync=False)

    @property
    def _details(self) -> Path:
        return self.path.with_suffix(".packages.json")


def context(plan: Plan) -> str:
    """What every package of *plan* depends on besides its own files."""
    return repr((plan.python, plan.platform, plan.prefixes, plan.interpreter))


def fingerprint_of(paths: Collection[str], nodes: Mapping[str, Status]) -> str | None:
    """The fingerprint of those of *nodes* that lie at *paths*; None if one is missing."""
    try:
        return fingerprint(paths, [nodes[path] for path in paths]).hex()
    except KeyError:
        return None


def signature(draft: Draft, plan: Plan, started_ns: int) -> str | None:
    """A text that changes when the package could; None while one of its files may change without showing it."""
    state = hashlib.sha256(repr((draft[:4], context(plan))).encode("utf-8", "replace"))
    for item in draft.items:
        line: Any = item
        if isinstance(item, (FileItem, CodeItem)):
            if not is_settled(item.node, started_ns):
                return None
            rule = item.treatment.key if isinstance(item, FileItem) else (item.source_digest, item.cached_digest)
            line = (mark(item.path, item.node), item.origin, rule)
        elif isinstance(item, MadeItem):
            line = (item.path, hashlib.sha256(item.data).hexdigest())
        state.update(repr(line).encode("utf-8", "surrogatepass"))
    return state.hexdigest()


@functools.lru_cache(maxsize=1)
def rules() -> str:
    """A digest of the code that packs: an index made by other code is not used."""
    state = hashlib.sha256(__version__.encode())
    for path in _sources(Path(__file__).parent):
        state.update(path.read_bytes())
    return state.hexdigest()


def _sources(folder: Path) -> Iterable[Path]:
    return sorted((*folder.glob("*.py"), *(folder / "sources").glob("*.py")))


def _packed(row: Any) -> Packed:
    listing, chunks = row
    return Packed(_chunk(listing), tuple(_chunk(chunk) for chunk in chunks))


def _root(row: Sequence[Any]) -> Root:
    path, *lists, follow = row
    paths, names, suffixes, marks = map(tuple, lists)
    return Root(path, paths, names, suffixes, marks, follow)


def _whole(row: Any) -> Whole:
    (name, version, build, kind, listing, chunks), paths, fingerprint = row
    package = Package(str(name), str(version), str(build), str(kind), *_packed((listing, chunks)))
    return Whole(package, tuple(paths), str(fingerprint))


def _chunk(row: Any) -> Chunk:
    digest, size_bytes = row
    if not is_digest(digest) or type(size_bytes) is not int:
        raise ValueError(row)
    return Chunk(Digest(digest), size_bytes)
