"""Chunks between real stores over real comms: fetched, uploaded, cancelled, on a full disk, with slow peers."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from distributed.security import Security

from worker_bootstrap import codec, transfer, wire
from worker_bootstrap.assignments import Batch, Upload
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.errors import ChunkMissing, StoreFull, TransferError
from worker_bootstrap.store import Store
from worker_bootstrap.transfer import ChunkServer, EncodedChunk, Held, Outbox, Outcome, upload_chunks

from .fetching import exchange, new_tracker
from .peers import Peer, damage, filled, tls


@pytest.mark.parametrize("security", [None, tls()], ids=["tcp", "tls"])
@pytest.mark.parametrize("deserialize", [True, False], ids=["worker", "scheduler"])
def test_a_host_fetches_everything_and_the_client_uploads_it_once(
    tmp_path: Path, security: Security | None, deserialize: bool
) -> None:
    """Client to one agent, agent to agent; also where the server does not deserialise, as the scheduler."""
    source, needed = filled(tmp_path / "client")
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    sent: list[Digest] = []

    async def main() -> None:
        tracker = new_tracker()
        serving = ChunkServer(first, on_received=lambda digests: tracker.received(first.host_id, digests))
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(Peer({}, security))
            receiver = await stack.enter_async_context(Peer({}, security))
            agent = await stack.enter_async_context(Peer(serving.handlers(), security, deserialize))
            tracker.add_host(first.host_id, agent.address)
            peers = client.chunks()

            async def put(address: str, chunks: Sequence[EncodedChunk]) -> Sequence[Digest]:
                sent.extend(chunk.digest for chunk in chunks)
                return await peers.put(address, chunks)

            async def report(outcome: Outcome) -> None:
                assert outcome.size_bytes > 0

            plan = tracker.plan_uploads(tracker.absent(needed))
            assert not await upload_chunks(source, plan, held=peers.held, put=put, report=report)
            assert tracker.absent(needed) == []
            tracker.add_host(second.host_id, receiver.address)
            tracker.want(second.host_id, needed)
            await exchange(tracker, second, receiver.chunks().get)

    asyncio.run(main())
    assert sorted(sent) == sorted(needed)
    for store in (first, second):
        assert [digest_of(store.read_chunk(digest)) for digest in needed] == list(needed)


def test_chunks_are_transcoded_for_a_peer_without_zstd(tmp_path: Path) -> None:
    store = Store(tmp_path)
    data = b"compresses well " * 1000
    digest = store.write_chunk(data)

    async def main() -> None:
        reply = await ChunkServer(store).get_chunks(None, [digest], ["zlib", "raw"])
        [(name, codec_name, payload)] = reply["chunks"]
        assert (name, codec_name) == (digest, "zlib")
        assert codec.decode(bytes(wire.payload_of(payload)), codec_name, len(data)) == data

    asyncio.run(main())


def test_an_upload_skips_what_the_peer_holds(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "client", count=4)
    there = list(needed)[:3]
    sent: list[Digest] = []
    told: list[Digest] = []

    async def main() -> list[Digest]:
        async def held(address: str, digests: Sequence[Digest]) -> Held:
            return Held(tuple(there), ("raw",))

        async def put(address: str, chunks: Sequence[EncodedChunk]) -> Sequence[Digest]:
            sent.extend(chunk.digest for chunk in chunks)
            assert {chunk.codec for chunk in chunks} == {"raw"}, "the peer decodes nothing else"
            return sent

        async def report(outcome: Outcome) -> None:
            told.extend(outcome.received)

        return await upload_chunks(source, [Upload("tcp://a:1", tuple(needed))], held=held, put=put, report=report)

    assert asyncio.run(main()) == []
    assert sent == list(needed)[3:]
    assert sorted(told) == sorted(needed)


def test_an_upload_to_a_dead_peer_is_handed_back(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "client", count=4)
    outcomes: list[Outcome] = []

    async def main() -> list[Digest]:
        async def held(address: str, digests: Sequence[Digest]) -> Held:
            return Held((), codec.available())

        async def put(address: str, chunks: Sequence[EncodedChunk]) -> Sequence[Digest]:
            if address == "tcp://dead:1":
                raise TransferError(address, "gone")
            return [chunk.digest for chunk in chunks]

        async def report(outcome: Outcome) -> None:
            outcomes.append(outcome)

        digests = list(needed)
        plan = [Upload("tcp://dead:1", tuple(digests[:2])), Upload("tcp://b:1", tuple(digests[2:]))]
        return await upload_chunks(source, plan, held=held, put=put, report=report)

    rest = asyncio.run(main())
    assert next(iter(needed)) in rest, "it was the first that the dead one was sent"
    arrived = [digest for outcome in outcomes for digest in outcome.received]
    assert sorted([*rest, *arrived]) == sorted(needed)
    assert {outcome.source: outcome.fault for outcome in outcomes} == {"tcp://dead:1": "silent", "tcp://b:1": ""}


def test_uploads_are_halved_as_long_as_they_take_long() -> None:
    """And as long as nothing is known of the road, because none has arrived."""
    digests = [digest_of(bytes([number])) for number in range(16)]
    outbox = Outbox([Upload(f"tcp://{name}:1", tuple(digests[n : n + 4])) for name, n in zip("aaba", range(0, 16, 4))])
    sizes, addresses = [], []
    for took_s in (9.0, 9.0, 0.1, 0.1, 0.1, 0.1):
        upload = outbox.take()
        assert upload is not None
        sizes.append(len(upload.digests))
        addresses.append(upload.address)
        outbox.sent(upload.address, took_s)
    assert outbox.take() is None
    assert sizes == [2, 2, 2, 2, 4, 4]
    assert addresses == [f"tcp://{name}:1" for name in "aaaaba"]


def uploaded(source: Store, target: Store, messages: Sequence[Sequence[Digest]]) -> None:
    """Bring chunks from one store into another, over a connection, one message after the other."""

    async def main() -> None:
        async def report(outcome: Outcome) -> None:
            pass

        async with Peer(ChunkServer(target).handlers()) as agent, Peer({}) as client:
            peers = client.chunks()
            plan = [Upload(agent.address, tuple(digests)) for digests in messages]
            await upload_chunks(source, plan, held=peers.held, put=peers.put, report=report, parallel=1)

    asyncio.run(main())


def test_a_chunk_damaged_in_the_clients_store_is_an_error_that_says_so(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "client", count=3)
    bad = list(needed)[-1]
    damage(source, bad)
    target = Store(tmp_path / "agent")
    with pytest.raises(ChunkMissing) as caught:
        uploaded(source, target, [list(needed)])
    assert caught.value.digest == bad
    assert not target.has_chunk(bad)
    assert target.missing(needed) == [bad], "what was not damaged has arrived"


def test_an_upload_that_finds_one_chunk_damaged_looks_at_all(tmp_path: Path) -> None:
    """A power cut damages many: the pack after the error is to find all of them missing, not one at each attempt."""
    source, needed = filled(tmp_path / "client", count=6)
    for digest in list(needed)[1::2]:
        damage(source, digest)
    target = Store(tmp_path / "agent")
    with pytest.raises(ChunkMissing):
        uploaded(source, target, [[digest] for digest in needed])
    assert source.missing(needed) == list(needed)[1::2]


def test_a_wrong_chunk_is_never_kept_and_comes_from_another_peer(tmp_path: Path) -> None:
    liar, needed = filled(tmp_path / "liar", count=6)
    honest = Store(tmp_path / "honest")
    for digest in needed:
        honest.write_chunk(liar.read_chunk(digest))
        damage(liar, digest)
    target = Store(tmp_path / "target")

    async def main() -> list[Outcome]:
        tracker = new_tracker()
        async with Peer(ChunkServer(liar).handlers()) as one, Peer(ChunkServer(honest).handlers()) as other:
            tracker.add_host(liar.host_id, one.address, needed)
            async with Peer({}) as receiver:
                tracker.add_host(target.host_id, receiver.address)
                tracker.want(target.host_id, needed)

                async def get(address: str, digests: Sequence[Digest]) -> Sequence[EncodedChunk]:
                    tracker.add_host(honest.host_id, other.address, needed)  # so that the liar is asked first
                    return await receiver.chunks().get(address, digests)

                outcomes = await exchange(tracker, target, get, parallel=1)
                assert [outcome.source for outcome in outcomes] == [one.address, other.address]
                assert one.address in outcomes[0].reason
                return outcomes

    lie, rest = asyncio.run(main())
    assert lie.fault == "lied"
    assert not lie.received
    assert rest.received
    assert [digest_of(target.read_chunk(digest)) for digest in needed] == list(needed)


def test_a_peer_drops_what_it_sent_damaged(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "source", count=3)
    bad = next(iter(needed))
    damage(source, bad)
    target = Store(tmp_path / "target")

    async def main() -> Outcome:
        async with Peer(ChunkServer(source).handlers()) as agent, Peer({}) as receiver:
            peers = receiver.chunks()
            batch = Batch(agent.address, tuple(needed))
            return await transfer._fetch_batch(target, batch, peers.get, peers.complain)

    outcome = asyncio.run(main())
    assert outcome.failed == (bad,)
    assert outcome.fault == "lied"
    assert source.missing(needed) == [bad], "so that it counts as missing the next time somebody asks"


def test_a_chunk_evicted_meanwhile_is_a_miss_without_blame(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "source", count=3)
    evicted = next(iter(needed))
    target = Store(tmp_path / "target")
    next(iter(source._candidates(evicted)))[0].unlink()

    async def main() -> Outcome:
        async with Peer(ChunkServer(source).handlers()) as agent, Peer({}) as receiver:
            batch = Batch(agent.address, tuple(needed))
            return await transfer._fetch_batch(target, batch, receiver.chunks().get)

    outcome = asyncio.run(main())
    assert outcome.failed == (evicted,)
    assert outcome.fault == "lacks"
    assert len(outcome.received) == 2


def test_a_cancelled_fetch_leaves_nothing_behind_and_can_go_on(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "source")
    target = Store(tmp_path / "target")

    async def main() -> None:
        tracker = new_tracker()
        asked = asyncio.Event()
        async with Peer(ChunkServer(source).handlers()) as agent, Peer({}) as receiver:
            tracker.add_host(source.host_id, agent.address, needed)
            tracker.add_host(target.host_id, receiver.address)
            tracker.want(target.host_id, needed)

            async def stuck(address: str, digests: Sequence[Digest]) -> Sequence[EncodedChunk]:
                asked.set()
                await asyncio.sleep(60)
                return []

            before = asyncio.all_tasks()
            task = asyncio.ensure_future(exchange(tracker, target, stuck))
            await asyncio.wait_for(asked.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asyncio.all_tasks() == before
            tracker.remove_address(receiver.address)
            tracker.add_host(target.host_id, receiver.address)
            tracker.want(target.host_id, needed)
            await exchange(tracker, target, receiver.chunks().get)

    asyncio.run(main())
    assert not target.missing(needed)
    assert not list(target.layout.tmp.iterdir())


def test_a_call_cancelled_in_the_middle_does_not_poison_the_connection(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "source", count=2)
    first, second = needed

    async def main() -> list[EncodedChunk]:
        serve = ChunkServer(source).get_chunks
        entered, released = asyncio.Event(), asyncio.Event()

        async def get_chunks(digests: Any, accept: Any) -> Any:
            if first in digests:
                entered.set()
                await released.wait()
            return await serve(None, digests, accept)

        async with Peer({"envship_get_chunks": get_chunks}) as agent, Peer({}) as receiver:
            task = asyncio.ensure_future(receiver.chunks().get(agent.address, [first]))
            await asyncio.wait_for(entered.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            released.set()
            return await receiver.chunks().get(agent.address, [second])

    [chunk] = asyncio.run(main())
    assert chunk.digest == second


def test_a_full_disk_ends_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, needed = filled(tmp_path / "source")
    target = Store(tmp_path / "target")

    def full(*_: object) -> None:
        raise StoreFull(str(tmp_path), 0, 0)

    monkeypatch.setattr(target, "write_encoded", full)

    async def main() -> None:
        tracker = new_tracker()
        async with Peer(ChunkServer(source).handlers()) as agent, Peer({}) as receiver:
            tracker.add_host(source.host_id, agent.address, needed)
            tracker.add_host(target.host_id, receiver.address)
            tracker.want(target.host_id, needed)
            await exchange(tracker, target, receiver.chunks().get)

    with pytest.raises(StoreFull):
        asyncio.run(main())


def test_a_host_that_refuses_uploads_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, needed = filled(tmp_path / "source", count=1)
    target = Store(tmp_path / "target")

    def full(*_: object) -> None:
        raise StoreFull(str(tmp_path), 0, 0)

    monkeypatch.setattr(target, "write_encoded", full)
    outcomes: list[Outcome] = []

    async def main() -> list[Digest]:
        async def report(outcome: Outcome) -> None:
            outcomes.append(outcome)

        async with Peer(ChunkServer(target).handlers()) as agent, Peer({}) as client:
            peers = client.chunks()
            plan = [Upload(agent.address, tuple(needed))]
            return await upload_chunks(source, plan, held=peers.held, put=peers.put, report=report)

    assert asyncio.run(main()) == list(needed)
    assert "not enough room" in outcomes[0].reason


def test_large_batches_travel_whole(tmp_path: Path) -> None:
    """A batch at its limit, whose chunks do not compress, fits into one reply."""
    source, needed = filled(tmp_path / "source", count=4, size_bytes=4 << 20)
    target = Store(tmp_path / "target")

    async def main() -> Outcome:
        async with Peer(ChunkServer(source).handlers()) as agent, Peer({}) as receiver:
            batch = Batch(agent.address, tuple(needed))
            return await transfer._fetch_batch(target, batch, receiver.chunks().get)

    assert set(asyncio.run(main()).received) == set(needed)


def test_more_than_a_message_is_refused(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "source", count=3, size_bytes=12 << 20)

    async def main() -> None:
        async with Peer(ChunkServer(source).handlers()) as agent, Peer({}) as receiver:
            with pytest.raises(TransferError, match="in one message"):
                await receiver.chunks().get(agent.address, list(needed))
            with pytest.raises(TransferError, match="at most"):
                await receiver.chunks().get(agent.address, [Digest(f"{n:064x}") for n in range(5000)])

    asyncio.run(main())


def test_a_fetch_holds_a_few_batches_in_memory_and_not_the_environment(tmp_path: Path) -> None:
    """Both ends are in this process: three batches that are fetched, and the same ones that are served."""
    source, needed = filled(tmp_path / "source", count=200, size_bytes=1 << 20)
    target = Store(tmp_path / "target")

    async def main() -> int:
        tracker = new_tracker()
        async with Peer(ChunkServer(source).handlers()) as agent, Peer({}) as receiver:
            tracker.add_host(source.host_id, agent.address, needed)
            tracker.add_host(target.host_id, receiver.address)
            tracker.want(target.host_id, needed)
            tracemalloc.start()
            try:
                await exchange(tracker, target, receiver.chunks().get)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    peak_bytes = asyncio.run(main())
    assert not target.missing(needed)
    assert peak_bytes < transfer.PARALLEL * 4 * (5 << 20) < sum(needed.values()) / 2


def test_uploads_go_around_a_host_that_is_slow_to_take_them(tmp_path: Path) -> None:
    source, needed = filled(tmp_path / "client", count=20, size_bytes=1000)
    taken: list[str] = []

    async def main() -> None:
        released = asyncio.Event()

        async def held(address: str, digests: Sequence[Digest]) -> Held:
            return Held((), codec.available())

        async def put(address: str, chunks: Sequence[EncodedChunk]) -> Sequence[Digest]:
            taken.append(address)
            if address == "tcp://slow:1":
                await released.wait()
            await asyncio.sleep(0)
            return [chunk.digest for chunk in chunks]

        async def report(outcome: Outcome) -> None:
            done.append(outcome)
            if len(done) == 19:
                released.set()

        done: list[Outcome] = []
        addresses = ("tcp://slow:1", "tcp://a:1", "tcp://b:1", "tcp://c:1", "tcp://d:1")
        plan = [Upload(addresses[number % 5], (digest,)) for number, digest in enumerate(needed)]
        assert not await upload_chunks(source, plan, held=held, put=put, report=report, parallel=4)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert taken.count("tcp://slow:1") == 1
    assert len(taken) == 20


def test_a_batch_that_takes_too_long_is_given_up_and_its_source_called_silent(tmp_path: Path) -> None:
    target = Store(tmp_path)

    async def main() -> Outcome:
        async def stuck(address: str, digests: Sequence[Digest]) -> Sequence[EncodedChunk]:
            await asyncio.Event().wait()
            return []

        return await transfer._fetch_batch(target, Batch("tcp://slow:1", (Digest("a" * 64),), 0.05), stuck)

    outcome = asyncio.run(main())
    assert outcome.fault == "silent"
    assert "tcp://slow:1" in outcome.reason
