"""Chunks through the scheduler, for clients that cannot connect to the agents themselves.

A firewall, or a network of the cluster's own: what a client sends to an agent then goes to the scheduler, which passes
it on at once and keeps nothing. In its memory are only the messages that are on their way: of each client that uploads
six at a time (`worker_bootstrap.transfer.UPLOADS`), of 16 MiB at most.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any

from distributed.core import ConnectionPool

from worker_bootstrap.chunk_service import TIMEOUT_S, PeerChunks
from worker_bootstrap.courtesy import Pace, step_back
from worker_bootstrap.errors import TransferError
from worker_bootstrap.wire import Mark, call

RELAYED = ("envship_put_chunks", "envship_has_chunks")
"""What a client needs of agents to upload; nothing else is passed on."""


class Relay:
    """The scheduler's end. Its connections are its own, marked as bulk.

    Parameters
    ----------
    connection_args
        Those of the scheduler's own connections (``scheduler.rpc.connection_args``).
    members
        Addresses of agents; nothing is passed on to anybody else.
    """

    def __init__(self, connection_args: Mapping[str, Any], members: Container[str]) -> None:
        self._pool = ConnectionPool(connection_args=connection_args)
        self._members = members

    def handlers(self) -> dict[str, Callable[..., Awaitable[dict[str, Any]]]]:
        """Operation names and their handlers."""
        return {"envship_relay": self.relay}

    async def relay(self, address: str, operation: str, message: Any) -> dict[str, Any]:
        """Call a chunk operation of the agent at *address*; answer what it answers, or what went wrong."""
        if address not in self._members or operation not in RELAYED:
            return {"status": "error", "text": f"{operation} is not passed on to {address}"}
        await self._pool.start()
        try:
            return await call(self._pool, address, operation, message, timeout_s=TIMEOUT_S, mark=_step_back)
        except TransferError as error:
            return {"status": "error", "text": str(error)}

    async def close(self) -> None:
        """Close its connections."""
        await self._pool.close()


class RelayedChunks(PeerChunks):
    """The client's end: the chunk operations of agents, by way of the scheduler at *scheduler*."""

    def __init__(self, pool: Any, scheduler: str, timeout_s: float = TIMEOUT_S, *, sending: Pace | None = None) -> None:
        super().__init__(pool, timeout_s, sending=sending)
        self._scheduler = scheduler

    async def _call(self, address: str, op: str, message: dict[str, Any], mark: Mark = None) -> dict[str, Any]:
        around = {"address": address, "operation": op, "message": message}
        try:
            return await call(
                self._pool, self._scheduler, "envship_relay", around, timeout_s=self._timeout_s, mark=mark
            )
        except TransferError as error:
            raise TransferError(address, f"by way of the scheduler: {error.reason}") from error


def _step_back(comm: Any) -> None:
    step_back(comm, None)
