"""Manifests and listings as bytes; what becomes of the hostile ones in a store is in `test_hostile_content`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_bootstrap.digest import Digest, EnvironmentId, digest_of
from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.manifest import (
    CHUNK_LIMIT_BYTES,
    Chunk,
    Directory,
    File,
    HardLink,
    Link,
    Listing,
    Manifest,
    Package,
    Relocation,
)

D: Any = "0" * 64
E: Any = "e" * 64

names = (
    st.binary(min_size=1, max_size=8).map(os.fsdecode) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
).filter(lambda name: name not in (".", "..") and not set(name) & set("/\0"))
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
digests = st.binary(max_size=4).map(digest_of)
relocations = st.none() | st.builds(Relocation, st.sampled_from(["text", "binary"]), paths.map(lambda p: "/" + p))
files = st.builds(File, paths, st.integers(0, 1 << 40), digests, st.booleans(), relocations)
entries = st.lists(files | st.builds(Directory, paths) | paths.map(lambda p: Link(p, "x")), unique_by=lambda e: e.path)
chunks = st.builds(Chunk, digests, st.integers(0, CHUNK_LIMIT_BYTES))
packages = st.builds(
    Package, st.text(), st.text(), st.text(), st.just("conda"), chunks, st.lists(chunks, max_size=3).map(tuple)
)
environs = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="=\0"), min_size=1),
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    max_size=3,
)


@given(entries.map(lambda found: sorted(found, key=lambda e: e.path)))
def test_a_listing_survives_its_bytes(found: Any) -> None:
    listing = Listing(found)
    for again in (Listing.from_bytes(listing.to_bytes()), Listing.from_checked_bytes(listing.to_bytes())):
        assert again.entries == listing.entries
        assert again.to_bytes() == listing.to_bytes()


@given(st.lists(packages, max_size=4), environs)
def test_a_manifest_survives_its_bytes(found: Any, environ: Any) -> None:
    manifest = Manifest("linux-64", "3.11.7", found, environ)
    again = Manifest.from_bytes(manifest.to_bytes(), manifest.id)
    assert again.to_bytes() == manifest.to_bytes()
    assert again.packages == manifest.packages


def test_the_bytes_of_a_manifest() -> None:
    """Golden: a change here is a change of the format, and of every environment id."""
    package = Package("numpy", "2.3.4", "py311", "conda", Chunk(D, 10), (Chunk(E, 20),))
    manifest = Manifest("linux-64", "3.11.7", [package], {"A": "b"})
    assert (
        manifest.to_bytes()
        == (
            f'{{"environ":{{"A":"b"}},"format":1,"packages":[["numpy","2.3.4","py311","conda",["{D}",10],[["{E}",20]]]],'
            '"platform":"linux-64","python":"3.11.7"}'
        ).encode()
    )


def test_the_bytes_of_a_listing() -> None:
    listing = Listing(
        [
            File("bin/a", 3, D, True, None),
            HardLink("bin/b", "bin/a"),
            Link("bin/c", "a"),
            Directory("empty"),
            File("lib/\udce9", 0, E, False, Relocation("text", "/old")),
        ]
    )
    assert (
        listing.to_bytes()
        == (
            f'[["f","bin/a",3,"{D}",1],["h","bin/b","bin/a"],["l","bin/c","a"],["d","empty"],'
            f'["f","lib/\\udce9",0,"{E}",0,"text","/old"]]'
        ).encode()
    )


def test_the_order_of_installation_does_not_matter() -> None:
    one, two = (Package(name, "1", "0", "conda", Chunk(D, 1), ()) for name in "ab")
    assert Manifest("p", "3", [one, two]).id == Manifest("p", "3", [two, one]).id


def test_what_a_host_needs_includes_the_listings() -> None:
    package = Package("a", "1", "0", "conda", Chunk(D, 10), (Chunk(E, 20), Chunk(E, 20)))
    manifest = Manifest("p", "3", [package])
    assert manifest.chunks == {D: 10, E: 20}
    assert manifest.size_bytes == 40
    assert manifest.version_of("a") == "1"
    assert manifest.version_of("b") is None


# -- hostile input

HOSTILE_ROWS: list[Any] = [
    None,
    [],
    ["f"],
    ["f", "a", -1, D, 0],
    ["f", "a", 1.0, D, 0],
    ["f", "a", True, D, 0],
    ["f", "a", 1 << 60, D, 0],
    ["f", "a", 1, "xyz", 0],
    ["f", "a", 1, D, 2],
    ["f", "a", 1, D, True],
    ["f", "a", 1, D, 1.0],
    ["f", "\ud800", 1, D, 0],
    ["f", "a", 1, D, 0, "text", "/\ud800"],
    ["f", "a", 1, D, 0o4755],
    ["f", "a", 1, D, 0, "text"],
    ["f", "a", 1, D, 0, "exec", "/old"],
    ["f", "a", 1, D, 0, "text", "relative"],
    ["f", "a", 1, D, 0, "text", "/"],
    ["f", "../a", 1, D, 0],
    ["l", "a", "/etc/passwd"],
    ["l", "a", "../x"],
    ["h", "a", "b"],
    ["d", "/a"],
    ["c", "dev/null", 1, 3],
    ["p", "fifo"],
    {"path": "a"},
]


@pytest.mark.parametrize("row", HOSTILE_ROWS, ids=repr)
def test_an_entry_that_breaks_the_format(row: Any) -> None:
    with pytest.raises(ManifestInvalid):
        Listing.from_bytes(json.dumps([row]).encode())


@pytest.mark.parametrize("change", [lambda data: data + b"\n", lambda data: data.replace(b"a", b"\\u0061")])
def test_a_listing_that_is_not_canonical(change: Callable[[bytes], bytes]) -> None:
    """Two spellings of one listing would be two environments with the same files."""
    with pytest.raises(ManifestInvalid, match="canonical"):
        Listing.from_bytes(change(Listing([Directory("a")]).to_bytes()))


@pytest.mark.parametrize(
    "rows",
    [
        [["d", "b"], ["d", "a"]],
        [["d", "a"], ["d", "a"]],
        [["h", "a", "b"], ["f", "b", 0, D, 0]],
        [["l", "a", "b"], ["h", "c", "a"]],
    ],
    ids=["order", "twice", "hard link before its target", "hard link to a link"],
)
def test_entries_that_do_not_go_together(rows: Any) -> None:
    with pytest.raises(ManifestInvalid):
        Listing.from_bytes(json.dumps(rows).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"null", b"\xff", b"[" * 100_000, b'{"format":2}'])
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        Manifest.from_bytes(data)
    if data != b"[]":
        with pytest.raises(ManifestInvalid):
            Listing.from_bytes(data)


def test_a_manifest_under_another_id() -> None:
    manifest = Manifest("linux-64", "3.11.7", [])
    with pytest.raises(ManifestInvalid, match="expected id"):
        Manifest.from_bytes(manifest.to_bytes(), EnvironmentId(D))


def test_a_manifest_that_is_not_canonical() -> None:
    """Two spellings of one environment would be two environments."""
    manifest = Manifest("linux-64", "3.11.7", [])
    with pytest.raises(ManifestInvalid, match="canonical"):
        Manifest.from_bytes(manifest.to_bytes().replace(b":", b": "))


@pytest.mark.parametrize(
    "environ", [{"": "x"}, {"A=B": "x"}, {"A\0B": "x"}, {"A": "x\0"}, {"A\ud800": ""}, {"A": "\ud800"}]
)
def test_variables_that_no_process_can_have(environ: dict[str, str]) -> None:
    with pytest.raises(ManifestInvalid, match="not a variable"):
        Manifest.from_bytes(Manifest("linux-64", "3.11.7", [], environ).to_bytes())


@pytest.mark.parametrize("size_bytes", [-1, CHUNK_LIMIT_BYTES + 1, "1", None])
def test_a_chunk_of_impossible_size(size_bytes: Any) -> None:
    package = Package("a", "1", "0", "conda", Chunk(Digest(D), size_bytes), ())
    with pytest.raises(ManifestInvalid):
        Manifest.from_bytes(Manifest("p", "3", [package]).to_bytes())
