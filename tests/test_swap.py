"""The order of things in a swap, on a cluster that answers as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest

from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.roster import Gone, Refused
from worker_bootstrap.swap import Swap

NEW = EnvironmentId(digest_of(b"new"))
OLD = EnvironmentId(digest_of(b"old"))
CLIENT = "token of the client's process"
OPTIONS: dict[str, Any] = {
    "prepare_timeout_s": 5.0,
    "start_timeout_s": 5.0,
    "commit_timeout_s": 5.0,
    "keep_warm": 1,
    "link_mode": "auto",
    "scheduler": False,
    "client_token": CLIENT,
    "manifest": b"the manifest",
    "platform": "linux-64",
}


def identity(address: str, host: str, role: str = "nanny", **more: Any) -> dict[str, Any]:
    """What an agent says of itself; it runs in `OLD` unless told otherwise."""
    return {
        "address": address,
        "role": role,
        "host_id": host,
        "hostname": f"{host}.example",
        "token": f"token of {address}",
        "environment_id": OLD,
        "platform": "linux-64",
        "obstacle": None,
        **more,
    }


SCHEDULER = identity("tcp://s", "a", "scheduler")
TWO_HOSTS = (identity("tcp://a1", "a"), identity("tcp://a2", "a"), identity("tcp://b1", "b", "worker"))


class ScriptedRoster:
    """Agents that remember what they were asked, and answer as *answers* say, by (address, operation)."""

    def __init__(self, agents: Sequence[Mapping[str, Any]], answers: Mapping[tuple[str, str], Any]) -> None:
        self.members = {agent["address"]: dict(agent) for agent in agents}
        self.answers = dict(answers)
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.unknown: list[str] = []

    async def agents(self) -> dict[str, dict[str, Any]]:
        return dict(self.members)

    def strangers(self, agents: Mapping[str, Any]) -> list[str]:
        return self.unknown

    async def ask(self, address: str, operation: str, **arguments: Any) -> Any:
        self.asked.append((address, operation, arguments))
        answer = self.answers.get((address, operation), {})
        if callable(answer):
            answer = answer(**arguments)
        if isinstance(answer, Awaitable):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer


class ScriptedCluster:
    """The coordinator's side. *missing* is answered, in turn, to the question which workers are not in the target."""

    def __init__(
        self,
        agents: Sequence[Mapping[str, Any]] = (*TWO_HOSTS, SCHEDULER),
        answers: Mapping[tuple[str, str], Any] | None = None,
        missing: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.roster: Any = ScriptedRoster(agents, answers or {})
        self.target: EnvironmentId | None = OLD
        self.scheduler_environment: EnvironmentId | None = OLD
        self.leaving = False
        self.arriving = 0
        self.looks = 0
        self.options: dict[str, Any] = {}
        self.events: list[Any] = []
        self.expected: list[int] = []
        self.replace: Callable[[], Any] = lambda: None
        self._missing = list(missing)

    def blameless(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def awaits_chunks(self) -> bool:
        self.looks += 1
        return self.looks <= self.arriving

    async def workers_in_target(self, count: int, timeout_s: float) -> Mapping[str, str]:
        self.events.append(("wait for workers in", self.target))
        self.expected.append(count)
        return self._missing.pop(0) if self._missing else {}

    async def replace_scheduler(self, environment_id: EnvironmentId | None, swap: Swap) -> None:
        self.events.append(("replace scheduler", environment_id, self.leaving))
        self.state = pickle.dumps(swap.to_dict())
        self.replace()
        raise _Replaced

    async def tell_newcomers(self, known: Sequence[str]) -> None:
        self.events.append(("tell all but", sorted(known)))

    def conform_late(self, known: Sequence[str]) -> None:
        self.events.append(("conform all but", sorted(known)))

    def asked(self, operation: str) -> list[str]:
        """Addresses that were asked *operation*, sorted."""
        return sorted(address for address, name, _ in self.roster.asked if name == f"envship_{operation}")

    def told(self, operation: str) -> list[EnvironmentId | None]:
        """The environments that *operation* was asked for, in order."""
        return [more["environment_id"] for _, name, more in self.roster.asked if name == f"envship_{operation}"]


class _Replaced(BaseException):
    """The process that ran the swap is no more."""


def swap_on(cluster: ScriptedCluster, **options: Any) -> Swap:
    """Run a swap from `OLD` to `NEW` to its end."""
    swap = Swap(NEW, OLD, {**OPTIONS, **options})
    asyncio.run(swap.run(cluster))
    return swap


def replaced(cluster: ScriptedCluster, **options: Any) -> Swap:
    """Run a swap until the scheduler is replaced; return what its successor reads."""
    swap = Swap(NEW, OLD, {**OPTIONS, "scheduler": None, **options})
    with pytest.raises(_Replaced):
        asyncio.run(swap.run(cluster))
    return Swap.from_dict(pickle.loads(cluster.state))


WORKERS = sorted(agent["address"] for agent in TWO_HOSTS)


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


# -- the scheduler moves


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
    with pytest.raises(_Replaced):
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
    with pytest.raises(_Replaced):
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
