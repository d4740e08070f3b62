"""Small environments made by hand: the store side can be tested without packing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.manifest import (
    Chunk,
    Directory,
    Entry,
    File,
    HardLink,
    Link,
    Listing,
    Manifest,
    Package,
    Relocation,
)
from worker_bootstrap.store import Store

PLACEHOLDER = "/envship/placeholder/" + "p" * 230
"""As long as conda's: room for the path of any store that a test makes."""

Content = Union[bytes, File, Link, HardLink, Directory, tuple[bytes, str]]
"""Content of a file; with a relocation mode; or an entry as it is to stand in the listing."""


def listing_of(files: Mapping[str, Content]) -> tuple[Listing, bytes]:
    """The listing and the content of a package. Names that end with ``*`` are executables (without the star)."""
    entries: list[Entry] = []
    content = b""
    for name, value in sorted(files.items(), key=lambda item: item[0].rstrip("*")):
        path, executable = name.rstrip("*"), name.endswith("*")
        if isinstance(value, (File, Link, HardLink, Directory)):
            entries.append(value)
            continue
        data, mode = value if isinstance(value, tuple) else (value, "")
        relocation = Relocation(mode, PLACEHOLDER) if mode else None
        entries.append(File(path, len(data), digest_of(data), executable, relocation))
        content += data
    return Listing(entries), content


def package_of(
    store: Store,
    files: Mapping[str, Content],
    name: str = "tiny",
    version: str = "1",
    chunk_bytes: int = 100,
    codec: str | None = None,
) -> Package:
    """A package in *store*, its content in chunks of *chunk_bytes* whatever file they fall in."""
    listing, content = listing_of(files)
    raw = listing.to_bytes()
    pieces = [content[start : start + chunk_bytes] for start in range(0, len(content), chunk_bytes)]
    chunks = tuple(Chunk(store.write_chunk(piece, codec), len(piece)) for piece in pieces)
    return Package(name, version, "0", "files", Chunk(store.write_chunk(raw, codec), len(raw)), chunks)


def environment_of(store: Store, packages: Sequence[Package], environ: Mapping[str, str] | None = None) -> Manifest:
    """An environment in *store* with these packages."""
    manifest = Manifest("linux-64", "3.11.7", packages, environ)
    store.write_manifest(manifest)
    return manifest


def tiny_environment(store: Store, files: Mapping[str, Content] | None = None, chunk_bytes: int = 100) -> EnvironmentId:
    """An environment in *store* with one package that holds *files*, or some of every kind."""
    package = package_of(store, EVERY_KIND if files is None else files, chunk_bytes=chunk_bytes)
    return environment_of(store, [package]).id


EVERY_KIND: dict[str, Content] = {
    "bin/tool*": (b"#!" + PLACEHOLDER.encode() + b"/bin/python\nprint('hello')\n", "text"),
    "bin/alias": Link("bin/alias", "tool"),
    "bin/tool-1": HardLink("bin/tool-1", "bin/tool"),
    "lib/libx.so": (b"\x7fELF\0" + PLACEHOLDER.encode() + b"/lib:" + PLACEHOLDER.encode() + b"/x\0tail\0", "binary"),
    "lib/data/large.bin": bytes(range(256)) * 10,
    "lib/empty": b"",
    "lib/nothing-inside": Directory("lib/nothing-inside"),
    "share/naïve name\nwith newline.txt": b"text",
}
