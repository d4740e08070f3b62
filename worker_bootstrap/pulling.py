"""Who reads what from a place that several hosts see, so that nobody uploads it and each chunk is read once.

Belongs to the exchange. Hosts that read share out the chunks as if a client had uploaded them, in turn; what one does
not get is no longer promised, and comes from the client after all. See `worker_bootstrap.shared`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from worker_bootstrap.assignments import Upload
from worker_bootstrap.bundle_index import CODECS
from worker_bootstrap.digest import Digest
from worker_bootstrap.ledger import SHARED, Ledger
from worker_bootstrap.roster import Gone, Refused, Roster
from worker_bootstrap.tracker import Tracker

logger = logging.getLogger("envship.pulling")

LOOK_TIMEOUT_S = 20.0
"""A network mount that ails can make whoever looks at it wait for ever."""
PULL_TIMEOUT_S = 120.0
"""So long a host may take to read one batch, 16 MiB at most."""
UNREAD_S = 300.0
"""So long nobody is told to read where a host could not: what is damaged there is so for all, and the client has it."""
PARALLEL = 2
"""Batches that one host reads at the same time."""


class Pulling:
    """Reads by the hosts of *roster* from the places that clients name.

    Parameters
    ----------
    stir
        Called when chunks have arrived, or will not.
    log
        Called with a stage and what there is to say of it.
    """

    def __init__(
        self,
        roster: Roster,
        tracker: Tracker,
        ledger: Ledger,
        stir: Callable[[], None],
        log: Callable[..., None],
    ) -> None:
        self._roster = roster
        self._tracker = tracker
        self._ledger = ledger
        self._stir = stir
        self._log = log
        self._unread: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(
        self,
        place: Sequence[str],
        extents: Mapping[Digest, Sequence[int]] | None,
        absent: Sequence[Digest],
        hosts: Mapping[str, str],
    ) -> list[Digest]:
        """Have hosts that see *place* read what is *absent* and there; returns the rest, which the client must bring.

        Only hosts that can decode all of it are asked.

        Parameters
        ----------
        place
            Kind, path or URL, and mark: a `worker_bootstrap.shared.Place`.
        extents
            Where in a bundle each chunk lies; None: the place is a store that holds whatever is absent.
        absent
            Chunks that no host holds.
        hosts
            Host ids and, of each, an agent's address.
        """
        there = [digest for digest in absent if extents is None or digest in extents]
        if not there or self._unread.get(place[1], 0.0) > time.monotonic():
            return list(absent)
        seeing = await asyncio.gather(*(self._look(address, place) for address in hosts.values()))
        # What lies in a store may be anything that a client's store keeps.
        codecs = {CODECS[extents[digest][1]] for digest in there} if extents else set(CODECS)
        addresses = [a for a, sees in zip(hosts.values(), seeing) if sees and codecs <= self._codecs_of(a)]
        if not addresses:
            return list(absent)
        self._log("reading", place=place[1], hosts=len(addresses), chunks=len(there))
        others = [a for host in self._tracker.hosts().values() for a in host if a not in addresses]
        plans: dict[str, list[Upload]] = {}
        for upload in self._tracker.plan_uploads(there, others):
            plans.setdefault(upload.address, []).append(upload)
        for address, uploads in plans.items():
            promise = f"{place[1]} read by {address}"
            self._tracker.promise(promise, [digest for upload in uploads for digest in upload.digests])
            task = asyncio.ensure_future(self._read_all(address, place, extents, uploads, promise))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        kept = set(there)
        return [digest for digest in absent if digest not in kept]

    async def survey(self, address: str, where: str) -> dict[str, Any] | None:
        """What the host of the agent at *address* finds in a bundle at *where*; None if it finds none."""
        try:
            work = self._roster.ask_quietly(address, "envship_survey", where=where)
            found: dict[str, Any] | None = await asyncio.wait_for(work, PULL_TIMEOUT_S)
        except asyncio.TimeoutError:
            return None
        return found

    async def close(self) -> None:
        """Ask for no more."""
        for task in self._tasks:
            task.cancel()

    def _codecs_of(self, address: str) -> set[str]:
        """What the host of the agent at *address* can decode: not zstd, where ``zstandard`` is not installed."""
        return set(self._roster.members.get(address, {}).get("codecs", ()))

    async def _look(self, address: str, place: Sequence[str]) -> bool:
        look = self._roster.ask_quietly(address, "envship_sees", place=list(place))
        try:
            return bool(await asyncio.wait_for(look, LOOK_TIMEOUT_S))
        except asyncio.TimeoutError:
            logger.warning("%s did not say within %g s whether it sees %s", address, LOOK_TIMEOUT_S, place[1])
            return False

    async def _read_all(
        self,
        address: str,
        place: Sequence[str],
        extents: Mapping[Digest, Sequence[int]] | None,
        uploads: Sequence[Upload],
        promise: str,
    ) -> None:
        pending = iter(uploads)

        async def work() -> None:
            for upload in pending:
                await self._read(address, place, extents, upload)

        try:
            await asyncio.gather(*(work() for _ in range(PARALLEL)))
        except (Gone, Refused, OSError, asyncio.TimeoutError) as error:
            logger.warning("%s does not get chunks from %s: %s", address, place[1], str(error) or repr(error))
            self._unread[place[1]] = time.monotonic() + UNREAD_S
        finally:
            self._tracker.withdraw(promise)
            self._stir()

    async def _read(
        self, address: str, place: Sequence[str], extents: Mapping[Digest, Sequence[int]] | None, upload: Upload
    ) -> None:
        chunks = {digest: list(extents[digest]) if extents else [0, 0, 0] for digest in upload.digests}
        work = self._roster.ask(address, "envship_pull", place=list(place), chunks=chunks)
        answer: dict[str, Any] = await asyncio.wait_for(work, PULL_TIMEOUT_S)
        host_id = self._roster.members[address]["host_id"]
        self._tracker.received(host_id, answer["received"])
        self._ledger.moved(host_id, SHARED, answer["size_bytes"])
        self._stir()
        if answer["reason"]:
            raise OSError(answer["reason"])
