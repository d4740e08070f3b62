"""Where the bytes of an environment are: folders, kinds of files, and what a cluster can most likely do without."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker_bootstrap.manifest import File, Listing

if TYPE_CHECKING:
    from envship.environment import Environment

FOLDER_SHARE = 0.01
"""Folders with less than this share of the bytes are counted with the folder that they lie in."""

_KINDS = (
    ("compiled libraries", r".*\.so(?:\.[0-9.]+)?|.*\.dylib"),
    ("static libraries", r".*\.(?:a|la|o|lib)"),
    ("Python byte code", r".*\.pyc"),
    ("Python sources", r".*\.pyi?"),
    ("sources and headers", r".*\.(?:h|hpp|hh|hxx|c|cc|cpp|cxx|cu|cuh|pyx|pxd|pxi|f90|inc|ipp|proto|js\.map|ts)"),
    ("documentation", r".*\.(?:html?|rst|md|pdf|1|3|7|info|ipynb)|(?:share/)(?:doc|man|info)/.*"),
    ("package metadata", r"conda-meta/.*|.*\.(?:dist|egg)-info/.*"),
    ("images and fonts", r".*\.(?:png|svg|jpe?g|gif|ico|ttf|woff2?|otf|afm|pfb)"),
    ("scripts and data for the web", r".*\.(?:js|css|mjs|wasm)"),
    (
        "data",
        r".*\.(?:csv|json|gz|xz|bz2|zip|zst|npy|npz|h5|hdf5|parquet|db|sqlite|pkl|dat|bin|tsv|txt|xml|ya?ml|toml)",
    ),
)
_UNNEEDED = (
    ("tests of packages", ("*/tests/*", "*/test/*")),
    ("static libraries", ("*.a",)),
    ("headers", ("include/*", "*/include/*")),
    ("manuals and documentation", ("share/doc/*", "share/man/*", "share/info/*")),
    ("sources of compiled modules", ("*.pyx", "*.pxd", "*.c", "*.cpp")),
    ("translations", ("*/locale/*", "*.mo")),
    ("type hints", ("*.pyi",)),
    ("maps of scripts for the web", ("*.js.map",)),
)


@dataclass(frozen=True, slots=True)
class Part:
    """Some files of an environment, with their number and uncompressed size."""

    name: str
    files: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Unneeded:
    """Files that most clusters can do without, and the patterns for ``--exclude`` that leave them out."""

    name: str
    patterns: tuple[str, ...]
    files: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the bytes are.

    Attributes
    ----------
    kinds
        Every file, by its kind; the largest first.
    folders
        Every file, by its folder; small folders (`FOLDER_SHARE`) are counted with the one around them.
    unneeded
        What could be left out; the parts may overlap.
    """

    kinds: tuple[Part, ...]
    folders: tuple[Part, ...]
    unneeded: tuple[Unneeded, ...]


def usage(environment: Environment) -> Usage:
    """Where the bytes of *environment* are.

    Raises
    ------
    ChunkMissing
        If the store lost a listing: pack again.
    """
    sizes: dict[str, int] = {}
    for package in environment.packages:
        listing = Listing.from_bytes(environment.store.read_chunk(package.listing.digest))
        sizes.update((entry.path, entry.size_bytes) for entry in listing.entries if isinstance(entry, File))
    return usage_of(sizes)


def usage_of(sizes: Mapping[str, int]) -> Usage:
    """Where the bytes are, for files with these *sizes* by path."""
    return Usage(_kinds(sizes), _folders(sizes), tuple(_unneeded(sizes)))


def _kinds(sizes: Mapping[str, int]) -> tuple[Part, ...]:
    patterns = [(name, re.compile(pattern)) for name, pattern in _KINDS]
    found: dict[str, list[int]] = {}
    for path, size_bytes in sizes.items():
        name = next((name for name, pattern in patterns if pattern.fullmatch(path)), "other")
        found.setdefault(name, []).append(size_bytes)
    return _ordered(Part(name, len(some), sum(some)) for name, some in found.items())


def _folders(sizes: Mapping[str, int]) -> tuple[Part, ...]:
    below: dict[str, int] = {}
    for path, size_bytes in sizes.items():
        for folder in _above(path):
            below[folder] = below.get(folder, 0) + size_bytes
    least_bytes = FOLDER_SHARE * sum(sizes.values())
    found: dict[str, list[int]] = {}
    for path, size_bytes in sizes.items():
        folder = next((folder for folder in _above(path) if below[folder] >= least_bytes), "")
        found.setdefault(folder, []).append(size_bytes)
    return _ordered(Part(name + "/" if name else "", len(some), sum(some)) for name, some in found.items())


def _above(path: str) -> Iterable[str]:
    """The folders around *path*, the nearest first."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _unneeded(sizes: Mapping[str, int]) -> Iterable[Unneeded]:
    for name, patterns in _UNNEEDED:
        pattern = re.compile("|".join(map(fnmatch.translate, patterns)))
        some = [size_bytes for path, size_bytes in sizes.items() if pattern.match(path)]
        if some:
            yield Unneeded(name, patterns, len(some), sum(some))


def _ordered(parts: Iterable[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: (-part.size_bytes, part.name)))
