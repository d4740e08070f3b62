"""A client gets back to its scheduler, whatever Dask's own attempt is at just then."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from distributed import Client, Scheduler

from envship.reconnect import reconnect

SCHEDULER = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}


@contextlib.asynccontextmanager
async def left_alone() -> AsyncIterator[tuple[Client, int]]:
    """A client whose scheduler has gone, and the port where that listened."""
    scheduler = await Scheduler(**SCHEDULER)
    async with Client(scheduler.address, asynchronous=True, set_as_default=False) as client:
        await scheduler.close()
        yield client, scheduler.port


def test_an_attempt_that_has_a_connection_is_not_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    """The connection would be left to the collector, and Dask warns of that."""

    async def main() -> None:
        asked, answer = asyncio.Event(), asyncio.Event()
        async with left_alone() as (client, port):
            successor = Scheduler(**SCHEDULER, port=port)
            identity = successor.handlers["identity"]

            async def slow_identity(**arguments: Any) -> Any:
                asked.set()
                await answer.wait()
                return identity(**arguments)

            successor.handlers["identity"] = slow_identity
            async with successor:
                await asyncio.wait_for(asked.wait(), 30)
                coming_back = asyncio.ensure_future(reconnect(client))
                await asyncio.sleep(0)  # until it has had its first look
                answer.set()
                await asyncio.wait_for(coming_back, 30)
                assert client.status == "running"
                gc.collect()
                assert caplog.messages == []

    with caplog.at_level(logging.WARNING, "distributed"):
        asyncio.run(main())


def test_a_connection_that_breaks_at_once_is_made_again() -> None:
    """As it does where a scheduler ends that has just begun to listen."""

    async def main() -> None:
        accepted = asyncio.Event()

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()
            accepted.set()

        async with left_alone() as (client, port):
            coming_back = asyncio.ensure_future(reconnect(client))
            async with await asyncio.start_server(hang_up, "127.0.0.1", port):
                await asyncio.wait_for(accepted.wait(), 30)
            async with Scheduler(**SCHEDULER, port=port):
                await asyncio.wait_for(coming_back, 30)
                assert client.status == "running"

    asyncio.run(main())
