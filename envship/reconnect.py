"""Bringing a client back to a scheduler that was re-executed, at once.

`distributed.Client` reconnects by itself, but sleeps in a random back-off of up to a second between two attempts; a
scheduler is back in a third of that. So the port is watched here, and when it answers, Dask's next attempt is begun at
once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from distributed import Client

from worker_bootstrap.errors import SchedulerLost
from worker_bootstrap.reexec import dialled

INTERVAL_S = 0.01
TIMEOUT_S = 60.0

_LISTENING_TASKS = ("_handle_report_task", "_handle_scheduler_coroutine")
"""Names, newest first, of the attribute in which a client keeps the task that listens and reconnects."""


async def until_listening(address: str, timeout_s: float) -> None:
    """Wait until something listens at *address* again.

    Raises
    ------
    SchedulerLost
        If nothing does within *timeout_s*.
    """
    host, port = dialled(address)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return
        await asyncio.sleep(INTERVAL_S)
    raise SchedulerLost(address, f"nothing has listened there for {timeout_s:.0f} s")


async def reconnect(client: Client) -> None:
    """Connect *client* again, if it lost its scheduler; it is usable when this returns.

    Raises
    ------
    SchedulerLost
        If it is not connected within a minute.
    """
    name = next((name for name in _LISTENING_TASKS if getattr(client, name, None) is not None), None)
    deadline = time.monotonic() + TIMEOUT_S
    while client.status == "connecting":
        if time.monotonic() > deadline:
            raise SchedulerLost(client.scheduler.address, f"this client has tried for {TIMEOUT_S:.0f} s")
        if name is not None and _backs_off(getattr(client, name)):
            await _end(getattr(client, name))
            with suppress(OSError):  # it is gone again: the next round tries once more
                await client._ensure_connected(timeout=TIMEOUT_S)
                setattr(client, name, asyncio.ensure_future(client._handle_report()))
        if client.status == "connecting":
            await asyncio.sleep(INTERVAL_S)


def _backs_off(listening: asyncio.Task[None]) -> bool:
    """Whether Dask is between two attempts, or has none: within one, it may have a connection that would be lost."""
    waiting: Any = listening.get_coro()
    while waiting is not None and getattr(waiting, "cr_code", None) is not asyncio.sleep.__code__:
        waiting = getattr(waiting, "cr_await", None)
    return waiting is not None or listening.done()


async def _end(listening: asyncio.Task[None]) -> None:
    """Cancel the task in which the client waits; Dask would log that as an error."""
    logger = logging.getLogger("distributed.client")
    logger.addFilter(_is_no_cancellation)
    try:
        listening.cancel()
        await asyncio.wait([listening])
    finally:
        logger.removeFilter(_is_no_cancellation)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)
