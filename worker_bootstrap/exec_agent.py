"""The agents of processes that are re-executed: a worker without nanny, a scheduler of its own.

Both can prove the environment beforehand but keep no standby: `execve` replaces the very process that would hold it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import dask
import psutil
from dask.utils import parse_timedelta
from distributed.core import Status

from worker_bootstrap import launch, reexec, scheduler_state
from worker_bootstrap.agent import Agent
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.interpreter import FAILED_VARIABLE, Interpreter
from worker_bootstrap.provision import Call
from worker_bootstrap.store import Store

logger = logging.getLogger("envship.exec")

CLOSE_TIMEOUT_S = 5.0
ASIDE_INTERVAL_S = 0.1
ASIDE_TIMEOUT_S = 60.0


class ExecAgent(Agent):
    """What both kinds share: the way back, and the reasons why there may be none."""

    kind = ""
    remedy = ""

    def obstacle(self) -> str | None:
        own = launch.own()
        if own is None or own.kind != self.kind:
            return f"it was not started by `dask {self.kind}`, so it cannot be re-executed; {self.remedy}"
        return None

    async def _reserve(self, environment_id: str | None) -> None:
        """What shows here that an environment works has ended when this process moves there: so it holds it itself."""
        await self.reservations.keep(None if environment_id is None else EnvironmentId(environment_id))

    def _orders(self, interpreter: Interpreter, **more: Any) -> reexec.Orders:
        current = self._current
        fallback = (current.python, dict(current.environ), self.lease_of(current))
        return reexec.Orders(code=self.code, lease=self.lease_of(interpreter), fallback=fallback, **more)

    @property
    def _current(self) -> Interpreter:
        return Interpreter(self.environment_id, sys.prefix, sys.executable, dict(os.environ))


class WorkerAgent(ExecAgent):
    """Acts for its host in a worker that has no nanny."""

    role = kind = "worker"
    remedy = "start it with a nanny"

    def obstacle(self) -> str | None:
        if self.server.address.startswith("inproc://"):
            return (
                "it is a thread of the client's own process, as with LocalCluster(processes=False); use processes=True"
            )
        return super().obstacle()

    async def prepare(self, environment_id: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        await self._reserve(environment_id)
        interpreter = await self.interpreter(environment_id)
        request = self.start_request(interpreter, modules=["distributed.cli.dask_worker"], checks_command=True)
        return await self.probe(interpreter, request, float(options["start_timeout_s"]))

    async def commit(self, environment_id: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        if environment_id == self.environment_id and not options["scheduler_moves"]:
            self.reservations.clear()
            return {}  # It did not start where it was sent, and is back before the cluster is; see `_stand_aside`.
        interpreter = await self.interpreter(environment_id)
        # The answer must have left before the process is replaced, or the coordinator sees a broken connection.
        self.in_background(self._leave(interpreter, options))
        return {}

    async def conform(self, target: EnvironmentId | None, manifest: bytes | None, options: Mapping[str, Any]) -> None:
        """Bring a worker that came late, and was told to `hold`, into the environment *target*."""
        if target is not None and target == os.environ.get(FAILED_VARIABLE):
            await self._stand_aside(target)
            return
        try:
            if target is not None:
                await self.provide(target, manifest, options["link_mode"], reserve=True)
            await self.prepare(target, options)
            await self._leave(await self.interpreter(target), {**options, "scheduler_moves": False})
        except Exception as error:
            logger.error(
                "worker %s leaves: it must run in environment %s and cannot: %s", self.server.address, target, error
            )
            self.leave("envship-environment-unavailable", nanny=False)

    async def _stand_aside(self, failed: EnvironmentId) -> None:
        """Wait, back from an environment that this worker does not start in, for the cluster to come back as well."""
        await self.call("envship_trouble", address=self.server.address, cause="the worker does not start; see its log")
        deadline = time.monotonic() + ASIDE_TIMEOUT_S
        while time.monotonic() < deadline:
            await asyncio.sleep(ASIDE_INTERVAL_S)
            target = await self.call("envship_target")
            if target == self.environment_id:
                self.server.status = Status.running
                return
            if target != failed:
                await self.join()
                return
        logger.error("worker %s leaves: it does not start in environment %s", self.server.address, failed)
        self.leave("envship-environment-broken", nanny=False)

    async def wait_out(self, timeout_s: float) -> None:
        interpreter = await self.interpreter(self.environment_id)
        self.in_background(self._leave(interpreter, {"scheduler_moves": True, "commit_timeout_s": timeout_s}))

    def hold(self) -> None:
        """Pause the worker, in a way that its memory monitor does not undo."""
        self.server.status = Status.closing_gracefully

    async def _leave(self, interpreter: Interpreter, options: Mapping[str, Any]) -> None:
        await asyncio.sleep(0.01)
        scheduler = self.server.scheduler.address
        await self.server.close(nanny=False, executor_wait=False, timeout=CLOSE_TIMEOUT_S, reason="envship-swap")
        wait_for = reexec.dialled(scheduler) if options["scheduler_moves"] else None
        own = launch.own()
        assert own is not None
        arrival_timeout_s = reexec.arrival_timeout_s(options)
        orders = self._orders(
            interpreter, wait_for=wait_for, arrival_timeout_s=arrival_timeout_s, extra=_remaining_lifetime(own)
        )
        reexec.execute(interpreter, self.base, own, orders, self.store.layout.tmp)


class SchedulerAgent(ExecAgent):
    """Acts for its host in a scheduler that is a process of its own."""

    role = kind = "scheduler"
    remedy = "start it so, or leave it where it is (scheduler=False)"

    def __init__(self, server: Any, store: Store, call: Call) -> None:
        super().__init__(server, store, call)
        self.proven: set[str | None] = {None, self.environment_id}
        """Environments that have shown here that a scheduler starts in them; the content of one never changes."""

    async def prepare(self, environment_id: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        await self._reserve(environment_id)
        interpreter = await self.interpreter(environment_id)
        plugins = scheduler_state.dump_plugins(self.server)
        if plugins or environment_id not in self.proven:
            modules = ["distributed.cli.dask_scheduler", "cloudpickle"]
            request = self.start_request(interpreter, modules=modules, plugins=plugins, checks_command=True)
            await self.probe(interpreter, request, float(options["start_timeout_s"]))
            self.proven.add(environment_id)
        return {}

    async def succeed(self, environment_id: str | None, coordinator: dict[str, Any]) -> None:
        """Replace the scheduler by a successor in that environment, which `coordinator` describes the swap to."""
        interpreter = await self.interpreter(environment_id)
        own = launch.own()
        assert own is not None
        path = scheduler_state.save(self.server, coordinator, self.store.layout.tmp)
        services = getattr(self.server, "services", {})
        dashboard = services.get("dashboard") or getattr(self.server, "http_server", None)
        extra = [
            *reexec.pinned(own, self.server.port, getattr(dashboard, "port", None)),
            "--preload",
            "worker_bootstrap.scheduler_state",
        ]
        os.environ[reexec.STATE_VARIABLE] = str(path)
        try:
            orders = self._orders(interpreter, arrival_timeout_s=_scheduler_timeout_s(coordinator), extra=extra)
            reexec.execute(interpreter, self.base, own, orders, self.store.layout.tmp)
        finally:
            del os.environ[reexec.STATE_VARIABLE]
            path.unlink()


def _scheduler_timeout_s(coordinator: Mapping[str, Any]) -> float:
    """How long a scheduler may take to take over: nannies wait as long as a commit may take, clients as Dask does."""
    patience_s = float(parse_timedelta(dask.config.get("distributed.comm.timeouts.connect")))
    return reexec.ARRIVAL_SHARE * min(patience_s, float(coordinator["swap"]["options"]["commit_timeout_s"]))


def _remaining_lifetime(own: launch.Launch) -> list[str]:
    """What is left of ``--lifetime``, as arguments: it counts from the start of the process, whatever runs in it."""
    given = reexec.option(own.arguments, "--lifetime") or dask.config.get("distributed.worker.lifetime.duration")
    lifetime = parse_timedelta(given)
    if not lifetime:
        return []
    age = time.time() - psutil.Process().create_time()
    return ["--lifetime", f"{max(1.0, lifetime - age)} s"]
