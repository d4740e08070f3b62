"""The standbys of one nanny.

One is *prepared* for the swap that is under way, one *expected* to be prepared in a moment, and *parked* ones are of
environments left a moment ago.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from typing import Any, Callable, Optional

import psutil

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import EnvshipError, StartError
from worker_bootstrap.memory import used_percent
from worker_bootstrap.standby import Standby

logger = logging.getLogger("envship.nanny")

MEMORY_PRESSURE_PERCENT = 90.0
"""Parked standbys are given up when this much of the memory is used, of the machine or of the container."""
MEMORY_CHECK_INTERVAL_S = 5.0
EXPECTED_TIMEOUT_S = 10.0
"""An expected standby that nobody has asked for by then is given up: the client was wrong, or is gone."""

Name = Optional[EnvironmentId]
"""None is the base environment."""


class StandbyPool:
    """Standbys by the environment that they run in.

    Parameters
    ----------
    start
        Starts one of an environment.
    in_background
        Runs a coroutine that nobody waits for.
    is_current
        Whether a standby is what *start* would start now. One that is not is never handed out.
    """

    def __init__(
        self,
        start: Callable[[Name], Awaitable[Standby]],
        in_background: Callable[[Any], asyncio.Task[Any]],
        is_current: Callable[[Standby], bool],
    ) -> None:
        self._start = start
        self._in_background = in_background
        self._is_current = is_current
        self._parked: OrderedDict[Name, Standby] = OrderedDict()
        self._prepared: dict[Name, Standby] = {}
        self._expected: _Expected | None = None
        self._preparing = 0
        self._starting: set[Name] = set()
        self._watcher: asyncio.Task[Any] | None = None

    async def expect(self, name: Name) -> None:
        """Start a standby of *name*, and no other one, before it is asked for; end it if that does not happen in time.

        One that does not get ready says so when it is asked for.
        """
        known = {*self._parked, *self._prepared, *([self._expected.name] if self._expected else [])}
        if self._preparing or name in known or _memory_is_short():
            return
        former, self._expected = self._expected, _Expected(name, self._start(name))
        mine = self._expected
        if former is not None:
            await former.end()
        await mine.settled()
        await asyncio.sleep(EXPECTED_TIMEOUT_S)
        if self._expected is mine:
            await self.expect_nothing()

    async def expect_nothing(self) -> None:
        """End what was started because it was expected, and nobody has asked for."""
        expected, self._expected = self._expected, None
        if expected is not None:
            await expected.end()

    async def prepare(self, name: Name) -> Standby:
        """Have a standby of *name* for `take`, and of no other environment.

        Raises
        ------
        StartError
            If it does not start.
        """
        self._preparing += 1
        try:
            return await self._prepare(name)
        finally:
            self._preparing -= 1

    def take(self, name: Name) -> Standby | None:
        """The prepared standby of *name*, which belongs to the caller now; None if there is none that is current."""
        standby = self._prepared.pop(name, None)
        if standby is not None and not self._is_current(standby):
            self._in_background(standby.discard())
            return None
        return standby

    async def discard(self, name: Name) -> None:
        """End every standby of *name*, and the one that is being started to be parked."""
        self._starting.discard(name)
        if self._expected is not None and self._expected.name == name:
            await self.expect_nothing()
        for standby in (self._prepared.pop(name, None), self._parked.pop(name, None)):
            if standby is not None:
                await standby.discard()

    async def park(self, name: Name, keep: int) -> None:
        """Keep a standby of *name*, unless memory is short, and in all not more than *keep* parked ones."""
        if keep > 0 and name not in self._parked.keys() | self._starting and not _memory_is_short():
            self._starting.add(name)
            try:
                standby = await self._start(name)
            finally:
                is_wanted = name in self._starting
                self._starting.discard(name)
            if not is_wanted:
                await standby.discard()
                return
            self._parked[name] = standby
            if self._watcher is None or self._watcher.done():
                self._watcher = self._in_background(self._watch_memory())
        while len(self._parked) > keep:
            _, standby = self._parked.popitem(last=False)
            await standby.discard()

    @property
    def parked(self) -> Mapping[Name, Standby]:
        """The parked standbys that live."""
        return {name: standby for name, standby in self._parked.items() if standby.alive}

    @property
    def parked_bytes(self) -> int:
        """Their resident memory."""
        return sum(_resident_bytes(standby.pid) for standby in self.parked.values())

    async def close(self) -> None:
        """End them all."""
        self._starting.clear()
        await self.expect_nothing()
        for standby in [*self._parked.values(), *self._prepared.values()]:
            await standby.discard()

    async def _prepare(self, name: Name) -> Standby:
        self._starting.discard(name)  # to be parked: it was left a moment ago, and is not any more
        standby = self._parked.pop(name, None) or self._prepared.pop(name, None)
        if standby is None and self._expected is not None and self._expected.name == name:
            expected, self._expected = self._expected, None
            standby = await expected.claim()
        await self.expect_nothing()
        if standby is not None and not (standby.alive and self._is_current(standby)):
            await standby.discard()
            standby = None
        if standby is None:
            standby = await self._start(name)
        abandoned, self._prepared = self._prepared, {name: standby}
        for other in abandoned.values():
            await other.discard()
        return standby

    async def _watch_memory(self) -> None:
        while self._parked:
            await asyncio.sleep(MEMORY_CHECK_INTERVAL_S)
            if self._parked and _memory_is_short():
                name, standby = self._parked.popitem(last=False)
                logger.info("memory is short: the parked standby of environment %s is given up", name or "base")
                await standby.discard()


class _Expected:
    """A standby of *name* that is being started, or was, and nobody has asked for yet: `claim` it, or `end` it."""

    def __init__(self, name: Name, start: Awaitable[Standby]) -> None:
        self.name = name
        self._task = asyncio.ensure_future(start)

    async def settled(self) -> None:
        """Wait until it has started, or has not."""
        await asyncio.wait({self._task})

    async def claim(self) -> Standby | None:
        """The standby, which is the caller's; None if it could not even be started: what it lacked may be there by now.

        Raises
        ------
        StartError
            If it did not get ready.
        """
        try:
            return await self._task
        except StartError:
            raise
        except (EnvshipError, OSError):
            return None
        except asyncio.CancelledError:
            await self.end()
            raise

    async def end(self) -> None:
        """End the process, however far it is."""
        self._task.cancel()
        with contextlib.suppress(EnvshipError, OSError, asyncio.CancelledError):
            await (await self._task).discard()


def _memory_is_short() -> bool:
    return used_percent() > MEMORY_PRESSURE_PERCENT


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
