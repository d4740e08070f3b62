"""Cuts follow from content: any law that chunks obey, checked on files of random sizes."""

from __future__ import annotations

import random

from hypothesis import example, given
from hypothesis import strategies as st

from envship.chunking import AVERAGE_BYTES, LARGE_FILE_BYTES, LIMIT_BYTES, Cutter, is_large, piece_sizes
from worker_bootstrap.digest import Digest, digest_of

Sizes = list[tuple[Digest, int]]


def chunks_of(files: Sizes) -> list[list[tuple[Digest, int]]]:
    """The files of each chunk; a large file stands for all its pieces."""
    cutter, chunks, current = Cutter(), [], []
    for digest, size in files:
        if cutter.cuts_before(size):
            chunks.append(current)
            current = []
        if is_large(size):
            chunks.append([(digest, size)])
            continue
        current.append((digest, size))
        if cutter.cuts_after(digest, size):
            chunks.append(current)
            current = []
    return chunks + ([current] if current else [])


def some_files(count: int, seed: int) -> Sizes:
    chance = random.Random(seed)
    return [(digest_of(f"{seed} {n}".encode()), int(chance.lognormvariate(8.5, 1.5))) for n in range(count)]


@given(st.lists(st.integers(0, 3 * LIMIT_BYTES), max_size=60))
@example([0, LARGE_FILE_BYTES + 1])
def test_every_file_lies_in_one_chunk_in_order_and_no_chunk_is_too_large(sizes: list[int]) -> None:
    files = [(digest_of(str(number).encode()), size) for number, size in enumerate(sizes)]
    chunks = chunks_of(files)
    # An empty file has no byte that would lie anywhere.
    assert [file for chunk in chunks for file in chunk if file[1]] == [file for file in files if file[1]]
    for chunk in chunks:
        assert len(chunk) == 1 or sum(size for _, size in chunk) <= LIMIT_BYTES


@given(st.integers(LARGE_FILE_BYTES + 1, 200 << 20))
def test_pieces_of_a_large_file_add_up(size: int) -> None:
    pieces = piece_sizes(size)
    assert sum(pieces) == size
    assert all(0 < piece <= LIMIT_BYTES for piece in pieces)


def test_chunks_of_small_files_have_the_intended_size_on_average() -> None:
    files = some_files(20_000, seed=1)
    total = sum(size for _, size in files)
    assert 0.6 * AVERAGE_BYTES < total / len(chunks_of(files)) < 1.4 * AVERAGE_BYTES


def test_an_edited_file_changes_few_chunks() -> None:
    files = some_files(5_000, seed=2)
    before = {tuple(chunk) for chunk in chunks_of(files)}
    for position in (0, 1234, 4999):
        edited = list(files)
        edited[position] = (digest_of(b"edited"), edited[position][1] + 7)
        assert len({tuple(chunk) for chunk in chunks_of(edited)} - before) <= 2


def test_cut_points_are_those_of_the_format() -> None:
    """Golden: another rule would make every environment already stored elsewhere a stranger."""
    assert [len(chunk) for chunk in chunks_of(some_files(400, seed=3))] == [10, 10, 37, 54, 36, 45, 4, 92, 32, 74, 6]
