"""The plugins that bring an agent to every nanny and every worker of a cluster.

They carry this package with them (`worker_bootstrap.carry`) and decide nothing: they make the agent, add its
operations to the server, and let it ask the coordinator where its process should run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from typing import Any

from distributed.core import Status
from distributed.diagnostics.plugin import NannyPlugin, WorkerPlugin

from worker_bootstrap.carry import Carried
from worker_bootstrap.interpreter import own_environment_id
from worker_bootstrap.reexec import Arrival

logger = logging.getLogger("envship.plugins")

ASIDE_INTERVAL_S = 0.1


class NannyAgentPlugin(Carried, NannyPlugin):  # type: ignore[misc]  # distributed is not typed
    """Makes a nanny the agent of its host, before its worker starts."""

    name = "envship-nanny-agent"

    async def setup(self, nanny: Any) -> None:
        from worker_bootstrap.hosted import RefusedProcess
        from worker_bootstrap.location import open_store
        from worker_bootstrap.nanny_agent import NannyAgent

        async def call(operation: str, **arguments: Any) -> Any:
            return await getattr(nanny.scheduler, operation)(**arguments)

        try:
            self.agent = NannyAgent(nanny, open_store(), call)
            nanny.handlers.update(self.agent.handlers())
            await self.agent.join()
        except Exception as error:
            # The nanny only logs what a plugin raises, and would start its worker in the base environment.
            target = await call("envship_target")
            if target is not None:
                logger.error("nanny %s leaves: its worker must run in environment %s: %s", nanny.address, target, error)
                nanny.process = RefusedProcess(error)
            raise

    async def teardown(self, nanny: Any) -> None:
        await self.agent.close()


class WorkerAgentPlugin(Carried, WorkerPlugin):  # type: ignore[misc]  # distributed is not typed
    """Reports where a worker runs, before its first task; without a nanny, makes it the agent of its host."""

    name = "envship-worker-agent"

    async def setup(self, worker: Any) -> None:
        async def call(operation: str, **arguments: Any) -> Any:
            return await getattr(worker.scheduler, operation)(**arguments)

        self.agent: Any = None
        try:
            if worker.nanny is None:
                await self._make_agent(worker, call)
            answer = await call("envship_hello", report=_report(worker))
        except Exception as error:
            # The worker only logs what a plugin raises, and would go on in the base environment.
            target = await call("envship_target")
            if target != own_environment_id():
                logger.error("worker %s leaves: it must run in environment %s: %s", worker.address, target, error)
                worker.status = Status.closing_gracefully
                await worker.close(nanny=True, reason="envship-environment-unavailable")
            raise
        Arrival.arrive()
        if not answer["welcome"] and worker.nanny is not None:
            worker.status = Status.closing_gracefully
            # Not in here: the nanny that is to fetch this worker waits until it has started.
            self._aside = asyncio.ensure_future(_stand_aside(worker, call, answer))

    async def _make_agent(self, worker: Any, call: Any) -> None:
        from worker_bootstrap.exec_agent import WorkerAgent
        from worker_bootstrap.location import open_store

        self.agent = WorkerAgent(worker, open_store(), call)
        worker.handlers.update(self.agent.handlers())
        await self.agent.join()

    async def teardown(self, worker: Any) -> None:
        if self.agent is not None and worker.status not in (Status.closing, Status.closed):
            await self.agent.close()


async def _stand_aside(worker: Any, call: Any, answer: dict[str, Any]) -> None:
    """Run no task: a cluster that turned back while this worker started has its nanny fetch it; else it leaves."""
    with contextlib.suppress(OSError):  # the worker is closed while it asks
        while answer["moving"] and not answer["welcome"]:
            await asyncio.sleep(ASIDE_INTERVAL_S)
            answer = await call("envship_hello", report=_report(worker))
    if worker.status != Status.closing_gracefully:
        return
    if answer["welcome"]:
        worker.status = Status.running
        return
    logger.error(
        "worker %s leaves: it runs in %s, the cluster in environment %s",
        worker.address,
        own_environment_id() or "the base environment",
        answer["target"],
    )
    await worker.close(nanny=True, reason="envship-wrong-environment")


def _report(worker: Any) -> dict[str, Any]:
    return {
        "address": worker.contact_address or worker.address,
        "nanny": worker.nanny,
        "pid": os.getpid(),
        "environment_id": own_environment_id(),
        "prefix": sys.prefix,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
