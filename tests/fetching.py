"""Fetching in one process: a store, a tracker, and any way to get chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker_bootstrap import codec
from worker_bootstrap.assignments import Offer
from worker_bootstrap.chunk_service import EncodedChunk, read_chunks
from worker_bootstrap.digest import Digest
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.store import Store
from worker_bootstrap.tracker import Tracker
from worker_bootstrap.transfer import GetChunks, Outcome, fetch_chunks


def new_tracker() -> Tracker:
    return Tracker(clock=lambda: 0.0)


async def exchange(tracker: Tracker, store: Store, get: GetChunks, **options: Any) -> list[Outcome]:
    """Fetch with a tracker in this process, the way an agent does; return what was reported."""
    outcomes = []

    async def trade(done: Sequence[Outcome]) -> Offer:
        for outcome in done:
            outcomes.append(outcome)
            tracker.received(store.host_id, outcome.received)
            if outcome.failed:
                tracker.failed(store.host_id, outcome.source, outcome.failed, fault=outcome.fault)
        return tracker.offer(store.host_id)

    await fetch_chunks(store, trade=trade, get=get, pause_s=0.001, **options)
    return outcomes


async def bring(manifest: Manifest, store: Store, source: Store) -> None:
    """Have *store* fetch from *source* what it lacks of an environment; the manifest comes first, as to an agent."""

    async def get(address: str, digests: Sequence[Digest]) -> list[EncodedChunk]:
        return read_chunks(source, digests, codec.accepted())

    store.write_manifest(manifest)
    tracker = new_tracker()
    tracker.add_host(source.host_id, "tcp://source:1")
    tracker.add_host(store.host_id, "tcp://store:1")
    tracker.received(source.host_id, list(manifest.chunks))
    missing = {
        digest: size for digest, size in manifest.chunks.items() if digest in set(store.missing(manifest.chunks))
    }
    tracker.want(store.host_id, missing)
    await exchange(tracker, store, get)
