"""One swap: the cluster moves from one environment to another, in two phases.

*Prepare* touches nothing that runs; only when every host is ready does *commit* begin, and only when every worker
reports from the new environment is the swap over. Otherwise the cluster goes back. A scheduler that moves as well is
replaced in the middle of the commit: its successor picks the swap up with `Swap.resume`.

Knows the cluster only through the `Cluster` protocol, so that the order of things can be tested without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.roster import Gone, Refused, Roster
from worker_bootstrap.swap_account import SwapAccount

logger = logging.getLogger("envship.swap")

LOST_CHUNKS = ("TransferError", "ChunkMissing", "ChunkInvalid")
"""Errors after which a swap works out if the client brings what has got lost."""

JOIN_TIMEOUT_S = 3.0
"""So long a worker that has just registered may take until its agent answers."""
JOIN_INTERVAL_S = 0.1
ANSWER_TIMEOUT_S = 10.0
"""So much longer than a commit may take an agent is waited for: it says by itself who has not arrived."""


class Cluster(Protocol):
    """What a swap needs of the coordinator. Agents are identified by their address."""

    roster: Roster
    target: EnvironmentId | None
    options: dict[str, Any]
    """What processes that come late are told about how to get to the target."""
    leaving: bool
    """The scheduler is about to be replaced: agents that ask shall wait for its successor."""

    @property
    def scheduler_environment(self) -> EnvironmentId | None:
        """Where the scheduler itself runs."""

    def blameless(self) -> contextlib.AbstractContextManager[None]:
        """As long as it is open, tasks are not charged for workers that they lose."""

    def awaits_chunks(self) -> bool:
        """Whether chunks are still being brought into the cluster."""

    async def workers_in_target(self, count: int, timeout_s: float) -> Mapping[str, str]:
        """Wait until *count* workers report from the target and none from elsewhere; returns who does not."""

    async def replace_scheduler(self, environment_id: EnvironmentId | None, swap: Swap) -> None:
        """Re-execute the scheduler; returns only by raising, or not at all."""

    async def tell_newcomers(self, known: Sequence[str]) -> None:
        """Have all agents but the *known* ones wait for the scheduler's successor."""

    def conform_late(self, known: Sequence[str]) -> None:
        """See to agents that joined meanwhile, all but the *known* ones."""


