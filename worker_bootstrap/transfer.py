"""Chunks from store to store: an agent's loop of fetching, and the client's upload.

Bytes go from disk to disk in messages of at most 16 MiB, a few at a time, so memory never holds an environment. Every
chunk that arrives is checked against its name before it is kept. What to fetch from whom is decided by
`worker_bootstrap.tracker`; the operations themselves are `worker_bootstrap.chunk_service`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

from worker_bootstrap.chunk_service import ChunkServer, EncodedChunk, Held, PeerChunks, read_chunks, write_chunks
from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import ChunkMissing, TransferError
from worker_bootstrap.store import Store
from worker_bootstrap.tracker import Batch, Offer, Upload

__all__ = ["ChunkServer", "EncodedChunk", "Held", "Outcome", "PeerChunks", "fetch_chunks", "upload_chunks"]

logger = logging.getLogger(__name__)

PARALLEL = 3
"""Batches that a host fetches at the same time."""


class Outcome(NamedTuple):
    """What became of a batch from, or an upload to, the agent at *source*.

    *blame* says that the peer died or sent wrong bytes; without it, the peer lacks the chunks that *failed*.
    *size_bytes* travelled, compressed.
    """

    source: str
    received: tuple[Digest, ...]
    failed: tuple[Digest, ...]
    size_bytes: int
    blame: bool
    reason: str


GetChunks = Callable[[str, Sequence[Digest]], Awaitable[Sequence[EncodedChunk]]]
PutChunks = Callable[[str, Sequence[EncodedChunk]], Awaitable[Sequence[Digest]]]
Complain = Callable[[str, Sequence[Digest]], Awaitable[None]]
AskHeld = Callable[[str, Sequence[Digest]], Awaitable[Held]]
Report = Callable[[Outcome], Awaitable[None]]


async def fetch_chunks(
    store: Store,
    *,
    next_batch: Callable[[], Awaitable[Offer]],
    get: GetChunks,
    report: Report,
    complain: Complain | None = None,
    parallel: int = PARALLEL,
    pause_s: float = 0.05,
) -> None:
    """Fetch what this host is told to, until nothing is outstanding.

    Parameters
    ----------
    next_batch
        Asks the coordinator for work (`Tracker.offer`, as it is or after its way through msgpack); it may wait before
        it answers that there is none. Whatever it raises ends the exchange.
    get
        Fetches chunks from a peer (`PeerChunks.get`).
    report
        Tells the coordinator what became of a batch.
    complain
        Tells a peer that chunks were wrong (`PeerChunks.complain`), before they are reported.
    parallel
        Batches in flight; up to 16 MiB of memory each, twice that while one is decompressed.
    pause_s
        Waiting time after an answer without work; doubled each time, up to 1 s.

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
        wait_s = pause_s
        while True:
            batch, outstanding = await next_batch()
            if batch is not None:
                await report(await _fetch_batch(store, Batch(*batch), get, complain))
                wait_s = pause_s
            elif not outstanding:
                return
            else:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, 1.0)

    await _all_or_none([work() for _ in range(parallel)])


async def _fetch_batch(store: Store, batch: Batch, get: GetChunks, complain: Complain | None = None) -> Outcome:
    try:
        chunks = await get(batch.source, batch.digests)
    except TransferError as error:
        logger.info("Fetching %d chunks failed: %s", len(batch.digests), error)
        return Outcome(batch.source, (), tuple(batch.digests), 0, True, str(error))
    size_bytes = sum(len(chunk.payload) for chunk in chunks)
    kept, invalid = await asyncio.to_thread(write_chunks, store, chunks, batch.source)
    failed = tuple(digest for digest in batch.digests if digest not in set(kept))
    if invalid:
        lie = TransferError(batch.source, "; ".join(invalid.values()))
        logger.warning("%s", lie)
        if complain is not None:
            await complain(batch.source, list(invalid))
        return Outcome(batch.source, tuple(kept), failed, size_bytes, True, str(lie))
    return Outcome(batch.source, tuple(kept), failed, size_bytes, False, "it does not hold them" if failed else "")


async def upload_chunks(
    store: Store,
    plan: Iterable[Upload],
    *,
    held: AskHeld,
    put: PutChunks,
    report: Report,
    parallel: int = 2,
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
        If *store* itself lacks one, or its copy turns out to be damaged.

    Notes
    -----
    May be cancelled at any point; what has arrived stays there.
    """
    rest: list[Digest] = []
    pending = iter(plan)

    async def work() -> None:
        for upload in pending:  # one iterator for all workers: each upload is taken once
            outcome = await _upload_batch(store, Upload(*upload), held, put)
            rest.extend(outcome.failed)
            await report(outcome)

    await _all_or_none([work() for _ in range(parallel)])
    return rest


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
        return Outcome(address, (), tuple(upload.digests), 0, True, str(error))
    received = tuple(digest for digest in upload.digests if digest in have)
    failed = tuple(digest for digest in upload.digests if digest not in have)
    for digest in failed:
        # Refused, so perhaps damaged here: reading it drops a damaged copy, and tells.
        await asyncio.to_thread(store.read_chunk, digest)
    size_bytes = sum(len(chunk.payload) for chunk in chunks)
    return Outcome(address, received, failed, size_bytes, bool(failed), "it did not keep them" if failed else "")


async def _all_or_none(coroutines: Iterable[Awaitable[None]]) -> None:
    """Run all to the end; if one fails, or this is cancelled, cancel the others and wait until they are gone."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
