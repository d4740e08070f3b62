"""A cluster that answers as it is told, for the order of things in a swap."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest

from worker_bootstrap.digest import EnvironmentId, digest_of
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
        raise Replaced

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


class Replaced(BaseException):
    """The process that ran the swap is no more."""


def swap_on(cluster: ScriptedCluster, **options: Any) -> Swap:
    """Run a swap from `OLD` to `NEW` to its end."""
    swap = Swap(NEW, OLD, {**OPTIONS, **options})
    asyncio.run(swap.run(cluster))
    return swap


def replaced(cluster: ScriptedCluster, **options: Any) -> Swap:
    """Run a swap until the scheduler is replaced; return what its successor reads."""
    swap = Swap(NEW, OLD, {**OPTIONS, "scheduler": None, **options})
    with pytest.raises(Replaced):
        asyncio.run(swap.run(cluster))
    return Swap.from_dict(pickle.loads(cluster.state))


WORKERS = sorted(agent["address"] for agent in TWO_HOSTS)
