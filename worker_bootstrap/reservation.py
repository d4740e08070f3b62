"""Environments that somebody is about to run from: fetched, built, and not to be evicted before a process runs there.

A lease is held by each process that runs from an environment. Until one does, the agent that has brought it, or is to
prove it, holds one in its place: these.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.durable import full_error
from worker_bootstrap.lock import Lease
from worker_bootstrap.store import Store


class Reservations:
    """Leases on environments of *store*, held by this process. An ``exec`` that passes leases on passes these on."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[EnvironmentId, list[Lease]] = {}

    @contextlib.asynccontextmanager
    async def during(self, environment_id: EnvironmentId | None) -> AsyncIterator[None]:
        """Nobody evicts that environment in the block, built or not; the base environment (None) nobody does anyway.

        Raises
        ------
        StoreBusy
            If it is being evicted, and that takes its time.
        StoreFull
            If there is no room for a file without content.
        """
        leases = [] if environment_id is None else await asyncio.to_thread(_held, self._store, environment_id)
        try:
            yield
        finally:
            _release(leases)

    async def keep(self, environment_id: EnvironmentId | None) -> None:
        """The same, until `drop`. A cluster moves to one environment at a time, so all others are dropped."""
        leases = [] if environment_id is None else await asyncio.to_thread(_held, self._store, environment_id)
        self.clear()
        if environment_id is not None:
            self._kept[environment_id] = leases

    def drop(self, environment_id: EnvironmentId | None) -> None:
        """Whoever was to run from it holds a lease of its own, or will not run from it."""
        _release(self._kept.pop(environment_id, []) if environment_id is not None else [])

    def clear(self) -> None:
        """Drop all of them."""
        for environment_id in list(self._kept):
            self.drop(environment_id)


def _held(store: Store, environment_id: EnvironmentId) -> list[Lease]:
    # Where it is built, which may be a store of somebody else, and where it would be built.
    leases = [Lease(path) for path in {store.layout.lease(environment_id), store.lease(environment_id)}]
    try:
        for lease in leases:
            lease.hold()
    except BaseException as error:
        _release(leases)
        full = full_error(error, store.layout.root) if isinstance(error, OSError) else None
        if full is not None:
            raise full from error
        raise
    return leases


def _release(leases: list[Lease]) -> None:
    for lease in leases:
        lease.release()
