"""The standbys that a nanny keeps, with real interpreters."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from worker_bootstrap import carry, standby_pool
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import EnvironmentMissing, StartError
from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.standby import Standby, StartRequest
from worker_bootstrap.standby_pool import Name, StandbyPool
from worker_bootstrap.store import Store

pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT_S = 60.0
A, B, C = (EnvironmentId(letter * 64) for letter in "abc")


class Lab(StandbyPool):
    """A pool, and how often a standby was started for it; every name is this test's own interpreter."""

    def __init__(self, code: str) -> None:
        super().__init__(self._started, asyncio.ensure_future, lambda standby: standby not in self.outdated)
        self.code = code
        self.outdated: list[Standby] = []
        self.starts: list[Name] = []
        self.slow: asyncio.Event | None = None
        """What the next start, and no other, waits for."""

    async def _started(self, name: Name) -> Standby:
        self.starts.append(name)
        slow, self.slow = self.slow, None
        if slow is not None:
            await slow.wait()
        if not self.code:
            raise EnvironmentMissing(A, "this test")
        interpreter = Interpreter(name, sys.prefix, sys.executable, dict(os.environ))
        return await Standby.start(interpreter, StartRequest(self.code, None), TIMEOUT_S)


def with_pool(test: Callable[[Lab], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test with a pool that is closed after it."""

    @functools.wraps(test)
    def run(store: Store) -> None:
        async def main() -> None:
            pool = Lab(str(carry.publish(store.layout)))
            try:
                await test(pool)
            finally:
                await pool.close()
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()

        asyncio.run(main())

    run.__signature__ = inspect.signature(run, follow_wrapped=False)  # type: ignore[attr-defined]
    return run


@with_pool
async def test_what_was_prepared_is_taken_once(pool: Lab) -> None:
    standby = await pool.prepare(A)
    assert pool.take(B) is None
    assert pool.take(A) is standby
    assert standby.alive
    assert pool.take(A) is None
    await standby.discard()


@with_pool
async def test_preparing_another_one_ends_what_was_prepared(pool: Lab) -> None:
    first = await pool.prepare(A)
    await pool.prepare(B)
    assert not first.alive
    assert pool.take(A) is None


@with_pool
async def test_a_parked_one_is_used_instead_of_starting_one(pool: Lab) -> None:
    await pool.park(None, keep=1)
    parked = pool.parked[None]
    assert await pool.prepare(None) is parked
    assert pool.starts == [None]
    assert not pool.parked


@with_pool
async def test_a_parked_one_that_died_is_started_anew(pool: Lab) -> None:
    await pool.park(A, keep=1)
    dead = pool.parked[A]
    await dead.discard()
    assert not pool.parked
    assert (await pool.prepare(A)).alive
    assert pool.starts == [A, A]


@with_pool
async def test_one_that_is_out_of_date_is_started_anew(pool: Lab) -> None:
    """Its options are those of the time when it was started, and the nanny has been told others since."""
    await pool.park(A, keep=1)
    pool.outdated.append(pool.parked[A])
    prepared = await pool.prepare(A)
    assert prepared.alive
    assert not pool.outdated[0].alive
    assert pool.starts == [A, A]
    pool.outdated.append(prepared)
    assert pool.take(A) is None
    await asyncio.wait_for(prepared.process.wait(), TIMEOUT_S)


@with_pool
async def test_of_parked_ones_the_oldest_go(pool: Lab) -> None:
    for name in (A, B, C):
        await pool.park(name, keep=2)
    assert list(pool.parked) == [B, C]
    assert pool.parked_bytes > 2 * 10_000_000
    await pool.park(C, keep=0)
    assert not pool.parked
    assert pool.parked_bytes == 0


@with_pool
async def test_an_environment_that_was_built_anew_keeps_no_standby(pool: Lab) -> None:
    """One that was started before may have imported what was damaged."""
    await pool.park(A, keep=1)
    await pool.prepare(B)
    standbys = [pool.parked[A], pool.take(B)]
    await pool.discard(A)
    await pool.discard(B)
    assert not standbys[0].alive  # type: ignore[union-attr]
    assert standbys[1].alive  # type: ignore[union-attr]  # taken: not the pool's any more
    await standbys[1].discard()  # type: ignore[union-attr]


def test_parked_ones_are_given_up_when_memory_is_short(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real reading of this machine's memory, against a limit that is put below it."""
    monkeypatch.setattr(standby_pool, "MEMORY_CHECK_INTERVAL_S", 0.05)

    @with_pool
    async def run(pool: Lab) -> None:
        await pool.park(A, keep=2)
        await pool.park(B, keep=2)
        standbys = list(pool.parked.values())
        await asyncio.sleep(0.2)
        assert len(pool.parked) == 2, "there is memory enough"
        monkeypatch.setattr(standby_pool, "MEMORY_PRESSURE_PERCENT", 0.0)
        await asyncio.wait_for(asyncio.gather(*(standby.process.wait() for standby in standbys)), TIMEOUT_S)
        assert not pool.parked
        await pool.park(A, keep=2)
        assert not pool.parked
        assert (await pool.prepare(A)).alive, "a swap goes on without"

    run(store)


@with_pool
async def test_parking_one_twice_at_once_starts_one(pool: Lab) -> None:
    await asyncio.gather(pool.park(A, keep=1), pool.park(A, keep=1))
    assert pool.starts == [A]
    assert pool.parked[A].alive


@with_pool
async def test_one_that_is_prepared_while_it_starts_is_not_parked(pool: Lab) -> None:
    """The cluster left the environment, and is back: the standby would take the place of the one left since."""
    slow = pool.slow = asyncio.Event()
    parking = asyncio.ensure_future(pool.park(A, keep=1))
    await asyncio.sleep(0)
    await pool.prepare(A)
    await pool.park(B, keep=1)
    slow.set()
    await parking
    assert list(pool.parked) == [B]


@with_pool
async def test_one_that_is_discarded_while_it_starts_is_not_parked(pool: Lab) -> None:
    """Its environment may have turned out to be damaged meanwhile."""
    parking = asyncio.ensure_future(pool.park(A, keep=1))
    await asyncio.sleep(0)
    assert pool.starts == [A]
    await pool.discard(A)
    await parking
    assert not pool.parked


async def expecting(pool: Lab, name: Name) -> asyncio.Task[None]:
    """One of *name* is expected, and being started."""
    task = asyncio.ensure_future(pool.expect(name))
    await asyncio.sleep(0)  # it runs as far as it can
    await asyncio.sleep(0)  # and so does what it has begun
    assert pool.starts
    return task


@with_pool
async def test_an_expected_one_is_used_instead_of_starting_one(pool: Lab) -> None:
    await expecting(pool, A)
    await expecting(pool, A)
    standby = await pool.prepare(A)
    assert pool.starts == [A]
    assert standby.alive
    assert pool.take(A) is standby
    await standby.discard()


@pytest.mark.parametrize("is_ready", [False, True])
def test_one_that_was_expected_for_nothing_ends_when_another_one_is_asked_for(store: Store, is_ready: bool) -> None:
    @with_pool
    async def run(pool: Lab) -> None:
        await expecting(pool, A)
        if is_ready:
            await pool._expected.settled()
        assert (await pool.prepare(B)).alive
        assert pool.starts == [A, B]
        assert (await pool.prepare(A)).alive
        assert pool.starts == [A, B, A]

    run(store)


def test_an_expected_one_that_nobody_asks_for_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby_pool, "EXPECTED_TIMEOUT_S", 0.05)

    @with_pool
    async def run(pool: Lab) -> None:
        await asyncio.wait_for(pool.expect(A), TIMEOUT_S)
        assert pool.starts == [A]
        await pool.prepare(A)
        assert pool.starts == [A, A]

    run(store)


def test_hints_that_come_at_once_start_one_standby(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the one that was expected before ends, which takes a moment; `no_leaks` would see one that is lost."""
    monkeypatch.setattr(standby_pool, "EXPECTED_TIMEOUT_S", 0.05)

    @with_pool
    async def run(pool: Lab) -> None:
        await expecting(pool, A)
        await asyncio.wait_for(asyncio.gather(pool.expect(B), pool.expect(B)), TIMEOUT_S)
        assert pool.starts == [A, B]

    run(store)


@with_pool
async def test_preparing_that_is_given_up_ends_what_was_expected(pool: Lab) -> None:
    await expecting(pool, A)
    preparing = asyncio.ensure_future(pool.prepare(A))
    await asyncio.sleep(0)
    preparing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await preparing


@with_pool
async def test_an_expected_one_that_does_not_start_says_so_when_it_is_asked_for(pool: Lab) -> None:
    code, pool.code = pool.code, "/nonexistent"
    await expecting(pool, A)
    await pool._expected.settled()
    with pytest.raises(StartError, match="/nonexistent"):
        await pool.prepare(A)
    assert pool.starts == [A]
    pool.code = code
    assert (await pool.prepare(A)).alive


@with_pool
async def test_an_expected_one_that_could_not_be_started_is_started_when_it_is_asked_for(pool: Lab) -> None:
    """The host lacked something, which has been brought since."""
    code, pool.code = pool.code, ""
    await expecting(pool, A)
    pool.code = code
    assert (await pool.prepare(A)).alive
    assert pool.starts == [A, A]


@with_pool
async def test_one_that_is_expected_of_an_environment_that_was_built_anew_is_started_anew(pool: Lab) -> None:
    await expecting(pool, A)
    await pool.discard(A)
    assert (await pool.prepare(A)).alive
    assert pool.starts == [A, A]


def test_nothing_is_expected_when_memory_is_short(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby_pool, "MEMORY_PRESSURE_PERCENT", 0.0)

    @with_pool
    async def run(pool: Lab) -> None:
        await pool.expect(A)
        assert not pool.starts

    run(store)
