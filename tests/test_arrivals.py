"""Chunks that come while a build waits for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from worker_bootstrap import arrivals
from worker_bootstrap.arrivals import Arrivals
from worker_bootstrap.blueprint import Run
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.errors import TransferError
from worker_bootstrap.manifest import Chunk

A, B, C = (digest_of(name) for name in (b"a", b"b", b"c"))


def run_of(*digests: Digest, size_bytes: int = 1) -> Run:
    return Run((), tuple(Chunk(digest, size_bytes) for digest in digests))


def test_runs_come_when_their_chunks_do() -> None:
    waiting = Arrivals()
    both, last = run_of(A, B), run_of(C)
    found = waiting.as_they_come([both, last], {A}.__contains__)
    waiting.hear(arrivals.announce([C]))
    assert next(found) is last
    waiting.hear(arrivals.announce([B]))
    assert next(found) is both
    assert list(found) == []


def test_what_is_there_comes_first_the_largest_before_the_others() -> None:
    small, large, absent = run_of(A, size_bytes=1), run_of(B, size_bytes=9), run_of(C)
    found = Arrivals().as_they_come([absent, small, large], {A, B}.__contains__)
    assert [next(found), next(found)] == [large, small]


def test_what_was_never_told_of_is_handed_out_at_the_end() -> None:
    """Whoever reads it finds that it is missing, and says so."""
    waiting = Arrivals()
    waiting.hear(arrivals.finish())
    run = run_of(A)
    assert list(waiting.as_they_come([run], lambda _: False)) == [run]


def test_a_chunk_that_came_another_way_is_found_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "LOOK_S", 0.01)
    looks: Iterator[bool] = iter([False, False, True])
    run = run_of(A)
    assert list(Arrivals().as_they_come([run], lambda _: next(looks))) == [run]


def test_an_abandoned_fetch_ends_the_wait_with_its_reason() -> None:
    waiting = Arrivals()
    waiting.hear(arrivals.finish("the client left"))
    with pytest.raises(TransferError, match="the client left"):
        waiting.until([A], lambda _: False)
    with pytest.raises(TransferError, match="the client left"):
        list(waiting.as_they_come([run_of(A)], lambda _: False))


def test_silence_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "LOOK_S", 0.01)
    with pytest.raises(TransferError, match="nothing was heard"):
        Arrivals(silence_s=0.02).until([A], lambda _: False)


def test_messages_are_read_from_a_pipe_in_whatever_pieces() -> None:
    waiting = Arrivals()
    read, write = os.pipe()
    listening = threading.Thread(target=waiting.listen, args=[read])
    listening.start()
    data = arrivals.announce([A, B]) + arrivals.announce() + arrivals.finish()
    for start in range(0, len(data), 7):
        os.write(write, data[start : start + 7])
    waiting.until([A, B], lambda _: False)
    os.close(write)
    listening.join()
    os.close(read)


def test_nothing_is_awaited_where_all_is_there() -> None:
    run = run_of(A)
    assert list(Arrivals.none().as_they_come([run], lambda _: False)) == [run]
