"""The order of things in a swap, on a cluster that answers as it is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from worker_bootstrap.roster import Gone, Refused
from worker_bootstrap.swap import Swap

from .scripted import (
    NEW,
    OLD,
    OPTIONS,
    SCHEDULER,
    TWO_HOSTS,
    WORKERS,
    ScriptedCluster,
    swap_on,
)

# -- when all goes well


def test_all_prepare_before_any_commits() -> None:
    cluster = ScriptedCluster()
    swap = swap_on(cluster)
    assert (swap.phase, swap.error) == ("done", None)
    operations = [operation for _, operation, _ in cluster.roster.asked]
    assert operations.index("envship_commit") > max(i for i, o in enumerate(operations) if o == "envship_prepare")
    assert cluster.asked("prepare") == cluster.asked("commit") == WORKERS
    assert cluster.told("commit") == [NEW] * 3
    assert cluster.target == NEW
    assert cluster.expected == [3]
    assert not cluster.leaving


def test_one_agent_of_each_host_fetches() -> None:
    cluster = ScriptedCluster()
    swap_on(cluster)
    assert cluster.asked("provide") == ["tcp://a1", "tcp://b1"]


def test_the_manifest_is_sent_only_to_hosts_that_lack_it() -> None:
    def provide(manifest: bytes | None = None, **_: Any) -> Any:
        return {"prefix": "/p", "seconds": {}} if manifest else Refused("no such environment", "EnvironmentMissing")

    cluster = ScriptedCluster(answers={("tcp://a1", "envship_provide"): provide})
    assert swap_on(cluster).phase == "done"
    sent = [(a, more.get("manifest")) for a, operation, more in cluster.roster.asked if operation == "envship_provide"]
    assert sorted(sent, key=str) == [("tcp://a1", None), ("tcp://a1", b"the manifest"), ("tcp://b1", None)]


def test_no_manifest_goes_with_prepare_and_commit() -> None:
    """Megabytes for a large environment, to every agent."""
    cluster = ScriptedCluster()
    swap_on(cluster)
    options = [more["options"] for _, _, more in cluster.roster.asked if "options" in more]
    assert len(options) == 6
    assert not any("manifest" in sent for sent in options)


def test_the_base_environment_need_not_be_fetched() -> None:
    cluster = ScriptedCluster()
    swap = Swap(None, OLD, {**OPTIONS, "platform": None})
    asyncio.run(swap.run(cluster))
    assert swap.phase == "done"
    assert cluster.asked("provide") == []
    assert cluster.told("commit") == [None] * 3


def test_the_slowest_host_counts() -> None:
    def took(fetch: float) -> Any:
        return {"prefix": "/p", "seconds": {"fetch": fetch, "build": 1.0}}

    answers = {("tcp://a1", "envship_provide"): took(2.0), ("tcp://b1", "envship_provide"): took(7.0)}
    swap = swap_on(ScriptedCluster(answers=answers))
    assert swap.seconds["fetch"] == 7.0
    assert {"fetch", "build", "start", "prepare", "commit"} <= set(swap.seconds)


def test_a_cluster_that_is_there_already_is_left_alone() -> None:
    agents = [{**agent, "environment_id": NEW} for agent in (*TWO_HOSTS, SCHEDULER)]
    cluster = ScriptedCluster(agents)
    swap = swap_on(cluster, scheduler=None)
    assert (swap.phase, swap.moves) == ("done", False)
    assert cluster.roster.asked == []
    assert {host["state"] for host in swap.hosts.values()} == {"ready"}
    assert swap.expected == 3


def test_only_what_is_elsewhere_moves_where_the_scheduler_stays() -> None:
    agents = [{**TWO_HOSTS[0], "environment_id": NEW}, *TWO_HOSTS[1:], SCHEDULER]
    cluster = ScriptedCluster(agents)
    swap_on(cluster)
    assert cluster.asked("commit") == ["tcp://a2", "tcp://b1"]
    assert cluster.expected == [3]


def test_staging_builds_and_moves_nobody() -> None:
    cluster = ScriptedCluster()
    swap = swap_on(cluster, stage_only=True)
    assert swap.phase == "done"
    assert {operation for _, operation, _ in cluster.roster.asked} == {"envship_provide"}
    assert cluster.target == OLD


# -- before anything is sent


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"obstacle": "it is a thread"}, "NotSwappable"),
        ({"platform": "osx-arm64"}, "IncompatibleEnvironment"),
    ],
)
def test_what_cannot_be_moved_says_so_before_anything_is_sent(change: dict[str, str], error: str) -> None:
    cluster = ScriptedCluster([*TWO_HOSTS[:2], {**TWO_HOSTS[2], **change}, SCHEDULER])
    swap = swap_on(cluster)
    assert (swap.phase, swap.error) == ("failed", error)
    assert swap.causes == {"b.example (worker tcp://b1)": next(iter(change.values()))}
    assert cluster.roster.asked == []
    assert cluster.target == OLD


def test_a_worker_without_agent_is_an_obstacle() -> None:
    cluster = ScriptedCluster()
    cluster.roster.unknown = ["tcp://who"]
    swap = swap_on(cluster)
    assert swap.error == "NotSwappable"
    assert list(swap.causes) == ["tcp://who"]


def test_an_obstacle_of_a_scheduler_that_stays_is_none() -> None:
    cluster = ScriptedCluster([*TWO_HOSTS, {**SCHEDULER, "obstacle": "it is part of a notebook"}])
    assert swap_on(cluster).phase == "done"
    assert swap_on(cluster, scheduler=True).error == "NotSwappable"


def test_hosts_are_told_whether_the_environment_was_built_anew() -> None:
    """What they started before of an environment that turned out damaged does not count."""
    answers = {
        ("tcp://a1", "envship_provide"): {"seconds": {"fetch": 0.0, "build": 0.0}},
        ("tcp://b1", "envship_provide"): {"seconds": {"fetch": 0.0, "build": 1.5}},
    }
    cluster = ScriptedCluster(answers=answers)
    assert swap_on(cluster).phase == "done"
    told = {a: more["options"]["built_anew"] for a, what, more in cluster.roster.asked if what == "envship_prepare"}
    assert told == {"tcp://a1": False, "tcp://a2": False, "tcp://b1": True}


# -- prepare fails


def test_one_host_that_fails_to_prepare_touches_nothing() -> None:
    answers = {("tcp://b1", "envship_prepare"): Refused("cannot import distributed", "StartError")}
    cluster = ScriptedCluster(answers=answers)
    swap = swap_on(cluster)
    assert (swap.phase, swap.error) == ("failed", "PrepareFailed")
    assert swap.causes == {"b.example (worker tcp://b1)": "cannot import distributed"}
    assert {host["label"]: host["state"] for host in swap.hosts.values()} == {
        "a.example": "ready",
        "b.example": "failed",
    }
    assert cluster.asked("discard") == WORKERS
    assert cluster.asked("commit") == []
    assert cluster.target == OLD
    assert not swap.chunks_lost


def test_every_host_that_fails_is_named() -> None:
    broken = Refused("no space", "StoreFull")
    cluster = ScriptedCluster(answers={(a, "envship_provide"): broken for a in ("tcp://a1", "tcp://b1")})
    assert len(swap_on(cluster).causes) == 2


@pytest.mark.parametrize("kind", ["TransferError", "ChunkMissing", "ChunkInvalid"])
def test_lost_chunks_are_told_apart(kind: str) -> None:
    """The client can bring them again."""
    cluster = ScriptedCluster(answers={("tcp://a1", "envship_provide"): Refused("a chunk", kind)})
    assert swap_on(cluster).status()["chunks_lost"]


def test_a_host_that_waits_for_the_clients_upload_is_not_slow() -> None:
    """Its time begins when everything has been brought."""
    cluster = ScriptedCluster(
        answers={("tcp://b1", "envship_provide"): lambda **_: asyncio.sleep(0.25, {"seconds": {}})}
    )
    cluster.arriving = 10
    assert swap_on(cluster, prepare_timeout_s=0.1).phase == "done"
    assert cluster.looks >= 2


def test_a_host_that_hangs_is_given_up() -> None:
    cluster = ScriptedCluster(answers={("tcp://b1", "envship_prepare"): lambda **_: asyncio.sleep(3600)})
    swap = swap_on(cluster, prepare_timeout_s=0.1)
    assert swap.error == "PrepareFailed"
    [cause] = swap.causes.values()
    assert "not ready after" in cause
    assert cluster.asked("discard") == WORKERS


def test_an_agent_that_fails_while_it_discards_hides_nothing() -> None:
    answers = {
        ("tcp://b1", "envship_prepare"): Refused("the cause", "StartError"),
        ("tcp://a1", "envship_discard"): Gone("left"),
    }
    assert list(swap_on(ScriptedCluster(answers=answers)).causes.values()) == ["the cause"]


def test_an_error_of_our_own_ends_the_swap() -> None:
    """Never an exception: nobody would tell the client, who waits."""
    cluster = ScriptedCluster()
    cluster.roster.agents = None
    swap = swap_on(cluster)
    assert (swap.phase, swap.error) == ("failed", "PrepareFailed")
    assert "TypeError" in swap.causes["scheduler"]


# -- agents that leave


def test_an_agent_that_leaves_is_left_out() -> None:
    gone = Gone("connection refused")
    answers = {("tcp://a1", f"envship_{name}"): gone for name in ("provide", "prepare", "commit")}
    cluster = ScriptedCluster(answers=answers)
    swap = swap_on(cluster)
    assert (swap.phase, swap.error) == ("done", None)
    assert cluster.asked("provide") == ["tcp://a1", "tcp://a2", "tcp://b1"], "another agent of the host fetches"
    assert cluster.expected == [2]


def test_a_host_that_leaves_is_left_out() -> None:
    cluster = ScriptedCluster(
        answers={("tcp://b1", f"envship_{name}"): Gone("left") for name in ("provide", "prepare", "commit")}
    )
    assert swap_on(cluster).phase == "done"
    assert cluster.expected == [2]


# -- commit fails


def test_an_agent_that_fails_to_commit_takes_all_back() -> None:
    def commit(environment_id: str | None, **_: Any) -> Any:
        return Refused("the worker ended", "StartError") if environment_id == NEW else {}

    cluster = ScriptedCluster(answers={("tcp://b1", "envship_commit"): commit})
    swap = swap_on(cluster)
    assert (swap.phase, swap.error) == ("failed", "CommitFailed")
    assert swap.causes == {"b.example (worker tcp://b1)": "the worker ended"}
    assert cluster.told("commit") == [NEW] * 3 + [OLD] * 3
    assert cluster.target == OLD
    assert cluster.events[0] == ("wait for workers in", OLD), "nobody waits for the new environment any more"
    assert "moved back to environment" in swap.outcome


def test_a_worker_that_does_not_report_takes_all_back() -> None:
    cluster = ScriptedCluster(missing=[{"tcp://w": "runs in the base environment"}])
    swap = swap_on(cluster)
    assert swap.error == "CommitFailed"
    assert swap.causes == {"tcp://w": "runs in the base environment"}
    assert cluster.told("commit") == [NEW] * 3 + [OLD] * 3
    assert cluster.events[:2] == [("wait for workers in", NEW), ("wait for workers in", OLD)]


def test_workers_that_do_not_come_back_either_are_named() -> None:
    cluster = ScriptedCluster(missing=[{"tcp://w": "new"}, {"cluster": "1 of 3 workers did not come back"}])
    swap = swap_on(cluster)
    assert swap.error == "CommitFailed"
    assert set(swap.causes) == {"tcp://w", "cluster"}
    assert "not all of it" in swap.outcome


def test_an_error_of_our_own_after_the_commit_began_is_not_called_harmless() -> None:
    cluster = ScriptedCluster(missing=[{"tcp://w": "new"}])
    agents = cluster.roster.agents

    async def once() -> Any:
        cluster.roster.agents = None
        return await agents()

    cluster.roster.agents = once
    swap = swap_on(cluster)
    assert (swap.phase, swap.error) == ("failed", "CommitFailed")
    assert "TypeError" in swap.causes["scheduler"]
    assert swap.outcome


def test_those_who_came_meanwhile_are_seen_to_whatever_the_outcome() -> None:
    for missing in ([], [{"tcp://w": "new"}]):
        cluster = ScriptedCluster(missing=missing)
        swap_on(cluster)
        assert cluster.events[-1] == ("conform all but", WORKERS)


# -- those who watch


def test_a_change_wakes_those_who_wait() -> None:
    async def main() -> None:
        swap = Swap(NEW, OLD, OPTIONS)
        waiting = [asyncio.create_task(swap.changed(swap.version, 60)) for _ in range(2)]
        await asyncio.sleep(0)
        swap.note("a", "fetching", 1, 2)
        for status in await asyncio.wait_for(asyncio.gather(*waiting), 10):
            assert status["version"] == 1
            assert status["hosts"]["a"]["done_bytes"] == 1

    asyncio.run(main())


def test_what_is_news_is_told_at_once() -> None:
    async def main() -> None:
        swap = Swap(NEW, OLD, OPTIONS)
        swap.note("a", "waiting")
        assert (await asyncio.wait_for(swap.changed(0, 60), 10))["version"] == 1
        swap.fail("PrepareFailed", {})
        assert (await asyncio.wait_for(swap.changed(99, 60), 10))["phase"] == "failed"

    asyncio.run(main())


def test_without_news_the_answer_comes_in_the_end() -> None:
    swap = Swap(NEW, OLD, OPTIONS)
    assert asyncio.run(swap.changed(swap.version, 0.01))["phase"] == "check"
