"""Hosts that wait for an answer, and what wakes them. The rest of the exchange is tested with real clusters."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.exchange import Exchange
from worker_bootstrap.roster import Roster
from worker_bootstrap.store import Store

NEEDED = {digest_of(bytes([number])): 1 << 20 for number in range(6)}
DIGESTS = list(NEEDED)


def run(tmp_path: Path, work: Callable[[Exchange], Awaitable[None]]) -> None:
    """Run *work* with an exchange between a, which has nothing yet, and b, which wants everything."""

    async def main() -> None:
        exchange = Exchange(Roster(None), Store(tmp_path), lambda *_, **__: None)
        exchange.tracker.add_host("a", "tcp://a:1")
        exchange.tracker.add_host("b", "tcp://b:1")
        exchange.tracker.want("b", NEEDED, "environment")
        exchange.tracker.promise("client", DIGESTS)
        await asyncio.wait_for(work(exchange), 30)

    asyncio.run(main())


async def waiting(exchange: Exchange, host_id: str) -> asyncio.Task[dict[str, Any]]:
    """A question that is kept waiting."""
    task = asyncio.ensure_future(exchange.next_batches(host_id, "environment"))
    await asyncio.sleep(0)
    assert not task.done()
    return task


def test_a_host_that_waits_is_answered_when_somebody_has_what_it_needs(tmp_path: Path) -> None:
    async def work(exchange: Exchange) -> None:
        task = await waiting(exchange, "b")
        exchange.tracker.received("a", DIGESTS[:2])
        exchange.settle("a", "tcp://x:1", DIGESTS[2:3], (), 0, "", "")
        answer = await task
        [[source, digests, timeout_s]] = answer["batches"]
        assert source == "tcp://a:1"
        assert set(digests) <= set(DIGESTS[:3])
        assert timeout_s > 0

    run(tmp_path, work)


def test_a_host_that_waits_in_vain_hears_so_after_a_while(tmp_path: Path) -> None:
    async def work(exchange: Exchange) -> None:
        answer = await exchange.next_batches("b", "environment")
        assert (answer["batches"], answer["lost"], answer["outstanding"]) == ([], 0, 6)

    run(tmp_path, work)


def test_hosts_that_wait_are_told_at_once_that_the_client_has_given_up(tmp_path: Path) -> None:
    async def work(exchange: Exchange) -> None:
        task = await waiting(exchange, "b")
        await exchange.withdraw("client")
        assert (await task)["lost"] == 6

    run(tmp_path, work)


def test_a_question_of_an_errand_that_is_over_is_given_nothing(tmp_path: Path) -> None:
    """Whoever asked it does not listen any more: what it was given would be handed out again only after its time."""

    async def work(exchange: Exchange) -> None:
        task = await waiting(exchange, "b")
        await exchange.give_up("b", "environment")
        exchange.tracker.want("b", NEEDED, "the next errand")
        exchange.tracker.received("a", DIGESTS)
        exchange.settle("a", "tcp://x:1", (), (), 0, "", "")
        assert (await task)["batches"] == []
        assert not (await task)["known"]
        answer = await exchange.next_batches("b", "the next errand")
        assert sum(len(digests) for _, digests, _ in answer["batches"]) > 0

    run(tmp_path, work)


def test_what_is_on_its_way_for_an_errand_that_is_over_is_handed_out_again_at_once(tmp_path: Path) -> None:
    """Its answer came too late: nobody fetches it."""

    async def work(exchange: Exchange) -> None:
        exchange.tracker.received("a", DIGESTS)
        lost = await exchange.next_batches("b", "environment")
        assert lost["batches"]
        await exchange.give_up("b", "environment")
        exchange.tracker.want("b", NEEDED, "the next errand")
        given: list[Digest] = []
        while len(given) < len(DIGESTS):
            for source, digests, _ in (await exchange.next_batches("b", "the next errand"))["batches"]:
                exchange.settle("b", source, digests, (), 0, "", "")
                given += digests
        assert sorted(given) == sorted(DIGESTS)

    run(tmp_path, work)


def test_whoever_waits_longest_is_looked_at_first_and_nobody_is_forgotten(tmp_path: Path) -> None:
    async def work(exchange: Exchange) -> None:
        names = [f"h{number}" for number in range(200)]
        for name in names:
            exchange.tracker.add_host(name, f"tcp://{name}:1")
            exchange.tracker.want(name, NEEDED, "environment")
        tasks = [await waiting(exchange, name) for name in names]
        arrived: list[Digest] = DIGESTS
        while not all(task.done() for task in tasks):
            exchange.settle("a", "tcp://x:1", arrived, (), 0, "", "")
            for name, task in zip(names, tasks):
                for source, digests, _ in task.result()["batches"] if task.done() else ():
                    exchange.settle(name, source, digests, (), 0, "", "")
            await asyncio.sleep(0.01)
        assert [task.result()["outstanding"] for task in tasks] == [6] * 200

    run(tmp_path, work)
