"""Getting an environment onto a host: fetch what is missing and build, both at once.

Belongs to an agent, and asks the coordinator through it. What to fetch from whom is decided by
`worker_bootstrap.tracker`, the bytes are moved by `worker_bootstrap.transfer`, the prefix is made by
`worker_bootstrap.build`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Collection, Sequence
from pathlib import Path
from typing import Any, Callable

from distributed.core import ConnectionPool

from worker_bootstrap.assignments import Batch, Offer
from worker_bootstrap.build import Arrived, build
from worker_bootstrap.courtesy import Pace, own_rate, slower_of
from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.errors import ChunkInvalid, ChunkMissing, TransferError
from worker_bootstrap.interpreter import python_of
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.store import Store
from worker_bootstrap.transfer import Outcome, PeerChunks, fetch_chunks

logger = logging.getLogger("envship.provision")

Call = Callable[..., Awaitable[Any]]
"""Calls an operation of the coordinator by name, with keyword arguments."""

PROVIDE_ATTEMPTS = 3
"""A chunk that turns out damaged while it is unpacked is dropped and fetched again this often."""
REPORT_INTERVAL_S = 0.2
POOL_LIMIT = 64
"""Connections to peers that are kept open while a host fetches."""


class Provision:
    """What the agent *server* does to have environments in its *store*.

    Parameters
    ----------
    server
        The nanny, worker or scheduler.
    store
        The writable store of this host.
    code
        Folder that holds this package, for subprocesses.
    call
        Calls the coordinator.
    """

    def __init__(self, server: Any, store: Store, code: str, call: Call) -> None:
        self._server = server
        self._store = store
        self._code = code
        self._call = call
        self.sending, self.receiving = Pace(own_rate()), Pace(own_rate())
        self._under_way: dict[EnvironmentId, asyncio.Task[dict[str, Any]]] = {}
        self._dropped: dict[EnvironmentId, frozenset[Digest]] = {}
        self._listeners: dict[Arrived, None] = {}
        self._reports: set[asyncio.Task[None]] = set()
        self._reported_at = 0.0

    async def provide(
        self, environment_id: EnvironmentId, manifest: bytes | None, link_mode: str, chunks_only: bool = False
    ) -> dict[str, Any]:
        """Fetch what is missing and build; returns the prefix and the seconds that each took.

        With *chunks_only*, nothing is built, and the prefix is None.

        Asked again while it is at it, it waits for what is under way: two clients may want the same environment.

        Raises
        ------
        EnvironmentMissing
            If *manifest* is not given, and this host does not hold it intact. Also where the environment is built:
            its interpreter cannot be started without.
        """
        if manifest is not None:
            await asyncio.to_thread(self._store.write_manifest, Manifest.from_bytes(manifest, environment_id))
        found = await asyncio.to_thread(self._store.read_manifest, environment_id)
        if chunks_only:
            started = time.perf_counter()
            await self._fetch(found, found.chunks, lambda digests: None)
            return {"prefix": None, "seconds": {"fetch": time.perf_counter() - started}}
        task = self._under_way.get(environment_id)
        if task is None:
            task = self._under_way[environment_id] = asyncio.ensure_future(self._provide(environment_id, link_mode))
            task.add_done_callback(lambda done: self._ended(environment_id, done))
        return await asyncio.shield(task)

    def limit(self, rate: float | None) -> None:
        """Send, and receive, no more than *rate* bytes per second, nor more than this machine's own limit."""
        self.sending.rate = self.receiving.rate = slower_of(rate, own_rate())

    def arrived(self, digests: Sequence[Digest]) -> None:
        """Chunks that came without being fetched: a client has uploaded them here."""
        for listener in list(self._listeners):
            listener(digests)

    async def close(self) -> None:
        """End what is under way."""
        for task in [*self._under_way.values(), *self._reports]:
            task.cancel()

    def _ended(self, environment_id: EnvironmentId, task: asyncio.Task[dict[str, Any]]) -> None:
        self._under_way.pop(environment_id, None)
        self._dropped.pop(environment_id, None)
        if not task.cancelled() and task.exception() is not None:  # whoever asked may be gone
            logger.info("environment %s: %s", environment_id[:16], task.exception())

    async def _provide(self, environment_id: EnvironmentId, link_mode: str) -> dict[str, Any]:
        seconds = {"fetch": 0.0, "build": 0.0}
        for attempt in range(1, PROVIDE_ATTEMPTS + 1):
            try:
                built = await asyncio.to_thread(sound_prefix, self._store, environment_id)
                if built is None or not os.access(python_of(built), os.X_OK):
                    built = Path(await self._fetch_and_build(environment_id, link_mode, seconds))
                    await self._report("ready", 0, 0)
                return {"prefix": str(built), "seconds": seconds}
            except (ChunkMissing, ChunkInvalid) as error:
                if attempt == PROVIDE_ATTEMPTS:
                    raise
                logger.warning("environment %s: %s; fetching it again", environment_id[:16], error)
                await asyncio.to_thread(self._drop_damaged, environment_id)
        raise AssertionError("unreachable")

    def _drop_damaged(self, environment_id: EnvironmentId) -> None:
        """Look at every chunk: where one is damaged, after a crash of the machine, others are, and tries are few.

        All had been there, so what is not there now was damaged, or has been evicted.
        """
        from worker_bootstrap.verify import damaged_chunks  # not what every agent needs to start

        manifest = self._store.read_manifest(environment_id)
        for problem in damaged_chunks(self._store, manifest, self._store.missing(manifest.chunks)):
            logger.warning("environment %s: %s", environment_id[:16], problem)
        self._dropped[environment_id] = frozenset(self._store.missing(manifest.chunks))

    async def _fetch_and_build(self, environment_id: EnvironmentId, link_mode: str, seconds: dict[str, float]) -> str:
        manifest = await asyncio.to_thread(self._store.read_manifest, environment_id)
        missing = await asyncio.to_thread(self._store.missing, manifest.chunks)
        started = time.perf_counter()
        fetching = bool(missing)

        async def fetch(arrived: Arrived) -> None:
            nonlocal fetching
            listings = {package.listing.digest for package in manifest.packages}
            # Nothing can be written before all listings are there, so they come first.
            await self._fetch(manifest, listings, arrived)
            await self._fetch(manifest, manifest.chunks, arrived)
            fetching = False
            seconds["fetch"] += time.perf_counter() - started
            await self._report("building", 0, 0)

        def report(done_bytes: int, total_bytes: int) -> None:
            # What has been written says little as long as chunks still come.
            if not fetching and time.monotonic() - self._reported_at > REPORT_INTERVAL_S:
                reporting = asyncio.ensure_future(self._report("building", done_bytes, total_bytes))
                self._reports.add(reporting)
                reporting.add_done_callback(self._reports.discard)

        try:
            return await build(self._store, environment_id, self._code, link_mode, report, fetch if missing else None)
        finally:
            seconds["build"] += time.perf_counter() - started

    async def _fetch(self, manifest: Manifest, wanted: Collection[Digest], arrived: Arrived) -> None:
        errand = uuid.uuid4().hex

        async def trade(outcomes: Sequence[Outcome]) -> Offer:
            for outcome in outcomes:
                if outcome.received:
                    arrived(outcome.received)
            return await self._trade(errand, outcomes)

        # Connections of their own: what is marked as bulk must not carry the data of tasks, nor wait behind it.
        pool = await ConnectionPool(limit=POOL_LIMIT, connection_args=self._server.rpc.connection_args)
        peers = PeerChunks(pool, receiving=self.receiving)
        self._listeners[arrived] = None
        try:
            while await self._want(manifest, wanted, errand):
                try:
                    await fetch_chunks(self._store, trade=trade, get=peers.get, complain=peers.complain)
                except _Forgotten:
                    logger.info("environment %s: the coordinator forgot this host; telling it again", manifest.id[:16])
                else:
                    logger.info("environment %s: %d chunks fetched", manifest.id[:16], len(wanted))
                    return
        finally:
            self._listeners.pop(arrived, None)
            await pool.close()
            # Whatever is still missing must not hold up, or be counted as lost for, another environment.
            with contextlib.suppress(OSError):
                await self._call("envship_give_up", host_id=self._store.host_id, errand=errand)

    async def _want(self, manifest: Manifest, wanted: Collection[Digest], errand: str) -> bool:
        """Tell the coordinator what is missing of *wanted*; whether anything is."""
        missing = await asyncio.to_thread(self._store.missing, manifest.chunks)
        first = [digest for digest in missing if digest in wanted]
        if first:
            await self._call(
                "envship_want",
                host_id=self._store.host_id,
                address=self._server.address,
                environment_id=manifest.id,
                errand=errand,
                missing=missing,
                first=first,
                dropped=[digest for digest in missing if digest in self._dropped.get(manifest.id, ())],
            )
        return bool(first)

    async def _trade(self, errand: str, outcomes: Sequence[Outcome]) -> Offer:
        answer = await self._call(
            "envship_next_batches",
            host_id=self._store.host_id,
            errand=errand,
            outcomes=[outcome._asdict() for outcome in outcomes],
        )
        if not answer["known"]:
            raise _Forgotten
        if answer["lost"]:
            raise TransferError("the cluster", f"{answer['lost']} chunks are on no host any more; pack and try again")
        batches = (Batch(source, tuple(digests), timeout_s) for source, digests, timeout_s in answer["batches"])
        return Offer(tuple(batches), answer["outstanding"])

    async def _report(self, state: str, done_bytes: int, total_bytes: int) -> None:
        self._reported_at = time.monotonic()
        try:
            await self._call(
                "envship_report",
                host_id=self._store.host_id,
                state=state,
                done_bytes=done_bytes,
                total_bytes=total_bytes,
            )
        except OSError as error:
            logger.debug("progress not reported: %s", error)


class _Forgotten(Exception):
    """The coordinator does not know what this host wants."""
