"""The roster: every agent that has joined, and the way to ask them.

Belongs to the coordinator. An agent that does not answer any more is forgotten; it joins again when it can.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from distributed.comm import get_address_host, get_address_host_port

logger = logging.getLogger("envship.roster")

IDENTIFY_TIMEOUT_S = 10.0
"""An agent that does not even say who it is for so long counts as gone."""
PROBE_INTERVAL_S = 0.5
"""After so long without a connection it is looked whether anybody listens there at all."""


class Gone(Exception):
    """The agent that was asked is not there any more; its workers are not, either."""


class Refused(Exception):
    """An agent answered with an error; *kind* is the name of its class."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class Roster:
    """The agents of the cluster of *scheduler*, by address; the scheduler's own is always among them."""

    def __init__(self, scheduler: Any) -> None:
        self.members: dict[str, dict[str, Any]] = {}
        self._scheduler = scheduler

    def add(self, identity: dict[str, Any]) -> None:
        """An agent joined, or says anew who it is."""
        self.members[identity["address"]] = identity

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.members))

    async def agents(self) -> dict[str, dict[str, Any]]:
        """Every agent that answers, asked anew; others are forgotten."""
        # Workers that are registered, too: one whose agent was taken for gone a moment ago says that it is there.
        registered = [worker.nanny or worker.address for worker in self._scheduler.workers.values()]
        addresses = list(dict.fromkeys([*self.members, *registered, self._scheduler.address]))
        answers = await asyncio.gather(
            *(asyncio.wait_for(self.ask(a, "envship_identify"), IDENTIFY_TIMEOUT_S) for a in addresses),
            return_exceptions=True,
        )
        for address, answer in zip(addresses, answers):
            if isinstance(answer, (Gone, asyncio.TimeoutError)):
                self.members.pop(address, None)
            elif not isinstance(answer, BaseException):
                self.members[address] = answer
        return dict(self.members)

    def strangers(self, agents: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Workers that none of *agents* answers for."""
        return [w.address for w in self._scheduler.workers.values() if (w.nanny or w.address) not in agents]

    def names(self, address: str) -> list[str]:
        """What the user may call the agent at *address*: its machine, and its workers with their resources."""
        names = [self.members.get(address, {}).get("hostname", ""), get_address_host(address)]
        for worker in self._scheduler.workers.values():
            if (worker.nanny or worker.address) == address:
                names += [str(worker.name), *map(str, worker.resources)]
        return names

    async def ask(self, address: str, operation: str, **arguments: Any) -> Any:
        """The answer of the agent at *address*.

        Raises
        ------
        Gone
            If it cannot be reached.
        Refused
            If it answers with an error.
        """
        try:
            if address == self._scheduler.address:
                answer = await self._scheduler.handlers[operation](**arguments)
            else:
                await self._reach(address)
                answer = await getattr(self._scheduler.rpc(address), operation)(**arguments)
        except OSError as error:
            raise Gone(f"{address} does not answer: {error}") from error
        if "error" in answer:
            raise Refused(answer["error"], answer["type"])
        return answer["ok"]

    async def _reach(self, address: str) -> None:
        """Have a connection ready. Dask goes on trying for half a minute where nobody listens any more."""
        pool = self._scheduler.rpc
        connecting = asyncio.ensure_future(pool.connect(address))

        def keep(done: asyncio.Future[Any]) -> None:
            # Also one that is made in the moment in which nobody waits for it any more.
            if not done.cancelled() and done.exception() is None:
                pool.reuse(address, done.result())

        connecting.add_done_callback(keep)
        try:
            while not (await asyncio.wait({connecting}, timeout=PROBE_INTERVAL_S))[0]:
                if await _refused(address):
                    raise Gone(f"nobody listens at {address} any more")
            connecting.result()
        finally:
            connecting.cancel()

    async def ask_quietly(self, address: str, operation: str, **arguments: Any) -> Any:
        """The answer, or None where there is none; for what may fail without harm."""
        try:
            return await self.ask(address, operation, **arguments)
        except (Gone, Refused) as error:
            logger.info("%s at %s: %s", operation, address, error)
            return None


async def _refused(address: str) -> bool:
    """Whether the machine is there, and no process listens at *address*. False where that cannot be told."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(*get_address_host_port(address)), PROBE_INTERVAL_S)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError, asyncio.TimeoutError):
        return False
    writer.close()
    return False
