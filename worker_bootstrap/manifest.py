"""What an environment consists of: the manifest, its packages, and the listing of each package's entries.

A manifest names packages; a package names one *listing* (its entries, stored as a chunk of its own) and its *content
chunks*. The bytes of a package's files, in the order of its listing, are exactly the bytes of its content chunks, in
their order: positions follow from sizes, so ranges cannot overlap or lie. Identity is the SHA-256 of the canonical
bytes, which hold no time, no path of installation, no user and no order of installation.

Pure: no I/O. `docs/format.md` gives the format byte for byte.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Union

from worker_bootstrap.digest import Digest, EnvironmentId, digest_of, is_digest
from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.paths import PATH_LIMIT, check_link, check_path, is_file_name, shown

FORMAT = 1
CHUNK_LIMIT_BYTES = 16 << 20
"""No chunk is larger, so a reader never has to hold more than this of one."""
MANIFEST_LIMIT_BYTES = 64 << 20
"""Some 900,000 chunks, 600 GB; a longer manifest is no manifest. JSON takes up to thirty times its bytes in memory."""
ENTRY_LIMIT = 1_000_000
"""Entries of one environment, fifteen times those of a large one; one that claims more is refused."""


SIZE_LIMIT_BYTES = 1 << 60
"""No file is larger; sums of sizes stay far from where that would matter."""


class Chunk(NamedTuple):
    """A run of content: the digest of its uncompressed bytes, and their count."""

    digest: Digest
    size_bytes: int


class Relocation(NamedTuple):
    """How a file names its prefix: *mode* is ``text`` (replace) or ``binary`` (replace, pad with NUL)."""

    mode: str
    placeholder: str


class File(NamedTuple):
    """A regular file. *digest* and *size_bytes* are those of its canonical content, before relocation."""

    path: str
    size_bytes: int
    digest: Digest
    executable: bool
    relocation: Relocation | None


class Link(NamedTuple):
    """A symbolic link, always relative and inside the prefix."""

    path: str
    target: str


class HardLink(NamedTuple):
    """Another name of a file that stands earlier in the same listing."""

    path: str
    target: str


class Directory(NamedTuple):
    """An empty directory; all others follow from the paths in them."""

    path: str


Entry = Union[File, Link, HardLink, Directory]


class Package(NamedTuple):
    """One package of an environment.

    *kind* is ``conda``, ``pypi``, ``project`` (editable source), ``python`` (a venv's interpreter) or ``files``
    (owned by no package).
    """

    name: str
    version: str
    build: str
    kind: str
    listing: Chunk
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        """Uncompressed size of the content."""
        return sum(chunk.size_bytes for chunk in self.chunks)


class Listing:
    """The entries of one package, sorted by path.

    Parameters
    ----------
    entries
        Sorted by path in code point order, no path twice; a `HardLink` after its target.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    @property
    def files(self) -> Iterator[File]:
        return (entry for entry in self.entries if isinstance(entry, File))

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return _canonical([_entry_row(entry) for entry in self.entries])

    @classmethod
    def from_bytes(cls, data: bytes) -> Listing:
        """Read and check a listing.

        Raises
        ------
        ManifestInvalid
            If the bytes break the format, a path leaves the prefix, or the bytes are not canonical.
        """
        if len(data) > CHUNK_LIMIT_BYTES:
            raise ManifestInvalid(f"{len(data)} bytes, at most {CHUNK_LIMIT_BYTES} are allowed", "listing")
        rows = _parse(data)
        if not isinstance(rows, list) or len(rows) > ENTRY_LIMIT:
            raise ManifestInvalid(f"a listing is a list of at most {ENTRY_LIMIT} entries", "listing")
        listing = cls([_row_entry(row) for row in rows])
        _check_digests(listing.entries)
        _check_order(listing.entries)
        # The rows are lists of texts and numbers by now, so encoding them again cannot fail.
        if _canonical(rows) != data:
            raise ManifestInvalid("the bytes are not canonical", "listing")
        return listing

    @classmethod
    def from_checked_bytes(cls, data: bytes) -> Listing:
        """Read the bytes of a listing that `from_bytes` has accepted before: in a third of the time."""
        return cls([_checked_entry(row) for row in json.loads(data)])


class Manifest:
    """An environment as content.

    Parameters
    ----------
    platform
        Conda's name of the platform, e.g. ``linux-64``.
    python
        Full version of the interpreter, e.g. ``3.11.7``.
    packages
        In any order; kept sorted by (name, kind, version, build).
    environ
        Variables to set on activation (``conda env config vars``); activation scripts are entries like all others.
    """

    def __init__(
        self,
        platform: str,
        python: str,
        packages: Sequence[Package],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.platform = platform
        self.python = python
        self.packages = tuple(sorted(packages))
        self.environ = dict(environ or {})

    @cached_property
    def id(self) -> EnvironmentId:
        return EnvironmentId(digest_of(self.to_bytes()))

    @cached_property
    def chunks(self) -> Mapping[Digest, int]:
        """Every chunk that a host needs, listings included: digest to uncompressed size in bytes."""
        needed: dict[Digest, int] = {}
        for package in self.packages:
            needed[package.listing.digest] = package.listing.size_bytes
            needed.update((chunk.digest, chunk.size_bytes) for chunk in package.chunks)
        return needed

    @property
    def size_bytes(self) -> int:
        """Uncompressed size of all files, counting equal chunks as often as they occur."""
        return sum(package.size_bytes for package in self.packages)

    def version_of(self, name: str) -> str | None:
        """Version of the package *name*, or None if there is no such package."""
        return next((p.version for p in self.packages if p.name == name and p.kind != "files"), None)

    def to_bytes(self) -> bytes:
        """The canonical bytes, whose SHA-256 is `id`."""
        return _canonical(
            {
                "format": FORMAT,
                "platform": self.platform,
                "python": self.python,
                "environ": self.environ,
                "packages": [
                    [p.name, p.version, p.build, p.kind, list(p.listing), [list(c) for c in p.chunks]]
                    for p in self.packages
                ],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, expected_id: EnvironmentId | None = None) -> Manifest:
        """Read and check a manifest; with *expected_id*, check its identity first.

        Raises
        ------
        ManifestInvalid
            If the bytes break the format, are not canonical, or do not have the expected id.
        """
        actual_id = EnvironmentId(digest_of(data))
        if expected_id is not None and actual_id != expected_id:
            raise ManifestInvalid(f"expected id {expected_id}, found {actual_id}", "manifest")
        if len(data) > MANIFEST_LIMIT_BYTES:
            raise ManifestInvalid(f"{len(data)} bytes, at most {MANIFEST_LIMIT_BYTES} are allowed", "manifest")
        raw = _parse(data)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ManifestInvalid(f"format {FORMAT} expected", "manifest")
        try:
            manifest = cls(
                platform=_text(raw["platform"]),
                python=_text(raw["python"]),
                packages=[_row_package(row) for row in raw["packages"]],
                environ=_environ(raw["environ"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestInvalid(f"{type(error).__name__}: {error}", "manifest") from error
        if manifest.to_bytes() != data:
            raise ManifestInvalid("the bytes are not canonical", "manifest")
        return manifest


def _entry_row(entry: Entry) -> list[Any]:
    if isinstance(entry, File):
        row: list[Any] = ["f", entry.path, entry.size_bytes, entry.digest, int(entry.executable)]
        return row + list(entry.relocation) if entry.relocation else row
    if isinstance(entry, Link):
        return ["l", entry.path, entry.target]
    if isinstance(entry, HardLink):
        return ["h", entry.path, entry.target]
    return ["d", entry.path]


def _row_entry(row: Any) -> Entry:
    # A large environment has 75,000 rows: what is checked most often stands first. Digests are checked all at once.
    try:
        kind, path = row[0], check_path(row[1])
        if kind == "f" and len(row) in (5, 7):
            size_bytes, executable = row[2], row[4]
            if type(size_bytes) is not int or not 0 <= size_bytes < SIZE_LIMIT_BYTES:
                raise ValueError("not a size in bytes")
            if type(executable) is not int or not 0 <= executable <= 1:
                raise ValueError("neither executable nor not")
            relocation = Relocation(_mode(row[5]), _placeholder(row[6])) if len(row) == 7 else None
            return File(path, size_bytes, row[3], executable == 1, relocation)
        if kind == "l" and len(row) == 3:
            return Link(path, check_link(path, row[2]))
        if kind == "h" and len(row) == 3:
            return HardLink(path, check_path(row[2]))
        if kind == "d" and len(row) == 2:
            return Directory(path)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise ManifestInvalid(f"bad entry {shown(row)}: {error}", "listing") from error
    raise ManifestInvalid(f"unknown entry {shown(row)}", "listing")


def _checked_entry(row: list[Any]) -> Entry:
    kind, path = row[0], row[1]
    if kind == "f":
        return File(path, row[2], row[3], row[4] == 1, Relocation(row[5], row[6]) if len(row) == 7 else None)
    if kind == "d":
        return Directory(path)
    return (Link if kind == "l" else HardLink)(path, row[2])


def _check_digests(entries: Sequence[Entry]) -> None:
    digests = [entry[2] for entry in entries if type(entry) is File]
    try:
        joined = "".join(digests)
        are_digests = bytes.fromhex(joined).hex() == joined and {64}.issuperset(map(len, digests))
    except (TypeError, ValueError):
        are_digests = False
    if not are_digests:
        odd = next(digest for digest in digests if not is_digest(digest))
        raise ManifestInvalid(f"not a digest: {shown(odd)}", "listing")


def _row_package(row: Any) -> Package:
    name, version, build, kind, listing, chunks = row
    return Package(_text(name), _text(version), _text(build), _text(kind), _chunk(listing), tuple(map(_chunk, chunks)))


def _check_order(entries: Sequence[Entry]) -> None:
    paths = [entry.path for entry in entries]
    if not all(map(operator.lt, paths, paths[1:])):
        odd = next(path for previous, path in zip(paths, paths[1:]) if previous >= path)
        raise ManifestInvalid(f"{odd!r} is not in order, or stands twice", "listing")
    hard_links = [entry for entry in entries if isinstance(entry, HardLink)]
    if hard_links:
        files = {entry.path for entry in entries if isinstance(entry, File)}
        for entry in hard_links:
            if entry.target not in files or entry.target >= entry.path:
                reason = f"{entry.path!r} is a hard link to {entry.target!r}, not a file before it"
                raise ManifestInvalid(reason, "listing")


def _chunk(row: Any) -> Chunk:
    digest, size_bytes = row
    if _size(size_bytes) > CHUNK_LIMIT_BYTES:
        raise ValueError(f"a chunk of {size_bytes} bytes: at most {CHUNK_LIMIT_BYTES} are allowed")
    return Chunk(_digest(digest), size_bytes)


def _digest(value: Any) -> Digest:
    if not is_digest(value):
        raise ValueError(f"not a digest: {shown(value)}")
    return Digest(value)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < SIZE_LIMIT_BYTES:
        raise ValueError(f"not a size in bytes: {shown(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not a text: {shown(value)}")
    return value


def _environ(raw: Any) -> dict[str, str]:
    """Variables such as a process can have: no other could be started from the environment."""
    environ = {_text(name): _text(value) for name, value in raw.items()}
    for name, value in environ.items():
        if not name or "=" in name or "\0" in name + value or not (is_file_name(name) and is_file_name(value)):
            raise ValueError(f"not a variable: {shown(name)} = {shown(value)}")
    return environ


def _mode(value: Any) -> str:
    if value not in ("text", "binary"):
        raise ValueError(f"not a relocation mode: {value!r}")
    return str(value)


def _placeholder(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/") or not 2 <= len(value) <= PATH_LIMIT or "\0" in value:
        raise ValueError("not a placeholder")
    if not (value.isascii() or is_file_name(value)):
        raise ValueError("not a placeholder")
    return value


def _canonical(value: Any) -> bytes:
    # ASCII with escapes: file names that are no UTF-8 (surrogate escapes) have one form and survive the round trip.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"not JSON: {shown(str(error))}", "manifest") from error
