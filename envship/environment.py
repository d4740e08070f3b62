"""An environment that is packed: in a store, with a manifest. What users hold in their hands.

`resolve` turns everything that a user may mean by "environment" into one. See `envship.pack` for how it is made and
`envship.bundle` for the file that it is saved as.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Union

from dask.utils import format_bytes

from envship.bundle import SUFFIX, bundle_at, read_bundle, write_bundle
from envship.difference import Difference, difference
from envship.errors import SourceNotFound
from envship.options import NO_OPTIONS, PackOptions
from worker_bootstrap.digest import Digest, EnvironmentId, is_digest
from worker_bootstrap.errors import EnvironmentMissing, EnvshipError
from worker_bootstrap.location import open_store
from worker_bootstrap.manifest import Manifest, Package
from worker_bootstrap.store import Store

if TYPE_CHECKING:
    from envship.packer import Report

StoreLike = Union[Store, str, os.PathLike[str], None]
"""A store, its folder, or None for the store of this machine."""

_ID_PREFIX = re.compile(r"[0-9a-f]{8,64}")


class Environment:
    """A packed environment.

    Parameters
    ----------
    manifest
        What it consists of.
    store
        Where its chunks are.

    Attributes
    ----------
    manifest, store
        As given.
    """

    def __init__(self, manifest: Manifest, store: Store) -> None:
        self.manifest = manifest
        self.store = store

    @classmethod
    def load(cls, path: str | os.PathLike[str], store: StoreLike = None) -> Environment:
        """Bring a bundle, at a path or a URL that ``fsspec`` opens, into *store* (None: the store of this machine).

        Every chunk is checked.

        Raises
        ------
        SourceNotFound
            If there is no such file.
        BundleInvalid
            If it is damaged, cut short, or no bundle.
        """
        store, where = store_of(store), bundle_at(path) or os.fspath(path)
        try:
            return cls(read_bundle(where, store), store)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise SourceNotFound(os.fspath(path), [where]) from error

    @classmethod
    def open(cls, environment_id: str, store: StoreLike = None) -> Environment:
        """The environment with this id, which *store* (None: the store of this machine) holds.

        Raises
        ------
        EnvironmentMissing
            If it does not.
        """
        store = store_of(store)
        if not is_digest(environment_id):
            raise EnvironmentMissing(environment_id, str(store.layout.root))
        return cls(store.read_manifest(EnvironmentId(environment_id)), store)

    @property
    def id(self) -> EnvironmentId:
        """SHA-256 of the canonical manifest."""
        return self.manifest.id

    @property
    def nbytes(self) -> int:
        """Uncompressed size of all files."""
        return self.manifest.size_bytes

    @property
    def packages(self) -> tuple[Package, ...]:
        """Its packages, sorted by name."""
        return self.manifest.packages

    @property
    def chunks(self) -> Mapping[Digest, int]:
        """Every chunk that a host needs: digest to uncompressed size in bytes."""
        return self.manifest.chunks

    @property
    def python(self) -> str:
        """Full version of its interpreter."""
        return self.manifest.python

    @property
    def platform(self) -> str:
        """Conda's name of its platform, e.g. ``linux-64``."""
        return self.manifest.platform

    @property
    def versions(self) -> dict[str, str | None]:
        """As `versions_of` its manifest."""
        return versions_of(self.manifest)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a bundle to *path*, all or nothing; return the path.

        Raises
        ------
        ChunkMissing
            If the store lost a chunk: pack again.
        ExportError
            If it cannot be written there: no room, no permission.
        """
        target = Path(os.path.expanduser(path))
        write_bundle(self.manifest, self.store, target)
        return target

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write an archive as conda-pack makes it (``.tar.gz``, ``.tar.zst``, ``.zip``…) to *path*; return the path.

        Once unpacked, ``bin/activate`` and ``bin/conda-unpack`` work. The same environment gives the same archive.

        Raises
        ------
        ExportError
            If the suffix is of no known kind, it cannot be written there (no room, no permission), or the environment
            does not fit into such an archive.
        ChunkMissing
            If the store lost a chunk: pack again.
        """
        from envship.exporting import export  # conda-pack takes a while to import.

        target = Path(os.path.expanduser(path))
        export(self.manifest, self.store, target)
        return target

    def diff(self, other: Environment) -> Difference:
        """What *other* has that this one has not, and the other way round; what a cluster with this one lacks of it.

        Raises
        ------
        ChunkMissing
            If a store lost a listing: pack again.
        """
        return difference(self, other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Environment) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        size, count = format_bytes(self.nbytes), len(self._named)
        known = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return f"<Environment {self.id[:16]}: {known}; {count} packages, {size}, {self.platform}>"

    def _repr_html_(self) -> str:
        largest = sorted(self.packages, key=lambda package: package.size_bytes, reverse=True)[:10]
        rows = "".join(
            f"<tr><td>{html.escape(package.name or '(files of no package)')}</td>"
            f"<td>{html.escape(package.version)}</td><td>{package.kind}</td>"
            f"<td style='text-align:right'>{format_bytes(package.size_bytes)}</td></tr>"
            for package in largest
        )
        return (
            f"<b>Environment</b> <code title='{self.id}'>{self.id[:16]}</code>: Python {html.escape(self.python)}, "
            f"{len(self._named)} packages, {format_bytes(self.nbytes)}, {html.escape(self.platform)}"
            "<details><summary>Largest packages</summary><table><tr><th>package</th><th>version</th><th>kind</th>"
            f"<th>size</th></tr>{rows}</table></details>"
        )

    @property
    def _named(self) -> list[Package]:
        return [package for package in self.packages if package.kind != "files"]


