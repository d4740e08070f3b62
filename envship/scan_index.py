"""What the last pack of a prefix saw, so that packing it unchanged is little more than a walk.

An index is a hint, never the truth: whatever is damaged, was written by another version, or leaves a doubt (files that
changed at about the time of the walk, chunks that the store lost) means reading again. One JSON file for each prefix in
``<store>/index``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envship._version import __version__
from envship.options import PackOptions
from envship.sources.draft import CodeItem, Draft, FileItem, MadeItem, Plan
from envship.sources.tree import Root, Trees, is_settled, mark
from worker_bootstrap.digest import Digest, EnvironmentId, is_digest
from worker_bootstrap.manifest import Chunk
from worker_bootstrap.store import Store, publish

Packed = tuple[Chunk, tuple[Chunk, ...]]
"""The listing of a package, and its content."""


def index_folder(store: Store) -> Path:
    """Where indexes and kept byte code lie."""
    return store.layout.root / "index"


@dataclass
class ScanIndex:
    """The index of one prefix.

    *packages* maps the `signature` of a draft to what became of it.
    """

    path: Path
    tmp: Path
    roots: tuple[Root, ...] = ()
    fingerprint: str = ""
    environment_id: EnvironmentId | None = None
    packages: Mapping[str, Packed] = field(default_factory=dict)

    @classmethod
    def load(cls, store: Store, prefix: str, options: PackOptions) -> ScanIndex:
        """The index of *prefix*, packed with *options*, in *store*; an empty one if there is none that can be used."""
        key = hashlib.sha256(f"{prefix}\0{options.key}".encode("utf-8", "surrogateescape")).hexdigest()
        index = cls(index_folder(store) / f"{key}.json", store.layout.tmp)
        try:
            raw = json.loads(index.path.read_bytes())
            if raw["rules"] != rules():
                return index
            index.roots = tuple(Root(path, tuple(paths), tuple(names)) for path, paths, names in raw["roots"])
            index.packages = {key: _packed(row) for key, row in raw["packages"].items()}
            if is_digest(raw["environment"]):
                index.fingerprint, index.environment_id = raw["fingerprint"], EnvironmentId(raw["environment"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(index.path, index.tmp)
        return index

    @classmethod
    def none(cls, store: Store) -> ScanIndex:
        """An index that knows nothing."""
        return cls(index_folder(store) / "none.json", store.layout.tmp)

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

    def save(self, trees: Trees, environment_id: EnvironmentId, packages: Mapping[str, Packed]) -> None:
        """Keep what *trees* saw; the environment itself only if that is certain."""
        certain = trees.is_settled
        raw = {
            "rules": rules(),
            "roots": [list(root) for root in trees.roots],
            "fingerprint": trees.fingerprint() if certain else "",
            "environment": environment_id if certain else None,
            "packages": packages,
        }
        publish(self.path, json.dumps(raw).encode(), self.tmp, sync=False)


def signature(draft: Draft, plan: Plan, started_ns: int) -> str | None:
    """A text that changes when the package could; None while one of its files may change without showing it."""
    state = hashlib.sha256(repr((draft[:4], plan.python, plan.prefixes, plan.interpreter)).encode("utf-8", "replace"))
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
    return _chunk(listing), tuple(_chunk(chunk) for chunk in chunks)


def _chunk(row: Any) -> Chunk:
    digest, size_bytes = row
    if not is_digest(digest) or type(size_bytes) is not int:
        raise ValueError(row)
    return Chunk(Digest(digest), size_bytes)
