"""What keeps the network free for tasks while chunks move: a rate that is not exceeded, and a lower priority.

A limit holds for each direction of a host by itself. The kernel spreads a message over time where it can
(``SO_MAX_PACING_RATE``), so that the limit is one in every tenth of a second, too, and not of the mean alone. Chunks
travel on connections of their own, marked as bulk: for the queues of this machine (``SO_PRIORITY``), and for switches
and routers that look at it (DSCP CS1).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any

import dask.config

from worker_bootstrap.errors import SettingInvalid
from worker_bootstrap.sizes import parse_size

SO_MAX_PACING_RATE = 47
"""Linux; the socket module has no name for it (asm-generic/socket.h)."""
PRIORITY_BULK = 2
"""TC_PRIO_BULK (linux/pkt_sched.h): the last band of the kernel's default queue."""
DSCP_CS1 = 8 << 2
"""Lower effort, as a byte of the header. Source: RFC 4594, section 4.8."""
UNLIMITED = (1 << 32) - 1


class Pace:
    """A number of bytes per second, and when the next ones may go.

    Parameters
    ----------
    rate
        Bytes per second; None is as fast as it goes. May be changed at any time.
    clock, sleep
        Seconds, and waiting for some.

    Notes
    -----
    For one event loop. Whoever comes first goes first.
    """

    def __init__(
        self,
        rate: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._free_s = 0.0

    async def spend(self, size_bytes: int, at_most_s: float = math.inf) -> None:
        """Wait until *size_bytes* more may go, but at most *at_most_s*; whoever comes next waits for the rest."""
        if not self.rate:
            return
        now_s = self._clock()
        begin_s = max(now_s, self._free_s)
        self._free_s = begin_s + size_bytes / self.rate
        if begin_s > now_s:
            await self._sleep(min(begin_s - now_s, at_most_s))


def own_rate() -> float | None:
    """The limit that this machine's configuration sets, in bytes per second: ``envship.rate-limit``.

    Raises
    ------
    SettingInvalid
        If it is not a size over 0.
    """
    value = dask.config.get("envship.rate-limit", default=None)
    if value is None:
        return None
    try:
        rate = float(parse_size(value))
    except ValueError as error:
        raise SettingInvalid("rate-limit", value, "bytes per second such as '50 MB', or null") from error
    if not rate > 0:
        raise SettingInvalid("rate-limit", value, "over 0 bytes per second, or null")
    return rate


def slower_of(*rates: float | None) -> float | None:
    """The lowest of several limits; None is none."""
    return min((rate for rate in rates if rate), default=None)


def step_back(comm: Any, rate: float | None) -> None:
    """Mark the connection *comm* as bulk, and pace what this side sends over it. Does what the system allows."""
    stream = getattr(comm, "stream", None)
    connection = getattr(stream, "socket", None)
    if connection is None:
        return
    pacing = UNLIMITED if rate is None else max(1, min(int(rate), UNLIMITED - 1))
    options = [(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("I", pacing))]
    if connection.family == socket.AF_INET6:
        options.append((socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("i", DSCP_CS1)))
    else:
        options.append((socket.IPPROTO_IP, socket.IP_TOS, struct.pack("i", DSCP_CS1)))
    if hasattr(socket, "SO_PRIORITY"):  # after the mark, which sets a priority of its own
        options.append((socket.SOL_SOCKET, socket.SO_PRIORITY, struct.pack("i", PRIORITY_BULK)))
    for level, name, value in options:
        with contextlib.suppress(OSError):
            connection.setsockopt(level, name, value)
