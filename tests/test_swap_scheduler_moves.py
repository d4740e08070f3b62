"""The order of things in a swap that replaces the scheduler, on a cluster that answers as it is told."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping
from typing import Any

import pytest

from worker_bootstrap.roster import Refused
from worker_bootstrap.swap import Swap

from .scripted import (
    CLIENT,
    NEW,
    OLD,
    OPTIONS,
    SCHEDULER,
    TWO_HOSTS,
    WORKERS,
    Replaced,
    ScriptedCluster,
    replaced,
    swap_on,
)


@pytest.mark.parametrize(
    ("option", "token", "environment_id", "moves"),
    [
        (None, "its own process", OLD, True),
        (None, CLIENT, OLD, False),
        (True, CLIENT, OLD, True),
        (False, "its own process", OLD, False),
        (None, "its own process", NEW, False),
        (True, "its own process", NEW, False),
    ],
)
def test_when_the_scheduler_moves(option: bool | None, token: str, environment_id: str, moves: bool) -> None:
    cluster = ScriptedCluster([*TWO_HOSTS, {**SCHEDULER, "token": token, "environment_id": environment_id}])
    swap = Swap(NEW, OLD, {**OPTIONS, "scheduler": option})
    asyncio.run(swap.prepare(cluster))
    assert swap.scheduler_moves is moves
    assert ("tcp://s" in cluster.asked("prepare")) is moves


def test_all_workers_start_again_when_the_scheduler_moves() -> None:
    """Those that are in the environment already, too: none outlives its scheduler."""
    cluster = ScriptedCluster([{**TWO_HOSTS[0], "environment_id": NEW}, *TWO_HOSTS[1:], SCHEDULER])
    replaced(cluster)
    assert cluster.asked("commit") == WORKERS


def test_agents_hold_before_the_scheduler_leaves() -> None:
    def commit(options: Mapping[str, Any], **_: Any) -> Any:
        return {} if cluster.leaving and options["scheduler_moves"] else Refused("not told", "AssertionError")

    cluster = ScriptedCluster(answers={(address, "envship_commit"): commit for address in WORKERS})
    replaced(cluster)
    assert cluster.events == [("tell all but", [*WORKERS, "tcp://s"]), ("replace scheduler", NEW, True)]
    assert cluster.asked("commit") == WORKERS, "the scheduler is no agent that could be asked to leave"


def test_the_successor_finishes() -> None:
    swap = replaced(ScriptedCluster())
    assert swap.phase == "commit"
    successor = ScriptedCluster()
    successor.target = successor.scheduler_environment = NEW
    asyncio.run(swap.resume(successor, {agent["address"]: agent for agent in TWO_HOSTS}))
    assert (swap.phase, swap.error, swap.scheduler_moves) == ("done", None, True)
    assert successor.expected == [3]
    assert swap.downtime_s > 0
    assert successor.events[-1] == ("conform all but", WORKERS)


def test_what_the_successor_reads_is_what_was_written() -> None:
    swap = Swap(NEW, OLD, OPTIONS)
    swap.note("a", "ready", 1, 2)
    swap.fail("PrepareFailed", {"here": "why"})
    again = Swap.from_dict(pickle.loads(pickle.dumps(swap.to_dict())))
    assert again.status() == swap.status()
    assert again.options == {**OPTIONS, "manifest": None}


def test_a_scheduler_that_came_back_in_the_old_environment_takes_all_back() -> None:
    swap = replaced(ScriptedCluster())
    successor = ScriptedCluster()
    successor.target = NEW
    asyncio.run(swap.resume(successor, {agent["address"]: agent for agent in TWO_HOSTS}))
    assert (swap.phase, swap.error) == ("failed", "CommitFailed")
    assert "does not start in environment" in swap.causes["scheduler"]
    assert successor.told("commit") == [OLD] * 3
    assert successor.target == OLD
    assert not any(event[0] == "replace scheduler" for event in successor.events), "it is back already"
    assert not swap.scheduler_moves


def test_the_way_back_takes_the_scheduler_along() -> None:
    """Workers miss in the successor: it is replaced in turn, and the second successor ends the swap as failed."""
    swap = replaced(ScriptedCluster())
    successor = ScriptedCluster(missing=[{"cluster": "3 of 3 workers did not come back"}])
    successor.target = successor.scheduler_environment = NEW
    with pytest.raises(Replaced):
        asyncio.run(swap.resume(successor, {agent["address"]: agent for agent in TWO_HOSTS}))
    assert ("replace scheduler", OLD, True) in successor.events

    last = ScriptedCluster()
    again = Swap.from_dict(pickle.loads(successor.state))
    asyncio.run(again.resume(last, {agent["address"]: agent for agent in TWO_HOSTS}))
    assert (again.phase, again.error) == ("failed", "CommitFailed")
    assert again.causes == {"cluster": "3 of 3 workers did not come back"}
    assert last.told("commit") == []
    assert "moved back" in again.outcome


def test_workers_lost_on_the_way_back_with_the_scheduler_are_named() -> None:
    swap = replaced(ScriptedCluster())
    successor = ScriptedCluster(missing=[{"tcp://w": "new"}])
    successor.target = successor.scheduler_environment = NEW
    with pytest.raises(Replaced):
        asyncio.run(swap.resume(successor, {agent["address"]: agent for agent in TWO_HOSTS}))
    again = Swap.from_dict(pickle.loads(successor.state))
    last = ScriptedCluster(missing=[{"cluster": "1 of 3 workers did not come back"}])
    asyncio.run(again.resume(last, {agent["address"]: agent for agent in TWO_HOSTS}))
    assert set(again.causes) == {"tcp://w", "cluster"}
    assert "not all of it" in again.outcome


def refuse() -> None:
    raise PermissionError("no interpreter there")


def test_a_scheduler_that_cannot_be_replaced_goes_on_and_takes_all_back() -> None:
    cluster = ScriptedCluster()
    cluster.replace = refuse
    swap = swap_on(cluster, scheduler=None)
    assert (swap.phase, swap.error) == ("failed", "CommitFailed")
    assert swap.causes == {"scheduler": "no interpreter there"}
    assert cluster.told("commit") == [NEW] * 3 + [OLD] * 3
    assert not cluster.leaving, "agents that ask are answered again"
    assert not swap.scheduler_moves


def test_no_scheduler_is_replaced_after_an_agent_failed() -> None:
    answers = {("tcp://a1", "envship_commit"): Refused("the worker ended", "StartError")}
    cluster = ScriptedCluster(answers=answers)
    swap = swap_on(cluster, scheduler=None)
    assert swap.error == "CommitFailed"
    assert not any(event[0] == "replace scheduler" for event in cluster.events)
    assert not cluster.leaving


def test_a_scheduler_that_cannot_go_back_answers_again() -> None:
    """The workers that wait for its successor may come in: better a cluster in two environments than none."""
    swap = replaced(ScriptedCluster())
    successor = ScriptedCluster(missing=[{"tcp://w": "new"}])
    successor.target = successor.scheduler_environment = NEW
    successor.replace = refuse
    asyncio.run(swap.resume(successor, {agent["address"]: agent for agent in TWO_HOSTS}))
    assert (swap.phase, swap.error) == ("failed", "CommitFailed")
    assert swap.causes == {"tcp://w": "new", "scheduler": "no interpreter there"}
    assert not successor.leaving
