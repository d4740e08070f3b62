"""A nanny's worker process that runs in an environment of its own.

`Nanny.instantiate` starts whatever object stands in ``nanny.process``; the classes here stand there. `HostedProcess`
behaves like `distributed.nanny.WorkerProcess`, but starts its worker with another interpreter. `PendingProcess`
and `RefusedProcess` are for a nanny that must not start a worker yet, or at all.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
from collections.abc import Callable, Mapping
from typing import Any

from distributed.core import Status

from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.standby import Standby, exit_text

logger = logging.getLogger("envship.hosted")

KILL_TIMEOUT_S = 5.0


class _ProcessHandle:
    """The part of `AsyncProcess` that `NannyMemoryManager` uses."""

    def __init__(self, standby: Standby) -> None:
        self.pid = standby.pid
        self._standby = standby

    def terminate(self) -> None:
        self._standby.signal(signal.SIGTERM)

    def kill(self) -> None:
        self._standby.signal(signal.SIGKILL)


class HostedProcess:
    """Stands in ``nanny.process``: a worker in the environment of *interpreter*.

    Parameters
    ----------
    start_standby
        Makes a new `Standby`; called for every start after the first.
    standby
        A standby that is ready already, used for the first start.
    on_exit
        Called with the exit code when the worker's process has ended; None once it has been replaced.
    override
        Worker options for the first start only (what is left of ``lifetime``).
    """

    def __init__(
        self,
        interpreter: Interpreter,
        start_standby: Callable[[], Any],
        on_exit: Callable[[int], None],
        standby: Standby | None = None,
        override: Mapping[str, Any] | None = None,
    ) -> None:
        self.interpreter = interpreter
        self.on_exit: Callable[[int], None] | None = on_exit
        self.status = Status.init
        self.worker_address: str | None = None
        self.worker_dir: str | None = None
        self.process: _ProcessHandle | None = None
        self.running = asyncio.Event()
        self.stopped = asyncio.Event()
        self._start_standby = start_standby
        self._next = standby
        self._override = override
        self._standby: Standby | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> Status:
        """Start the worker; as `WorkerProcess.start`."""
        if self.status == Status.running:
            return self.status
        if self.status == Status.starting:
            await self.running.wait()
            return self.status
        self.status = Status.starting
        self.running.clear()
        self.stopped.clear()
        try:
            await self._start_worker()
        except BaseException:
            self.status = Status.failed
            raise
        finally:
            self.running.set()
        return self.status

    async def _start_worker(self) -> None:
        standby, self._next = self._next, None
        if standby is None or not standby.alive:
            standby = await self._start_standby()
        override, self._override = self._override, None
        self._standby = standby
        self.process = _ProcessHandle(standby)
        try:
            self.worker_address, self.worker_dir = await standby.run(override)
        except BaseException:
            await standby.discard()
            self._standby = self.process = None
            raise
        self.status = Status.running
        self._watcher = asyncio.create_task(self._watch(standby))

    async def _watch(self, standby: Standby) -> None:
        code = await standby.wait()
        if code != 0:
            logger.info("worker process %d ended with %s", standby.pid, exit_text(code))
        self.status = Status.stopped
        self._standby = self.process = None
        if self.worker_dir is not None:
            # A worker that was killed leaves its spilled data behind; removing gigabytes must not block the loop.
            await asyncio.to_thread(shutil.rmtree, self.worker_dir, ignore_errors=True)
        self.worker_dir = None
        self.running.clear()
        self.stopped.set()
        if self.on_exit is not None:
            self.on_exit(code)

    async def kill(
        self, timeout: float = KILL_TIMEOUT_S, executor_wait: bool = True, reason: str = "hosted-kill"
    ) -> None:
        """Stop the worker; as `WorkerProcess.kill`."""
        if self.status == Status.starting:
            await self.running.wait()
        standby = self._standby
        if standby is None:
            if self._next is not None:
                await self._next.discard()
                self._next = None
            self.status = Status.stopped
            return
        if self.status != Status.stopping:
            self.status = Status.stopping
            standby.stop(timeout * 0.8, executor_wait, reason)
        try:
            await asyncio.wait_for(self.stopped.wait(), timeout * 0.8)
        except asyncio.TimeoutError:
            logger.warning("worker process %d does not stop after %.1f s: killed", standby.pid, timeout * 0.8)
            standby.signal(signal.SIGKILL)
            await self.stopped.wait()

    def is_alive(self) -> bool:
        return self._standby is not None and self._standby.alive

    @property
    def pid(self) -> int | None:
        return self._standby.pid if self._standby is not None and self._standby.alive else None


class PendingProcess:
    """Stands in ``nanny.process`` while the environment is on its way: starts at once, and does nothing."""

    worker_address = "envship-pending"
    worker_dir = None
    process = None
    pid = None
    status = Status.running

    async def start(self) -> Status:
        return Status.running

    async def kill(self, **kwargs: Any) -> None:
        return None

    def is_alive(self) -> bool:
        return True


class RefusedProcess(PendingProcess):
    """Stands in ``nanny.process`` of a nanny that cannot have the right environment: no worker ever starts."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def start(self) -> Status:
        raise self.error

    def is_alive(self) -> bool:
        return False
