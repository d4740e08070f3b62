"""Two environments, and what is different between them: packages, files, bytes, and what would have to travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from worker_bootstrap import codec
from worker_bootstrap.manifest import Entry, File, Listing, Package
from worker_bootstrap.manifest_delta import delta_of

if TYPE_CHECKING:
    from envship.environment import Environment

Kind = Literal["added", "removed", "changed"]


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file, link or empty folder that is not the same in both. Sizes in bytes, 0 where it is not or no file."""

    path: str
    kind: Kind
    old_bytes: int
    new_bytes: int


@dataclass(frozen=True, slots=True)
class PackageChange:
    """A package that is not the same in both.

    Attributes
    ----------
    name, package_kind
        Its name (empty: files of no package), and where it is from (``conda``, ``pypi``…).
    kind
        Whether it is in the new environment only, in the old one only, or in both and not the same.
    old_version, new_version
        With conda's build; empty where there is none.
    files
        Everything in it that is not the same, sorted by path.
    ship_bytes
        Compressed bytes that it adds to what has to travel.
    """

    name: str
    package_kind: str
    kind: Kind
    old_version: str
    new_version: str
    files: tuple[FileChange, ...]
    ship_bytes: int

    @property
    def new_bytes(self) -> int:
        """Uncompressed size of what is new in it."""
        return sum(file.new_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Difference:
    """From the environment *old_id* to *new_id*.

    Attributes
    ----------
    packages
        Those that are not the same, the most to ship first.
    settings
        What differs besides packages (``python``, ``platform``, variables), as name to (old, new).
    ship_bytes, ship_uncompressed_bytes, ship_chunks
        What a cluster that holds the old environment has to receive for the new one: chunks, listings among them.
    manifest_bytes
        What it has to receive of the manifest besides, compressed.
    """

    old_id: str
    new_id: str
    packages: tuple[PackageChange, ...]
    settings: Mapping[str, tuple[str, str]]
    ship_bytes: int
    ship_uncompressed_bytes: int
    ship_chunks: int
    manifest_bytes: int

    @property
    def is_empty(self) -> bool:
        """Whether both are one environment."""
        return self.old_id == self.new_id


def difference(old: Environment, new: Environment) -> Difference:
    """What is different between two environments; see `Environment.diff`."""
    missing = {digest: size for digest, size in new.chunks.items() if digest not in old.chunks}
    payloads = {digest: len(new.store.read_encoded(digest, codec.available())[1]) for digest in missing}
    before, after = _by_name(old), _by_name(new)
    changes = []
    for key in sorted(before.keys() | after.keys()):
        parts = before.get(key, ()), after.get(key, ())
        if parts[0] != parts[1]:
            # What two packages share travels once: with the first of them.
            mine = {chunk.digest for part in parts[1] for chunk in (part.listing, *part.chunks)} & payloads.keys()
            changes.append(_package_change(key, old, new, parts, sum(payloads.pop(digest) for digest in mine)))
    payload_bytes = sum(change.ship_bytes for change in changes)
    return Difference(
        old_id=old.id,
        new_id=new.id,
        packages=tuple(sorted(changes, key=lambda change: (-change.ship_bytes, change.name))),
        settings=dict(_settings(old, new)),
        ship_bytes=payload_bytes,
        ship_uncompressed_bytes=sum(missing.values()),
        ship_chunks=len(missing),
        manifest_bytes=0 if old.id == new.id else len(delta_of(new.manifest, [old.manifest])),
    )


def _by_name(environment: Environment) -> dict[tuple[str, str], tuple[Package, ...]]:
    """Packages by name and kind; more than one only where the listing of a large package was split."""
    found: dict[tuple[str, str], tuple[Package, ...]] = {}
    for package in environment.packages:
        key = package.name, package.kind
        found[key] = (*found.get(key, ()), package)
    return found


def _package_change(
    key: tuple[str, str],
    old: Environment,
    new: Environment,
    parts: tuple[tuple[Package, ...], tuple[Package, ...]],
    ship_bytes: int,
) -> PackageChange:
    before, after = _entries(old, parts[0]), _entries(new, parts[1])
    files = [
        FileChange(path, _kind(path in before, path in after), _size(before.get(path)), _size(after.get(path)))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]
    kind = _kind(bool(parts[0]), bool(parts[1]))
    return PackageChange(*key, kind, _version(parts[0]), _version(parts[1]), tuple(files), ship_bytes)


def _entries(environment: Environment, packages: Sequence[Package]) -> dict[str, Entry]:
    return {
        entry.path: entry
        for package in packages
        for entry in Listing.from_bytes(environment.store.read_chunk(package.listing.digest)).entries
    }


def _kind(in_old: bool, in_new: bool) -> Kind:
    return "changed" if in_old and in_new else "added" if in_new else "removed"


def _size(entry: Entry | None) -> int:
    return entry.size_bytes if isinstance(entry, File) else 0


def _version(packages: Sequence[Package]) -> str:
    if not packages:
        return ""
    build = packages[0].build.partition("#")[0]
    return f"{packages[0].version} {build}".strip()


def _settings(old: Environment, new: Environment) -> Iterator[tuple[str, tuple[str, str]]]:
    for name in ("python", "platform"):
        pair = str(getattr(old, name)), str(getattr(new, name))
        if pair[0] != pair[1]:
            yield name, pair
    variables = old.manifest.environ, new.manifest.environ
    for name in sorted(variables[0].keys() | variables[1].keys()):
        values = variables[0].get(name, ""), variables[1].get(name, "")
        if values[0] != values[1]:
            yield f"variable {name}", values
