"""The coordinator: the scheduler plugin that knows the target environment and who has what.

It hears agents that join, answers the client, hands out chunks (`worker_bootstrap.tracker`), and runs one
`worker_bootstrap.swap.Swap` at a time. It holds manifests only in passing and chunks never.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps

from worker_bootstrap import metrics
from worker_bootstrap.agent import answering
from worker_bootstrap.carry import Carried
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.exchange import Exchange
from worker_bootstrap.exec_agent import SchedulerAgent
from worker_bootstrap.location import open_store
from worker_bootstrap.plugins import NannyAgentPlugin, WorkerAgentPlugin
from worker_bootstrap.relay import Relay
from worker_bootstrap.roster import Roster
from worker_bootstrap.scheduler_state import COORDINATOR
from worker_bootstrap.swap import Swap
from worker_bootstrap.swap_queue import TOLD_LATER, SwapQueue

logger = logging.getLogger("envship.coordinator")

RELEASE_TIMEOUT_S = 2.0
"""A worker that was told to close and has not said so by then hangs; the scheduler lets go of it anyway."""
PROTOCOL = 7
"""Of the operations that clients and agents call; a client of another one is told so."""
POLL_INTERVAL_S = 0.005
AWAKE_INTERVAL_S = 0.1
SUCCESSION_TIMEOUT_S = 60.0
"""So long an agent waits for the scheduler's successor."""
EVENTS = "envship"
"""Topic of the scheduler's event log: ``client.get_events("envship")``."""