def versions_of(manifest: Manifest) -> dict[str, str | None]:
    """Versions of what has to agree across a Dask cluster; None for what is not installed."""
    return {
        "python": manifest.python,
        "dask": manifest.version_of("dask") or manifest.version_of("dask-core"),
        "distributed": manifest.version_of("distributed"),
    }


def store_of(store: StoreLike) -> Store:
    """What *store* means; raises as `worker_bootstrap.location.open_store`."""
    return store if isinstance(store, Store) else open_store(store)


def resolve(
    source: Environment | str | os.PathLike[str] | None,
    *,
    store: StoreLike = None,
    options: PackOptions = NO_OPTIONS,
    report: Report | None = None,
) -> Environment:
    """The environment that *source* means, packed or loaded where it is not in the store yet.

    Parameters
    ----------
    source
        An `Environment`; None for the one that this process runs in; a bundle (``*.envship``); an environment id that
        the store holds, or at least eight digits that only one id begins with; the name of a conda environment; the
        path of a prefix; an archive that conda-pack made.
    store, options, report
        As for `envship.pack.pack`.

    Raises
    ------
    SourceNotFound
        If it is none of these.
    EnvironmentMissing
        If the store does not hold the id.
    PackError, BundleInvalid
        As `envship.pack.pack` and `Environment.load`.
    """
    if isinstance(source, Environment):
        return source
    store = store_of(store)
    if source is not None:
        text = os.fspath(source)
        if text.endswith(SUFFIX) and not Path(text).is_dir():
            return Environment.load(text, store)
        if is_digest(text):
            return Environment.open(text, store)
        if _ID_PREFIX.fullmatch(text):
            matches = [environment_id for environment_id in store.environments() if environment_id.startswith(text)]
            if len(matches) == 1:
                return Environment.open(matches[0], store)
            if matches:
                raise SourceNotFound(text, [f"{store.layout.root}, where {len(matches)} ids begin with it"])
    from envship.pack import pack  # Packing makes environments, so it imports this module.

    return pack(source, store=store, options=options, report=report)


def guess(source: Environment | str | os.PathLike[str] | None, options: PackOptions) -> EnvironmentId | None:
    """The environment that `resolve` will find *source* to mean if nothing has changed; None if nobody can know."""
    from envship.pack import last_packed

    if isinstance(source, Environment):
        return source.id
    try:
        if source is not None and is_digest(text := os.fspath(source)):
            return EnvironmentId(text)
        return last_packed(source, None, options)
    except (EnvshipError, OSError, TypeError, ValueError):  # `resolve` says what is wrong
        return None