class Swap(SwapAccount):
    """A swap: where to, how, and how far it is."""

    async def run(self, cluster: Cluster) -> None:
        """Prepare, then commit. Never raises: the outcome is in `status`."""
        try:
            agents = await self.prepare(cluster)
            if agents is not None and self.options.get("stage_only"):
                self.set_phase("done")
            elif agents is not None:
                with cluster.blameless():
                    await self.commit(cluster, agents)
        except Exception as error:
            self._break_off(error)

    async def prepare(self, cluster: Cluster) -> Mapping[str, Mapping[str, Any]] | None:
        """Get every host ready; returns the agents, or None after a failure that touched nothing."""
        started = time.perf_counter()
        agents = await cluster.roster.agents()
        deadline = started + JOIN_TIMEOUT_S
        while cluster.roster.strangers(agents) and time.perf_counter() < deadline:
            await asyncio.sleep(JOIN_INTERVAL_S)  # a worker registers before its plugin has started
            agents = await cluster.roster.agents()
        moving = self._who_moves(agents)
        obstacles = {_label(agents[a]): agents[a]["obstacle"] for a in moving if agents[a]["obstacle"]}
        obstacles.update(
            (address, "nothing of ours answers for this worker; its log says why the plugin did not start")
            for address in cluster.roster.strangers(agents)
        )
        if obstacles:
            self.fail("NotSwappable", obstacles)
            return None
        elsewhere = {
            _label(agents[a]): agents[a]["platform"]
            for a in moving
            if self.options["platform"] not in (None, agents[a]["platform"])
        }
        if elsewhere:
            self.fail("IncompatibleEnvironment", elsewhere)
            return None
        hosts: dict[str, list[str]] = {}
        for address in moving or agents:
            hosts.setdefault(agents[address]["host_id"], []).append(address)
        self.labels = {host_id: agents[first[0]]["hostname"] for host_id, first in hosts.items()}
        self.expected = sum(identity["role"] != "scheduler" for identity in agents.values())
        if not moving:
            for host_id in hosts:
                self.note(host_id, "ready")
            self.set_phase("done")
            return None
        self.moves = True
        self.set_phase("prepare")
        causes: dict[str, str] = {}
        results = await asyncio.gather(
            *(self._prepare_host(cluster, host_id, addresses) for host_id, addresses in hosts.items()),
            return_exceptions=True,
        )
        for (host_id, addresses), result in zip(hosts.items(), results):
            if isinstance(result, BaseException):
                causes[_label(agents[addresses[0]])] = str(result) or repr(result)
                self.chunks_lost |= getattr(result, "kind", "") in LOST_CHUNKS
                self.note(host_id, "failed", detail=str(result))
        self.seconds["prepare"] = time.perf_counter() - started
        if causes:
            await self._discard(cluster, moving)
            self.fail("PrepareFailed", causes)
            return None
        return {address: agents[address] for address in moving}

    async def commit(self, cluster: Cluster, agents: Mapping[str, Mapping[str, Any]]) -> None:
        """Move everybody; back again if that does not work out."""
        self.committed_at = time.time()
        self.set_phase("commit")
        cluster.target = self.environment_id
        cluster.leaving = self.scheduler_moves
        causes = await self._commit_all(cluster, agents)
        if self.scheduler_moves and not causes:
            causes = await self._replace_scheduler(cluster, self.environment_id, agents)
        cluster.leaving = self.scheduler_moves = False
        await self._settle(cluster, agents, causes)

    async def resume(self, cluster: Cluster, agents: Mapping[str, Mapping[str, Any]]) -> None:
        """Finish, in the scheduler's successor, what its predecessor began."""
        causes = {}
        if self.scheduler_moves and cluster.scheduler_environment != cluster.target:
            causes["scheduler"] = f"it does not start in {_name(cluster.target)}; its log says why"
            self.scheduler_moves = False
        try:
            await self._settle(cluster, agents, causes)
        except Exception as error:
            self._break_off(error)

    async def _prepare_host(self, cluster: Cluster, host_id: str, addresses: Sequence[str]) -> None:
        self.note(host_id, "waiting")
        work = asyncio.ensure_future(self._provide_and_start(cluster, host_id, addresses))
        timeout_s = self.options["prepare_timeout_s"]
        try:
            await asyncio.wait({work}, timeout=timeout_s)
            # Who waits for a client's upload is not slow: its time begins when that is through.
            while not work.done() and cluster.awaits_chunks():
                await asyncio.wait({work}, timeout=timeout_s)
            if not work.done():
                raise Refused(f"not ready after {timeout_s:.0f} s", "TimeoutError")
            work.result()
        finally:
            work.cancel()
        self.note(host_id, "ready")

    async def _provide_and_start(self, cluster: Cluster, host_id: str, addresses: Sequence[str]) -> None:
        options = self._plain_options()
        if self.environment_id is not None:
            provided = await self._provide(cluster, addresses)
            seconds = (provided or {}).get("seconds", {})
            options["built_anew"] = seconds.get("build", 0.0) > 0
            for name, value in seconds.items():
                self.seconds[name] = max(self.seconds.get(name, 0.0), value)
        if self.options.get("stage_only"):
            return
        self.note(host_id, "starting")
        started = time.perf_counter()
        await asyncio.gather(*(self._prove(cluster, address, options) for address in addresses))
        self.seconds["start"] = max(self.seconds.get("start", 0.0), time.perf_counter() - started)

    async def _provide(self, cluster: Cluster, addresses: Sequence[str]) -> dict[str, Any] | None:
        """Have the first agent of a host that is there fetch and build; the others share its store."""
        what = {"environment_id": self.environment_id, "link_mode": self.options["link_mode"]}
        what.update((name, self.options[name]) for name in ("chunks_only", "rate_limit") if self.options.get(name))
        if not self.options.get("stage_only"):
            what["reserve"] = True
        for address in addresses:
            try:
                try:
                    answer: dict[str, Any] = await cluster.roster.ask(address, "envship_provide", **what)
                except Refused as error:
                    if error.kind != "EnvironmentMissing":
                        raise
                    manifest = self.options["manifest"]
                    answer = await cluster.roster.ask(address, "envship_provide", manifest=manifest, **what)
                return answer
            except Gone:
                continue
        return None

    async def _prove(self, cluster: Cluster, address: str, options: Mapping[str, Any]) -> None:
        try:
            await cluster.roster.ask(address, "envship_prepare", environment_id=self.environment_id, options=options)
        except Gone:
            logger.info("agent %s left while the swap was prepared", address)

    async def _commit_all(self, cluster: Cluster, agents: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        options = {**self._plain_options(), "scheduler_moves": self.scheduler_moves}
        movers = [address for address, identity in agents.items() if identity["role"] != "scheduler"]
        results = await asyncio.gather(
            *(
                _in_time(
                    cluster.roster.ask(address, "envship_commit", environment_id=cluster.target, options=options),
                    float(self.options["commit_timeout_s"]) + ANSWER_TIMEOUT_S,
                )
                for address in movers
            ),
            return_exceptions=True,
        )
        causes = {}
        for address, result in zip(movers, results):
            if isinstance(result, Gone):
                self.expected -= 1
            elif isinstance(result, BaseException):
                causes[_label(agents[address])] = str(result) or repr(result)
        return causes

    async def _settle(
        self, cluster: Cluster, agents: Mapping[str, Mapping[str, Any]], causes: Mapping[str, str]
    ) -> None:
        """Wait for every worker's report; go back if one is missing."""
        failed = dict(causes)
        if not failed:
            missing = await cluster.workers_in_target(self.expected, self.options["commit_timeout_s"])
            failed.update(missing)
        if self.error is not None:  # this was the way back
            self._end_of_way_back(failed)
        elif failed:
            await self._go_back(cluster, failed)
        else:
            self.downtime_s = time.time() - self.committed_at
            self.seconds["commit"] = self.downtime_s
            self.set_phase("done")
        cluster.conform_late(list(agents))

    async def _go_back(self, cluster: Cluster, causes: Mapping[str, str]) -> None:
        logger.error("swap to %s is taken back: %s", self.environment_id, causes)
        self.causes = dict(causes)
        self.error = "CommitFailed"
        self.outcome = f"the cluster was moved back to {_name(self.previous_id)}"
        cluster.target = self.previous_id
        self.set_phase("back")
        agents = await cluster.roster.agents()
        cluster.leaving = self.scheduler_moves
        problems = await self._commit_all(cluster, agents)
        if self.scheduler_moves:
            problems.update(await self._replace_scheduler(cluster, self.previous_id, agents))
            cluster.leaving = self.scheduler_moves = False
        problems.update(await cluster.workers_in_target(self.expected, self.options["commit_timeout_s"]))
        self._end_of_way_back(problems)

    def _end_of_way_back(self, problems: Mapping[str, str]) -> None:
        if problems:
            self.outcome = f"the cluster was moved back to {_name(self.previous_id)}, but not all of it came along"
            self.causes.update(problems)
        self.set_phase("failed")

    async def _replace_scheduler(
        self, cluster: Cluster, environment_id: EnvironmentId | None, agents: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, str]:
        """Returns only if the scheduler could not be replaced, with the cause."""
        try:
            await cluster.tell_newcomers(list(agents))
            await cluster.replace_scheduler(environment_id, self)
        except Exception as error:
            logger.exception("the scheduler could not be re-executed")
            return {"scheduler": str(error) or repr(error)}
        return {}

    async def _discard(self, cluster: Cluster, addresses: Sequence[str]) -> None:
        await asyncio.gather(
            *(cluster.roster.ask(a, "envship_discard", environment_id=self.environment_id) for a in addresses),
            return_exceptions=True,
        )

    def _who_moves(self, agents: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Addresses of the agents whose process is to move; decides whether the scheduler does.

        A worker does not outlive its scheduler, so all workers are started again when the scheduler moves.
        """
        elsewhere = [a for a, identity in agents.items() if identity["environment_id"] != self.environment_id]
        schedulers = [a for a in elsewhere if agents[a]["role"] == "scheduler"]
        if self.options["scheduler"] is None:
            # A scheduler in the client's own process is in the client's environment by definition.
            schedulers = [a for a in schedulers if agents[a]["token"] != self.options["client_token"]]
        elif self.options["scheduler"] is False:
            schedulers = []
        self.scheduler_moves = bool(schedulers)
        workers = agents if self.scheduler_moves else elsewhere
        return [a for a in workers if agents[a]["role"] != "scheduler"] + schedulers

    def _plain_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name != "manifest"}

    def _break_off(self, error: Exception) -> None:
        """An error that nobody foresaw: the client, who waits, is told at least that."""
        logger.error("swap %s failed", self.id, exc_info=error)
        began = self.committed_at > 0
        if began:
            self.outcome = "the swap broke off in the middle; the status says who runs where"
        causes = {**self.causes, "scheduler": f"{type(error).__name__}: {error}"}
        self.fail("CommitFailed" if began else "PrepareFailed", causes)


async def _in_time(answer: Awaitable[Any], timeout_s: float) -> Any:
    try:
        return await asyncio.wait_for(answer, timeout_s)
    except asyncio.TimeoutError:
        raise Refused(f"no answer within {timeout_s:.0f} s", "TimeoutError") from None


def _label(identity: Mapping[str, Any]) -> str:
    return f"{identity['hostname']} ({identity['role']} {identity['address']})"


def _name(environment_id: EnvironmentId | None) -> str:
    return "the base environment" if environment_id is None else f"environment {environment_id[:16]}"
