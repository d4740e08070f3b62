from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.environments import PLACEHOLDER, Content, listing_of
from worker_bootstrap import blueprint as module
from worker_bootstrap.blueprint import Blueprint, draw, split
from worker_bootstrap.errors import ManifestInvalid, MaterialiseError, PrefixTooLong
from worker_bootstrap.manifest import Chunk, Directory, File, HardLink, Link, Manifest, Package

D: Any = "0" * 64


def drawn(*packages: dict[str, Content], prefix: str = "/p") -> Blueprint:
    listings, found = [], []
    for number, files in enumerate(packages):
        listing, content = listing_of(files)
        listings.append(listing)
        found.append(
            Package(f"p{number}", "1", "0", "files", Chunk(D, 1), (Chunk(D, len(content)),) if content else ())
        )
    return draw(Manifest("linux-64", "3.11.7", found), listings, prefix)


def links(**targets: str) -> dict[str, Content]:
    return {path.replace("__", "/"): Link(path.replace("__", "/"), target) for path, target in targets.items()}


def test_what_is_written_and_how_much() -> None:
    plan = drawn({"a/b/c": b"123", "d": Directory("d"), "e": HardLink("e", "a/b/c"), "l": Link("l", "a")}, {"z": b""})
    assert plan.directories == ("a", "a/b", "d")
    assert [[file.path for file in run.files] for run in plan.runs] == [["a/b/c"], ["z"]]
    assert plan.links == (Link("l", "a"),)
    assert plan.hard_links == (HardLink("e", "a/b/c"),)
    assert plan.size_bytes == 3
    assert plan.needed_bytes(lambda file: False) == 4 * 4096
    assert plan.needed_bytes(lambda file: file.size_bytes == 3) == 3 * 4096
    assert plan.needed_inodes == 2 + 3 + 1


def test_packages_may_share_directories() -> None:
    shared: dict[str, Content] = {"x/y": Directory("x/y")}
    assert drawn(shared, shared, {"x/y/z": b""}).directories == ("x", "x/y")


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        (({"a": b"1"}, {"a": b"1"}), "'a' stands in two packages"),
        (({"a": b"1"}, {"a": Link("a", "b")}), "'a' stands in two packages"),
        (({"a": b"1"}, {"a": Directory("a")}), "'a' has entries below it"),
        (({"a": b"1", "a/b": b"2"},), "'a' has entries below it"),
        (({"a": Link("a", "x"), "x/y": b""}, {"a/b": b"2"}), "'a' has entries below it"),
        (({"a": b"1", "h": HardLink("h", "a")}, {"h/x": b""}), "'h' has entries below it"),
    ],
)
def test_paths_that_are_in_each_others_way(packages: Any, reason: str) -> None:
    with pytest.raises(ManifestInvalid, match=reason):
        drawn(*packages)


@pytest.mark.parametrize(
    "found",
    [
        links(deep__er__up="../..", x="deep/er/up", out="x/.."),
        links(a__up="..", out="a/up/.."),
        links(a__b__here=".", out="a/b/here/../../.."),
        links(a__up="..", b="a/up", c="b", out="c/../x"),
    ],
)
def test_a_chain_of_links_that_leads_out(found: dict[str, Content]) -> None:
    """Each target stays inside by itself; together they do not."""
    with pytest.raises(ManifestInvalid, match="may leave the prefix"):
        drawn(found)


@pytest.mark.parametrize(
    "found",
    [
        links(lib64="lib", lib__x="../share/x", bin__sh="bash"),
        links(a__up="..", b="a/up/c"),
        links(circle="circle"),
        links(a="nowhere/../elsewhere"),
    ],
)
def test_links_that_stay(found: dict[str, Content]) -> None:
    assert len(drawn(found).links) == len(found)


def test_all_problems_are_listed() -> None:
    with pytest.raises(ManifestInvalid) as caught:
        drawn({"a": b"1", "b": b"1", "b/c": b""}, {"a": b"1"})
    assert "'a'" in str(caught.value) and "'b'" in str(caught.value)


def test_the_tightest_placeholder_decides() -> None:
    data = PLACEHOLDER.encode() + b"\0"
    files: dict[str, Content] = {"lib/a": (data, "binary"), "lib/b": (data, "text")}
    drawn(files, prefix="/" + "p" * (len(PLACEHOLDER) - 1))
    with pytest.raises(PrefixTooLong) as caught:
        drawn(files, prefix="/" + "p" * len(PLACEHOLDER))
    assert (caught.value.path, caught.value.room_bytes) == ("lib/a", len(PLACEHOLDER))


def test_a_file_too_large_to_relocate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELOCATABLE_LIMIT_BYTES", 10)
    with pytest.raises(MaterialiseError, match="too many to relocate"):
        drawn({"a": (PLACEHOLDER.encode(), "text")})


# -- runs


def files_of(*sizes: int) -> list[File]:
    return [File(f"{number:04}", size, D, False, None) for number, size in enumerate(sizes)]


def chunks_of(*sizes: int) -> list[Chunk]:
    return [Chunk(D, size) for size in sizes]


@given(st.lists(st.integers(0, 5), max_size=20), st.data())
def test_runs_hold_every_file_and_chunk_once_and_are_whole(sizes: list[int], data: st.DataObject) -> None:
    total, cuts = sum(sizes), []
    while sum(cuts) < total:
        cuts.append(data.draw(st.integers(1, total - sum(cuts))))
    files, chunks = files_of(*sizes), chunks_of(*cuts)
    runs = list(split(files, chunks))
    assert [file for run in runs for file in run.files] == files
    assert [chunk for run in runs for chunk in run.chunks] == chunks
    for run in runs:
        assert run.size_bytes == sum(file.size_bytes for file in run.files)


def test_a_run_ends_where_a_chunk_ends_with_a_file() -> None:
    runs = list(split(files_of(1, 2, 3, 10), chunks_of(3, 3, 4, 6)))
    assert [(len(run.files), len(run.chunks)) for run in runs] == [(2, 1), (1, 1), (1, 2)]


@pytest.mark.parametrize(("sizes", "cuts"), [((3,), (2,)), ((3,), (4,)), ((), (1,)), ((3,), ()), ((3,), (3, 0))])
def test_files_and_chunks_that_do_not_add_up(sizes: tuple[int, ...], cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bytes"):
        list(split(files_of(*sizes), chunks_of(*cuts)))
