"""Files too large for memory: piece by piece they become what they become as a whole."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from envship.canonical import Own, Recorded
from envship.chunking import LIMIT_BYTES
from envship.large_files import LargeContent, large_content, relocated, restored
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.manifest import Relocation
from worker_bootstrap.relocate import relocate, restore

HERE = "/e/v"
ROOM = Relocation("binary", "/place")
LONG = Relocation("binary", "/placeholder" + "p" * 243)

# Everything that a cut may fall into: names, parts of them, the end of a string, its padding.
parts = st.sampled_from([HERE.encode(), b"/e", b"/place", b"/pl", b":", b"x", b"\0", b"\0" * 2, b"\0" * 9])
contents = st.lists(parts, max_size=40).map(b"".join)


def cut(data: bytes, size_bytes: int) -> Iterator[bytes]:
    for start in range(0, len(data), size_bytes):
        yield data[start : start + size_bytes]


@given(contents, st.integers(1, 12))
@example(b"/e/v\0\0x", 7)  # one NUL too few, but at the file's end
def test_piece_by_piece_is_as_a_whole(data: bytes, size_bytes: int) -> None:
    assert b"".join(restored(cut(data, size_bytes), ROOM, HERE)) == restore(data, ROOM, HERE)
    assert b"".join(relocated(cut(data, size_bytes), ROOM, HERE)) == relocate(data, ROOM, HERE)


@given(contents, contents, st.integers(1, 12))
def test_what_an_edited_file_becomes_is_the_same_as_well(data: bytes, original: bytes, size_bytes: int) -> None:
    data += b"\0"  # or it would be text, which is as it is where it is large
    for digest in (digest_of(restore(data, ROOM, HERE)), digest_of(original)):
        treatment = Recorded(digest, ROOM, Own((HERE, "/other")))
        large = large_content(lambda: cut(data, size_bytes), treatment)
        assert (b"".join(large.pieces), large.relocation) == treatment(data)[:2]


@pytest.mark.parametrize("edited", [False, True])
def test_a_large_file_takes_little_memory(tmp_path: Path, edited: bool) -> None:
    """With names at its ends and between zeros of many pieces; the pieces are those that it is cut into."""
    name = LONG.placeholder.encode()
    blocks = [b"\1", name + b"/lib:" + name + b"/share\0", bytes(30 << 20), b"x" * (20 << 20), name + b"\0end" + name]
    original = tmp_path / "original"
    with open(original, "wb") as file:
        for block in blocks:
            file.write(block)
    digest = file_digest(original)
    installed = tmp_path / "installed"
    with open(installed, "wb") as file:
        for piece in relocated(pieces_of(original), LONG, HERE):
            file.write(piece.replace(b"\1", b"\2") if edited else piece)

    tracemalloc.start()
    try:
        large = large_content(lambda: pieces_of(installed), Recorded(digest, LONG, Own((HERE,))))
        sizes = write(large, tmp_path / "again")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40 << 20 < installed.stat().st_size
    assert set(sizes[:-1]) == {LIMIT_BYTES}
    assert large.relocation == LONG
    assert (file_digest(tmp_path / "again") == digest) != edited
    assert (tmp_path / "again").read_bytes()[1:] == original.read_bytes()[1:]


def pieces_of(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(LIMIT_BYTES):
            yield piece


def write(large: LargeContent, path: Path) -> list[int]:
    with open(path, "wb") as file:
        return [file.write(piece) for piece in large.pieces]


def file_digest(path: Path) -> Digest:
    return digest_of(path.read_bytes())
