"""Rates that are kept, and connections that step back behind those of tasks."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed.core import Server

from tests.peers import Peer
from worker_bootstrap import codec
from worker_bootstrap.chunk_service import ChunkServer, PeerChunks, read_chunks
from worker_bootstrap.courtesy import DSCP_CS1, PRIORITY_BULK, SO_MAX_PACING_RATE, Pace, own_rate, slower_of
from worker_bootstrap.errors import SettingInvalid
from worker_bootstrap.shared import Place, SharedReader
from worker_bootstrap.store import Store


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_pace_is_kept_in_the_mean_and_the_first_message_goes_at_once() -> None:
    time = Time()
    pace = Pace(1000.0, time, time.sleep)

    async def main() -> list[float]:
        moments = []
        for _ in range(4):
            await pace.spend(500)
            moments.append(time.now_s)
        return moments

    assert asyncio.run(main()) == [0.0, 0.5, 1.0, 1.5]


def test_time_without_messages_is_not_saved_up() -> None:
    time = Time()
    pace = Pace(1000.0, time, time.sleep)

    async def main() -> float:
        await pace.spend(100)
        time.now_s += 60
        await pace.spend(1000)
        await pace.spend(1)
        return time.now_s

    assert asyncio.run(main()) == pytest.approx(61.0)


def test_no_limit_never_waits_and_the_lowest_of_several_counts() -> None:
    time = Time()
    asyncio.run(Pace(None, time, time.sleep).spend(1 << 40))
    assert time.now_s == 0
    assert slower_of(None, 5.0, 3.0) == 3.0
    assert slower_of(None, None) is None


@pytest.mark.parametrize("value", ["fast", "", "MB", 0, True, float("inf"), "-1 MB", []])
def test_a_limit_that_is_none_is_refused(value: object) -> None:
    with dask.config.set({"envship.rate-limit": value}), pytest.raises(SettingInvalid, match="rate-limit"):
        own_rate()


def test_a_machines_own_limit_is_read_from_its_configuration() -> None:
    with dask.config.set({"envship.rate-limit": "50 MB"}):
        assert own_rate() == 50e6


def test_what_is_served_and_what_is_fetched_count_on_their_paces(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digests = [store.write_chunk(os.urandom(100_000)) for _ in range(3)]
    sending, receiving = Time(), Time()

    async def main() -> None:
        slow = ChunkServer(store, sending=Pace(100_000.0, sending, sending.sleep))
        async with Peer(slow.handlers()) as agent, Peer({}) as receiver:
            peers = PeerChunks(receiver.server.rpc, 10.0, receiving=Pace(50_000.0, receiving, receiving.sleep))
            for digest in digests:
                await peers.get(agent.address, [digest])

    asyncio.run(main())
    assert sending.now_s == pytest.approx(2.0, rel=0.01)
    assert receiving.now_s == pytest.approx(4.0, rel=0.01)


def test_what_is_put_here_and_read_from_a_shared_place_count_on_the_pace_of_a_host(tmp_path: Path) -> None:
    """A machine's own limit holds also for what clients upload to it, who know nothing of it."""
    source, target = Store(tmp_path / "source"), Store(tmp_path / "target")
    digests = [source.write_chunk(os.urandom(100_000)) for _ in range(4)]
    time = Time()
    receiving = Pace(50_000.0, time, time.sleep)

    async def main() -> None:
        async with Peer(ChunkServer(target, receiving=receiving).handlers()) as agent, Peer({}) as client:
            for digest in digests[:2]:
                await client.chunks().put(agent.address, read_chunks(source, [digest], codec.accepted()))
        reader = SharedReader(target, lambda arrived: None, receiving)
        for digest in digests[2:]:
            answer = await reader.pull(Place("store", str(source.layout.root), source.host_id), {digest: [0, 0, 0]})
            assert answer["received"] == [digest]

    asyncio.run(main())
    # The first goes at once, each of the others after those before it.
    assert time.now_s == pytest.approx(6.0, rel=0.01)


def test_an_answer_is_not_kept_back_for_ever_and_the_next_waits_for_the_rest() -> None:
    time = Time()
    pace = Pace(1.0, time, time.sleep)

    async def main() -> list[float]:
        moments = []
        for _ in range(3):
            await pace.spend(100, at_most_s=10.0)
            moments.append(time.now_s)
        await pace.spend(1)
        return [*moments, time.now_s]

    assert asyncio.run(main()) == [0.0, 10.0, 20.0, 300.0]


def marks_of(comm: Any) -> tuple[int, int, int]:
    """For the network, for the machine's own queues, and the rate in bytes per second."""
    connection = comm.stream.socket
    return (
        connection.getsockopt(socket.IPPROTO_IP, socket.IP_TOS),
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY),
        connection.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE),
    )


@pytest.mark.skipif(not hasattr(socket, "SO_PRIORITY"), reason="socket priorities are a matter of Linux")
def test_connections_that_carry_chunks_are_marked_and_paced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.write_chunk(b"content")
    seen: list[tuple[int, int, int]] = []

    class Watching(ChunkServer):
        async def get_chunks(self, comm: Any, digests: Any = (), accept: Any = ()) -> dict[str, Any]:
            reply = await super().get_chunks(comm, digests, accept)
            seen.append(marks_of(comm))
            return reply

    async def main() -> None:
        async with Peer(Watching(store, sending=Pace(1e6)).handlers()) as agent, Peer({}) as receiver:
            assert isinstance(agent.server, Server)
            await receiver.chunks().get(agent.address, [digest])

    asyncio.run(main())
    assert seen == [(DSCP_CS1, PRIORITY_BULK, 1_000_000)]


@pytest.mark.skipif(not hasattr(socket, "SO_PRIORITY"), reason="socket priorities are a matter of Linux")
def test_so_are_those_of_a_client_that_uploads(tmp_path: Path) -> None:
    source, target = Store(tmp_path / "source"), Store(tmp_path / "target")
    digest = source.write_chunk(b"content")

    async def main() -> list[tuple[int, int, int]]:
        async with Peer(ChunkServer(target).handlers()) as agent, Peer({}) as client:
            peers = PeerChunks(client.server.rpc, sending=Pace(1e6))
            assert await peers.put(agent.address, read_chunks(source, [digest], codec.accepted())) == [digest]
            return [marks_of(comm) for comm in client.server.rpc.available[agent.address]]

    assert asyncio.run(main()) == [(DSCP_CS1, PRIORITY_BULK, 1_000_000)]