class Coordinator(Carried, SchedulerPlugin):  # type: ignore[misc]  # distributed is not typed
    """Scheduler plugin: target environment, membership, chunks, swaps."""

    name = COORDINATOR
    idempotent = True

    def __init__(self) -> None:
        self.scheduler: Any = None
        self.agent: SchedulerAgent
        self.roster: Roster
        self.exchange: Exchange
        self.relay: Relay
        self.target: EnvironmentId | None = None
        self.reports: dict[str, dict[str, Any]] = {}
        self.troubles: dict[str, str] = {}
        self.queue: SwapQueue
        self.options: dict[str, Any] = dict(TOLD_LATER)
        self._reported = asyncio.Event()
        self.leaving = False
        self._resumed: tuple[Swap, dict[str, dict[str, Any]]] | None = None
        self._waiting: list[Mapping[str, Any]] = []
        self._awake: asyncio.Task[Any] | None = None

    # -- life

    async def start(self, scheduler: Any) -> None:
        """Install the operations, then bring the agents to every nanny and worker."""
        self._install(scheduler)
        if NannyAgentPlugin.name not in scheduler.nanny_plugins:
            plugin = NannyAgentPlugin()
            await scheduler.register_nanny_plugin(comm=None, plugin=dumps(plugin), name=plugin.name, idempotent=True)
        if WorkerAgentPlugin.name not in scheduler.worker_plugins:
            gate = WorkerAgentPlugin()
            await scheduler.register_worker_plugin(comm=None, plugin=dumps(gate), name=gate.name, idempotent=True)
        # Once: Dask starts a plugin again that was there before it started itself, and each swap would run twice.
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self.queue.resume(*resumed)
            self.queue.take_over(self._waiting)
            self._stay_awake()

    def take_over(self, scheduler: Any, state: Mapping[str, Any]) -> None:
        """Continue what the predecessor of *scheduler* wrote down; before anybody can connect."""
        self.target = state["target"]
        self.options = state["options"]
        self._resumed = (Swap.from_dict(state["swap"]), state["agents"])
        self._waiting = state["waiting"]
        self._install(scheduler)
        self.agent.proven.update(state["proven"])

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """SchedulerPlugin hook: a worker is gone; without nanny it was an agent, and comes back at another address."""
        self.roster.members.pop(worker, None)
        self.exchange.tracker.remove_address(worker)
        self.reports.pop(worker, None)
        self._reported.set()

    def remove_client(self, scheduler: Any, client: str) -> None:
        """SchedulerPlugin hook: a client is gone."""
        self.agent.in_background(self.exchange.client_gone(client))

    async def close(self) -> None:
        """SchedulerPlugin hook: the scheduler closes."""
        await self.exchange.pulling.close()
        await self.relay.close()
        await self.agent.close()

    def _install(self, scheduler: Any) -> None:
        if self.scheduler is not None:
            return
        self.scheduler = scheduler
        self.agent = SchedulerAgent(scheduler, open_store(), self._call_self)
        self.roster = Roster(scheduler)
        self.exchange = Exchange(self.roster, self.agent.store, self._log)
        self.queue = SwapQueue(self, self.agent.store, self.agent.in_background, self._log)
        metrics.publish(self.exchange.ledger, self.queue)
        operations = {
            "envship_join": self.join,
            "envship_hello": self.hello,
            "envship_trouble": self.trouble,
            "envship_target": self.told_target,
            "envship_release": self.release,
            "envship_want": self.exchange.want,
            "envship_next_batches": self.next_batches,
            "envship_give_up": self.exchange.give_up,
            "envship_report": self.report,
        }
        answered: dict[str, Callable[..., Awaitable[Any]]] = {
            "envship_protocol": self.protocol,
            "envship_survey_bundle": self.exchange.survey,
            "envship_find_manifest": self.exchange.find_manifest,
            "envship_bases": self.exchange.bases,
            "envship_offer": self.exchange.offer,
            "envship_uploaded": self.exchange.uploaded,
            "envship_withdraw": self.exchange.withdraw,
            "envship_expect": self.expect,
            "envship_use": self.use,
            "envship_stage": self.stage,
            "envship_wait": self.queue.wait,
            "envship_status": self.status,
        }
        scheduler.handlers.update(self.agent.handlers())
        self.relay = Relay(scheduler.rpc.connection_args, self.roster.members)
        scheduler.handlers.update(self.relay.handlers())
        scheduler.handlers.update(operations)
        scheduler.handlers.update({name: answering(method) for name, method in answered.items()})

    async def _call_self(self, operation: str, **arguments: Any) -> Any:
        return await self.scheduler.handlers[operation](**arguments)

    # -- what agents and workers ask

    async def join(self, identity: dict[str, Any]) -> dict[str, Any]:
        """An agent announces itself, and learns where its process should run."""
        if self.leaving:
            return {"wait": True, "timeout_s": SUCCESSION_TIMEOUT_S}
        self.roster.add(identity)
        manifest = await self.queue.manifest(self.target) if identity["environment_id"] != self.target else None
        return {"target": self.target, "manifest": manifest and manifest.to_bytes(), "options": self.options}

    async def hello(self, report: dict[str, Any]) -> dict[str, Any]:
        """A worker says where it runs, before its first task; ``welcome`` tells whether it may stay.

        One that may not shall wait while the cluster is ``moving``: its nanny is asked to fetch it.
        """
        self.reports[report["address"]] = report
        self._reported.set()
        welcome = report["environment_id"] == self.target
        return {"welcome": welcome, "target": self.target, "moving": self.queue.moving}

    async def trouble(self, address: str, cause: str) -> None:
        """An agent could not start its worker in the target environment."""
        identity = self.roster.members.get(address, {"hostname": ""})
        self.troubles[f"{identity['hostname']} ({address})"] = cause
        self._reported.set()

    async def told_target(self) -> EnvironmentId | None:
        """Where processes of this cluster should run."""
        return self.target

    async def release(self, address: str) -> None:
        """Let go of a worker that was told to close, so that its successor may use its name at once."""
        deadline = time.monotonic() + RELEASE_TIMEOUT_S
        while time.monotonic() < deadline:
            worker = self.scheduler.workers.get(address)
            if worker is None:
                return
            if worker.status in (Status.closing, Status.closed):
                break
            await asyncio.sleep(POLL_INTERVAL_S)
        await _remove_worker(self.scheduler, address)

    @contextlib.contextmanager
    def blameless(self) -> Iterator[None]:
        """Tasks that lose their worker to a swap are not charged for it (``allowed-failures``)."""
        scheduler = self.scheduler
        allowed, scheduler.allowed_failures = scheduler.allowed_failures, sys.maxsize
        charged = {task: task.suspicious for task in scheduler.tasks.values()}
        try:
            yield
        finally:
            scheduler.allowed_failures = allowed
            for task in scheduler.tasks.values():
                task.suspicious = charged.get(task, 0)

    async def next_batches(self, host_id: str, errand: str, outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A host tells what became of its batches, and asks for the next ones; see `Exchange.next_batches`."""
        for outcome in outcomes:
            done_bytes, total_bytes = self.exchange.settle(host_id, **outcome)
            await self.report(host_id, "fetching", done_bytes, total_bytes)
        return await self.exchange.next_batches(host_id, errand)

    async def report(self, host_id: str, state: str, done_bytes: int, total_bytes: int) -> None:
        """A host tells how far it is."""
        detail = self.exchange.describe(host_id) if state == "fetching" else ""
        self.queue.report(host_id, state, done_bytes, total_bytes, detail)

    # -- what the client asks

    async def protocol(self) -> int:
        """Which operations this coordinator understands."""
        return PROTOCOL

    async def expect(self, environment_id: str | None, start_timeout_s: float) -> None:
        """A client looks what has changed in an environment, and will probably `use` this one: nothing, as a rule.

        Hosts where it is built start its interpreter meanwhile. None: it will not.
        """
        if environment_id is not None and (self.queue.busy or environment_id == self.target):
            return
        what = {"environment_id": environment_id, "start_timeout_s": start_timeout_s}
        for address, identity in self.roster.members.items():
            if identity["role"] == "nanny":
                self.agent.in_background(self.roster.ask_quietly(address, "envship_expect", **what))

    async def use(self, environment_id: str | None, options: dict[str, Any]) -> str:
        """Begin a swap; returns its id. Swaps of several clients take turns."""
        swap_id = self.queue.begin(None if environment_id is None else EnvironmentId(environment_id), options)
        self._stay_awake()
        return swap_id

    async def stage(self, environment_id: str, options: dict[str, Any]) -> str:
        """Bring an environment to every host and build it there, without moving anybody."""
        swap_id = self.queue.begin(EnvironmentId(environment_id), {**options, "stage_only": True})
        self._stay_awake()
        return swap_id

    async def status(self) -> dict[str, Any]:
        """Who runs what, who holds what."""
        agents = await self.roster.agents()
        store = self.agent.store
        built: dict[str, list[str]] = {}
        for address, identity in agents.items():
            if identity["host_id"] not in built:
                built[identity["host_id"]] = list(await self.roster.ask_quietly(address, "envship_built") or [])
        return {
            "target": self.target,
            "agents": agents,
            "built": built,
            "workers": {
                address: {**self.reports.get(address, {}), "name": str(worker.name)}
                for address, worker in self.scheduler.workers.items()
            },
            "environments": await asyncio.to_thread(_describe_all, store),
            "scheduler_address": self.scheduler.address,
            "transfers": self.exchange.ledger.to_dict(),
        }

    # -- what a swap needs (worker_bootstrap.swap.Cluster)

    @property
    def scheduler_environment(self) -> EnvironmentId | None:
        return self.agent.environment_id

    def awaits_chunks(self) -> bool:
        return self.exchange.tracker.promised()

    async def workers_in_target(self, count: int, timeout_s: float) -> dict[str, str]:
        deadline = time.monotonic() + timeout_s
        while True:
            self._reported.clear()
            running = {a: self.reports.get(a, {}).get("environment_id") for a in self.scheduler.workers}
            astray = [address for address, environment_id in running.items() if environment_id != self.target]
            if not astray and len(running) >= count:
                return {}
            if self.troubles:
                troubles, self.troubles = self.troubles, {}
                return troubles
            left = deadline - time.monotonic()
            try:
                await asyncio.wait_for(self._reported.wait(), max(0.0, left))
            except asyncio.TimeoutError:
                break
        causes = {address: f"runs in {running[address] or 'the base environment'}" for address in astray}
        if len(running) < count:
            causes["cluster"] = f"{count - len(running)} of {count} workers did not come back within {timeout_s:.0f} s"
        return causes

    async def replace_scheduler(self, environment_id: EnvironmentId | None, swap: Swap) -> None:
        agents = {a: identity for a, identity in self.roster.members.items() if identity["role"] != "scheduler"}
        state = {
            "target": self.target,
            "options": self.options,
            "swap": swap.to_dict(),
            "agents": agents,
            "proven": list(self.agent.proven),
            "waiting": self.queue.unfinished(but=swap),
        }
        await self._until_left()
        await self.agent.succeed(environment_id, state)

    async def _until_left(self) -> None:
        """Workers without nanny that lost their scheduler before they have begun to leave would end for good."""

        async def gone() -> None:
            while any(worker.nanny is None for worker in self.scheduler.workers.values()):
                self._reported.clear()
                await self._reported.wait()

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(gone(), RELEASE_TIMEOUT_S)

    async def tell_newcomers(self, known: Sequence[str]) -> None:
        newcomers = [a for a, who in self.roster.members.items() if a not in known and who["role"] != "scheduler"]
        await asyncio.gather(
            *(self.roster.ask_quietly(a, "envship_wait_out", timeout_s=SUCCESSION_TIMEOUT_S) for a in newcomers)
        )

    def conform_late(self, known: Sequence[str]) -> None:
        for address, identity in self.roster.members.items():
            late = address not in known and identity["role"] != "scheduler"
            if late and identity["environment_id"] != self.target:
                self.agent.in_background(self.roster.ask_quietly(address, "envship_rejoin"))

    # -- own

    def _stay_awake(self) -> None:
        """A cluster on its way into an environment may have no task for long: for ``idle-timeout``, it is not idle."""

        async def while_busy() -> None:
            while self.queue.busy:
                self.scheduler.idle_since = None
                await asyncio.sleep(AWAKE_INTERVAL_S)

        if self._awake is None or self._awake.done():
            self._awake = self.agent.in_background(while_busy())

    def _log(self, stage: str, **what: Any) -> None:
        self.scheduler.log_event(EVENTS, {"stage": stage, **what})


async def _remove_worker(scheduler: Any, address: str) -> None:
    """`Scheduler.remove_worker` of a worker that closes by itself; the flag's name changed in 2024.10."""
    parameters = _parameters_of(type(scheduler).remove_worker)
    flag = "expected" if "expected" in parameters else "safe"
    await scheduler.remove_worker(address, stimulus_id=f"envship-swap-{time.time()}", close=False, **{flag: True})


@functools.cache
def _parameters_of(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _describe_all(store: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for environment_id in store.environments():
        try:
            manifest = store.read_manifest(environment_id)
        except EnvshipError as error:  # damaged, or evicted in this moment
            logger.info("environment %s is not shown: %s", environment_id[:16], error)
            continue
        found[environment_id] = {"packages": len(manifest.packages), "size_bytes": manifest.size_bytes}
    return found
