"""The road: messages with chunks from a client to agents, straight, or through the scheduler to those out of reach."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from distributed import Client
from distributed.core import ConnectionPool

from worker_bootstrap.chunk_service import EncodedChunk, Held, PeerChunks
from worker_bootstrap.courtesy import Pace
from worker_bootstrap.digest import Digest
from worker_bootstrap.relay import RelayedChunks

CONNECT_TIMEOUT_S = 5.0


class Road:
    """How *client* uploads; for use as ``async with``, which closes its connections.

    They are its own: what is marked as bulk must not carry the client's other messages.

    Parameters
    ----------
    client
        Whose security and scheduler are used.
    timeout_s
        A message must be through in this time.
    rate
        Bytes per second that may be sent; None is as fast as it goes.
    """

    def __init__(self, client: Client, timeout_s: float, rate: float | None = None) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._sending = Pace(rate)
        self._reached: dict[str, bool] = {}

    async def __aenter__(self) -> Road:
        self._pool = await ConnectionPool(connection_args=self._client.rpc.connection_args)
        scheduler = self._client.scheduler.address
        self._straight = PeerChunks(self._pool, self._timeout_s, sending=self._sending)
        self._relayed = RelayedChunks(self._pool, scheduler, self._timeout_s, sending=self._sending)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._pool.close()

    async def explore(self, addresses: Collection[str]) -> None:
        """Find out which of *addresses* this machine can connect to."""
        await asyncio.gather(*(self._explore(address) for address in sorted(set(addresses))))

    async def held(self, address: str, digests: Sequence[Digest]) -> Held:
        """Which of *digests* the agent holds, and the codecs that it can decode; raises as `PeerChunks.held`."""
        return await self._to(address).held(address, digests)

    async def put(self, address: str, chunks: Sequence[EncodedChunk]) -> list[Digest]:
        """Send *chunks*; returns those that the agent kept. Raises as `PeerChunks.put`."""
        return await self._to(address).put(address, chunks)

    def _to(self, address: str) -> PeerChunks:
        return self._straight if self._reached[address] else self._relayed

    async def _explore(self, address: str) -> None:
        try:
            comm = await self._pool.connect(address, timeout=CONNECT_TIMEOUT_S)
        except OSError:
            self._reached[address] = False
        else:
            self._pool.reuse(address, comm)
            self._reached[address] = True
