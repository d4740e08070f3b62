"""Reading packed environments back, for assertions."""

from __future__ import annotations

from envship.environment import Environment
from worker_bootstrap.manifest import Entry, File, Listing, Package


def package(environment: Environment, name: str, kind: str | None = None) -> Package:
    """The package of that name."""
    (found,) = (p for p in environment.packages if p.name == name and kind in (None, p.kind))
    return found


def entries(environment: Environment, found: Package) -> dict[str, Entry]:
    """The entries of a package by path."""
    listing = Listing.from_bytes(environment.store.read_chunk(found.listing.digest))
    return {entry.path: entry for entry in listing.entries}


def all_entries(environment: Environment) -> dict[str, Entry]:
    """The entries of all packages; no two packages may have the same path."""
    found: dict[str, Entry] = {}
    for each in environment.packages:
        inside = entries(environment, each)
        assert not found.keys() & inside.keys()
        found.update(inside)
    return found


def contents(environment: Environment, found: Package) -> dict[str, bytes]:
    """The canonical content of every file of a package."""
    data = b"".join(environment.store.read_chunk(chunk.digest) for chunk in found.chunks)
    result, position = {}, 0
    for entry in entries(environment, found).values():
        if isinstance(entry, File):
            result[entry.path] = data[position : position + entry.size_bytes]
            position += entry.size_bytes
    assert position == len(data)
    return result
