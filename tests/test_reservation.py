"""Between the build of an environment and the first process that runs from it, nobody evicts it.

In a cluster, in the middle of a swap: `tests.test_store_of_a_cluster`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from worker_bootstrap.agent import Agent
from worker_bootstrap.lock import Lease
from worker_bootstrap.materialise import materialise
from worker_bootstrap.reservation import Reservations
from worker_bootstrap.store import Store

from .environments import tiny_environment

IN_USE = "a process runs from it"


def gc(store: Path) -> dict[str, Any]:
    """``envship gc`` of everything, in a process of its own."""
    command = [sys.executable, "-m", "envship.cli", "gc", "--limit", "0", "--grace", "0s", "--json", "--store", store]
    told: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return told


async def called(operation: str, **what: Any) -> None:
    """The coordinator, who is told of progress only."""


def agent_of(store: Store) -> Agent:
    return Agent(SimpleNamespace(address="tcp://nowhere:1"), store, called)


def test_what_was_provided_for_a_swap_stays_until_it_is_discarded(store: Store) -> None:
    environment_id = tiny_environment(store)

    async def main() -> None:
        agent = agent_of(store)
        await agent.provide(environment_id, reserve=True)
        assert (await asyncio.to_thread(gc, store.layout.root))["kept"] == {environment_id: IN_USE}
        assert store.built(environment_id) is not None
        await agent.discard(environment_id)
        assert (await asyncio.to_thread(gc, store.layout.root))["evicted"] == [environment_id]
        await agent.close()

    asyncio.run(main())


def test_what_was_staged_only_may_go(store: Store) -> None:
    environment_id = tiny_environment(store)
    asyncio.run(agent_of(store).provide(environment_id))
    assert gc(store.layout.root)["evicted"] == [environment_id]


def test_chunks_that_are_fetched_for_a_staging_stay_meanwhile(store: Store) -> None:
    """However long that takes: nobody has built anything, and the manifest is from before."""
    environment_id = tiny_environment(store)
    agent = agent_of(store)
    told: list[dict[str, Any]] = []

    async def fetch(*_: Any) -> None:
        told.append(await asyncio.to_thread(gc, store.layout.root))

    agent.provision._fetch = fetch  # type: ignore[method-assign]
    asyncio.run(agent.provide(environment_id, chunks_only=True))
    assert told[0]["kept"] == {environment_id: IN_USE}
    assert store.missing(store.read_manifest(environment_id).chunks) == []


def test_one_at_a_time_is_kept(store: Store, tmp_path: Path) -> None:
    """A swap whose end nobody heard of does not keep its environment for ever."""
    first, second = tiny_environment(store, {"a": b"a"}), tiny_environment(store, {"b": b"b"})

    async def main() -> None:
        reservations = Reservations(store)
        await reservations.keep(first)
        await reservations.keep(second)
        assert [Lease(store.layout.lease(each)).is_free() for each in (first, second)] == [True, False]
        await reservations.keep(None)
        assert Lease(store.layout.lease(second)).is_free()

    asyncio.run(main())


def test_one_that_another_store_has_built_is_held_there_as_well(tmp_path: Path) -> None:
    staged = Store(tmp_path / "staged")
    environment_id = tiny_environment(staged)
    materialise(staged, environment_id)
    Lease(staged.layout.lease(environment_id)).is_free()  # makes the file, as staging does
    own = Store(tmp_path / "own", [staged.layout.root])

    async def main() -> None:
        async with Reservations(own).during(environment_id):
            assert (await asyncio.to_thread(gc, staged.layout.root))["kept"] == {environment_id: IN_USE}
        assert (await asyncio.to_thread(gc, staged.layout.root))["evicted"] == [environment_id]

    asyncio.run(main())
