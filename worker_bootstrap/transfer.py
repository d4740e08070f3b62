"""Chunks from store to store: an agent's loop of fetching, and the client's upload.

Bytes go from disk to disk in messages of at most 16 MiB, a few at a time, so memory never holds an environment. Every
chunk that arrives is checked against its name before it is kept. What to fetch from whom is decided by
`worker_bootstrap.tracker`; the operations themselves are `worker_bootstrap.chunk_service`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

from worker_bootstrap.assignments import PARALLEL, Batch, Offer, Upload
from worker_bootstrap.chunk_service import (
    ChunkServer,
    EncodedChunk,
    Held,
    PeerChunks,
    intact,
    read_chunks,
    write_chunks,
)
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import ChunkMissing, ProtocolBroken, TransferError
from worker_bootstrap.mistrust import LACKS, LIED, SILENT
from worker_bootstrap.store import Store

__all__ = ["ChunkServer", "EncodedChunk", "Held", "Outcome", "PeerChunks", "fetch_chunks", "upload_chunks"]

logger = logging.getLogger(__name__)

UPLOADS = 6
"""Messages that the client sends at the same time: everybody waits for them, so they get more than one share."""
SLOW_S = 1.0
"""As long as uploads take longer, they are halved: hosts pass nothing on before a message has arrived in full."""


class Outcome(NamedTuple):
    """What became of a batch from, or an upload to, the agent at *source*.

    *fault* tells what was wrong with those that *failed*: the peer ``lacks`` them, it ``lied``, or it was ``silent``.
    *size_bytes* travelled, compressed.
    """

    source: str
    received: tuple[Digest, ...]
    failed: tuple[Digest, ...]
    size_bytes: int
    fault: str
    reason: str


GetChunks = Callable[[str, Sequence[Digest]], Awaitable[Sequence[EncodedChunk]]]
PutChunks = Callable[[str, Sequence[EncodedChunk]], Awaitable[Sequence[Digest]]]
Complain = Callable[[str, Sequence[Digest]], Awaitable[None]]
AskHeld = Callable[[str, Sequence[Digest]], Awaitable[Held]]
Report = Callable[[Outcome], Awaitable[None]]
Trade = Callable[[Sequence[Outcome]], Awaitable[Offer]]


async def fetch_chunks(
    store: Store,
    *,
    trade: Trade,
    get: GetChunks,
    complain: Complain | None = None,
    parallel: int = PARALLEL,
    pause_s: float = 0.05,
) -> None:
    """Fetch what this host is told to, until nothing is outstanding.

    Parameters
    ----------
    trade
        Tells the coordinator what became of the batches of its last answer (of none at first), and asks it for the
        next ones (`Tracker.offer`, as it is or after its way through msgpack); it may wait before it answers that there
        are none. Whatever it raises ends the exchange.
    get
        Fetches chunks from a peer (`PeerChunks.get`).
    complain
        Tells a peer that chunks were wrong (`PeerChunks.complain`), before they are reported.
    parallel
        Batches in flight; up to 16 MiB of memory each, twice that while one is decompressed.
    pause_s
        Waiting time after an answer without work.

    Raises
    ------
    StoreFull
        If the chunks do not fit here. A peer's failure is reported, and never raises.

    Notes
    -----
    May be cancelled at any point, and started again: what was kept stays kept. A thread that is writing when the call
    is cancelled finishes its batch.
    """

    async def work() -> None:
        outcomes: list[Outcome] = []
        while True:
            batches, outstanding = await trade(outcomes)
            outcomes = [await _fetch_batch(store, Batch(*batch), get, complain) for batch in batches]
            if not outcomes:
                if not outstanding:
                    return
                await asyncio.sleep(pause_s)

    # The first one that hears that all is there ends the others, which may be waiting for a peer that is too slow.
    await _all_or_none([work() for _ in range(parallel)], enough=1)


async def _fetch_batch(store: Store, batch: Batch, get: GetChunks, complain: Complain | None = None) -> Outcome:
    try:
        chunks = await asyncio.wait_for(get(batch.source, batch.digests), batch.timeout_s)
    except (TransferError, asyncio.TimeoutError) as error:
        reason = str(error) or f"{batch.source}: too slow, not done after {batch.timeout_s:.1f} s"
        logger.info("Fetching %d chunks failed: %s", len(batch.digests), reason)
        fault = LIED if isinstance(error, ProtocolBroken) else SILENT
        return Outcome(batch.source, (), tuple(batch.digests), 0, fault, reason)
    size_bytes = sum(len(chunk.payload) for chunk in chunks)
    kept, invalid = await asyncio.to_thread(write_chunks, store, chunks, batch.source)
    failed = tuple(digest for digest in batch.digests if digest not in set(kept))
    if invalid:
        lie = TransferError(batch.source, "; ".join(invalid.values()))
        logger.warning("%s", lie)
        if complain is not None:
            await complain(batch.source, list(invalid))
        return Outcome(batch.source, tuple(kept), failed, size_bytes, LIED, str(lie))
    if failed:
        return Outcome(batch.source, tuple(kept), failed, size_bytes, LACKS, f"{batch.source} does not hold them")
    return Outcome(batch.source, tuple(kept), (), size_bytes, "", "")


async def upload_chunks(
    store: Store,
    plan: Iterable[Upload],
    *,
    held: AskHeld,
    put: PutChunks,
    report: Report,
    parallel: int = UPLOADS,
) -> list[Digest]:
    """Send the chunks of *plan* (`Tracker.plan_uploads`) into the cluster, each once.

    Parameters
    ----------
    store
        Where the chunks are read.
    held, put
        Ask a peer what it holds already, and send it the rest (`PeerChunks.held`, `PeerChunks.put`).
    report
        Tells the coordinator, after each message, what the peer holds now.
    parallel
        Messages in flight; up to 16 MiB of memory each.

    Returns
    -------
    list of digests
        Those that their host did not take, because it died or refused: plan them again, for another host.

    Raises
    ------
    ChunkMissing
        If *store* itself lacks one, or its copy turns out to be damaged. Then all of *plan* have been read, and those
        that are damaged dropped: after a crash of the machine there are many, and the next pack is to bring all.

    Notes
    -----
    May be cancelled at any point; what has arrived stays there.
    """
    rest: list[Digest] = []
    plan = list(plan)
    outbox = Outbox(plan)

    async def work() -> None:
        untold: list[Outcome] = []

        async def send(upload: Upload) -> None:
            began_s = time.monotonic()
            outcome = await _upload_batch(store, upload, held, put)
            outbox.sent(upload.address, time.monotonic() - began_s)
            rest.extend(outcome.failed)
            untold.append(outcome)

        async def tell() -> None:
            while untold:
                await report(untold.pop())

        while (upload := outbox.take()) is not None:
            # The coordinator hears of one message while the next is under way: links are not to idle meanwhile.
            await _all_or_none([send(upload), tell()])
        await tell()

    try:
        await _all_or_none([work() for _ in range(parallel)])
    except ChunkMissing:
        await asyncio.to_thread(intact, store, [digest for _, digests in plan for digest in digests])
        raise
    return rest


class Outbox:
    """What is left of a *plan*, in which order, in messages of which size, and to whom."""

    def __init__(self, plan: Iterable[Upload]) -> None:
        self._planned = deque(plan)
        self._halves: deque[Upload] = deque()
        self._busy = dict.fromkeys((address for address, _ in self._planned), 0)
        self._took_s = math.inf

    def take(self) -> Upload | None:
        """The next message, or None if nothing is left."""
        if self._halves:
            planned, digests = self._halves.popleft()
        elif self._planned:
            planned, digests = self._planned.popleft()
            if self._took_s > SLOW_S and len(digests) > 1:
                middle = (len(digests) + 1) // 2
                self._halves.append(Upload(planned, digests[middle:]))
                digests = digests[:middle]
        else:
            return None
        # To the one planned, unless it is still busy and another is not: none that is slow may hold up the rest.
        address = min(self._busy, key=lambda a: (self._busy[a], a != planned))
        self._busy[address] += 1
        return Upload(address, tuple(digests))

    def sent(self, address: str, took_s: float) -> None:
        """A message to the agent at *address* is through, or has failed."""
        self._busy[address] -= 1
        self._took_s = took_s


async def _upload_batch(store: Store, upload: Upload, held: AskHeld, put: PutChunks) -> Outcome:
    address = upload.address
    try:
        there, accept = await held(address, upload.digests)
        have = dict.fromkeys(there)
        needed = [digest for digest in upload.digests if digest not in have]
        chunks = await asyncio.to_thread(read_chunks, store, needed, accept)
        if len(chunks) < len(needed):
            found = {chunk.digest for chunk in chunks}
            lacking = next(digest for digest in needed if digest not in found)
            raise ChunkMissing(lacking, str(store.layout.root))
        if chunks:
            have.update(dict.fromkeys(await put(address, chunks)))
    except TransferError as error:
        logger.info("Uploading %d chunks failed: %s", len(upload.digests), error)
        return Outcome(address, (), tuple(upload.digests), 0, SILENT, str(error))
    received = tuple(digest for digest in upload.digests if digest in have)
    failed = tuple(digest for digest in upload.digests if digest not in have)
    for digest in failed:
        # Refused, so perhaps damaged here: reading it drops a damaged copy, and tells.
        await asyncio.to_thread(store.read_chunk, digest)
    size_bytes = sum(len(chunk.payload) for chunk in chunks)
    fault, reason = (SILENT, f"{address} did not keep them") if failed else ("", "")
    return Outcome(address, received, failed, size_bytes, fault, reason)


async def _all_or_none(coroutines: Iterable[Awaitable[None]], enough: int | None = None) -> None:
    """Run all, or as many as are *enough*, to the end; then, or if one fails, or this is cancelled, cancel the others.

    Returns when all of them are gone.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        for count, done in enumerate(asyncio.as_completed(tasks), 1):
            await done
            if count == enough:
                break
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
