"""The agent of a nanny: moves its worker by giving the nanny another process to start.

The nanny itself, its PID and its place in the job stay. The old worker and the new one overlap for a moment: the new
one registers as soon as the scheduler has let go of the old one, which may still be closing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

import dask
import psutil
from dask.utils import parse_timedelta
from distributed.core import Status

from worker_bootstrap.agent import Agent
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import EnvironmentMissing, NotSwappable, StartError
from worker_bootstrap.hosted import HostedProcess, PendingProcess, RefusedProcess
from worker_bootstrap.provision import Call
from worker_bootstrap.reexec import arrival_timeout_s, dialled
from worker_bootstrap.standby import Standby
from worker_bootstrap.standby_pool import StandbyPool
from worker_bootstrap.store import Store
from worker_bootstrap.worker_options import WorkerOptions

logger = logging.getLogger("envship.nanny")

STOP_TIMEOUT_S = 5.0
"""A worker that has not closed by then is killed; the scheduler has let go of it long before."""
RETRY_INTERVAL_S = 0.004
RETRY_SHARE = 0.03
"""A scheduler that has been waited for is looked for again after this share of that time: a short wait stays short, and
a thousand nannies do not knock at the port of a slow one two hundred times a second each."""


class NannyAgent(Agent):
    """Acts for its host in a nanny, and moves the nanny's worker."""

    role = "nanny"

    def __init__(self, server: Any, store: Store, call: Call) -> None:
        super().__init__(server, store, call)
        self.standbys = StandbyPool(self._start_standby, self.in_background, self._is_current)
        self._start_timeout_s = 60.0
        self._link_mode = "auto"
        self._held: Any = None
        self._moving = asyncio.Lock()

    @property
    def environment_id(self) -> EnvironmentId | None:
        interpreter = getattr(self.server.process, "interpreter", None)
        return None if interpreter is None else interpreter.environment_id

    def obstacle(self) -> str | None:
        try:
            WorkerOptions.of_nanny(self.server).pickled()
        except NotSwappable as error:
            return str(error)
        return None

    async def identify(self) -> dict[str, Any]:
        return {
            **await super().identify(),
            "worker": self.server.worker_address,
            "warm": [name or "base" for name in self.standbys.parked],
            "warm_bytes": self.standbys.parked_bytes,
        }

    async def expect(self, environment_id: str | None, start_timeout_s: float) -> None:
        if environment_id is None:
            await self.standbys.expect_nothing()
        elif await self.has_built(environment_id) and environment_id != self.environment_id:
            self._start_timeout_s = start_timeout_s
            self.in_background(self.standbys.expect(EnvironmentId(environment_id)))

    async def prepare(self, environment_id: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        name = None if environment_id is None else EnvironmentId(environment_id)
        self._start_timeout_s = float(options["start_timeout_s"])
        self._link_mode = str(options.get("link_mode", self._link_mode))
        if options.get("built_anew"):
            await self.standbys.discard(name)  # What it has imported may be damaged.
        async with self.reservations.during(name):
            return dict((await self.standbys.prepare(name)).description)

    async def discard(self, environment_id: str | None) -> None:
        await super().discard(environment_id)
        await self.standbys.discard(None if environment_id is None else EnvironmentId(environment_id))

    async def commit(self, environment_id: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        name = None if environment_id is None else EnvironmentId(environment_id)
        async with self._moving:
            new = await self._process_for(name)
            old = self._take_process()
            if options["scheduler_moves"]:
                await old.kill(timeout=STOP_TIMEOUT_S, executor_wait=False, reason="envship-swap")
                self.in_background(self._start_when_scheduler_is_back(new, options))
                return {}
            closing = self.in_background(old.kill(timeout=STOP_TIMEOUT_S, executor_wait=False, reason="envship-swap"))
            await self.call("envship_release", address=old.worker_address)
            if self._has_fixed_ports():
                await closing
            await self._start(new, options)
        return {}

    async def park(self, environment_id: str | None, keep: int, prepare: Mapping[str, Any]) -> None:
        name = None if environment_id is None else EnvironmentId(environment_id)
        self._start_timeout_s = float(prepare["start_timeout_s"])
        if name != self.environment_id:
            await self.standbys.park(name, keep)

    async def conform(self, target: EnvironmentId | None, manifest: bytes | None, options: Mapping[str, Any]) -> None:
        """Bring a nanny that came late, and was told to `hold`, into the environment *target*."""
        try:
            await self._end_held()
            async with self.reservations.during(target):
                if target is not None:
                    await self.provide(target, manifest, options["link_mode"])
                self._start_timeout_s = float(options["start_timeout_s"])
                async with self._moving:
                    await self._start(await self._process_for(target), options)
            logger.info("worker %s runs in environment %s", self.server.worker_address, target)
        except Exception as error:
            logger.error(
                "nanny %s leaves: its worker must run in environment %s and cannot: %s",
                self.server.address,
                target,
                error,
            )
            self.server.process = RefusedProcess(error)
            self.leave("envship-environment-unavailable")

    async def wait_out(self, timeout_s: float) -> None:
        self.hold()
        await self._end_held()
        self.in_background(self._join_successor(timeout_s))

    async def _join_successor(self, timeout_s: float) -> None:
        answer = await self._successor(timeout_s)
        if answer is not None:
            await self.conform(answer["target"], answer["manifest"], answer["options"])

    def hold(self) -> None:
        """Give the nanny a pending process: neither its start nor anybody's ``register_plugin`` waits for us."""
        old = self._take_process()
        if not isinstance(old, PendingProcess):
            self._held = old

    async def _end_held(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            await held.kill(timeout=STOP_TIMEOUT_S, executor_wait=False, reason="envship-hold")

    async def close(self) -> None:
        await super().close()
        await self.standbys.close()
        self.reservations.clear()  # The process may be the user's own, and go on.

    def _take_process(self) -> Any:
        """Take the worker's process away from the nanny; its end no longer concerns the nanny."""
        old = self.server.process
        self.server.process = PendingProcess()
        if old is None:
            return self.server.process
        old.on_exit = None
        return old

    async def _process_for(self, name: EnvironmentId | None) -> HostedProcess:
        interpreter = await self.interpreter(name)
        return HostedProcess(
            interpreter,
            start_standby=functools.partial(self._start_again, name),
            on_exit=self.server._on_worker_exit_sync,
            standby=self.standbys.take(name),
            override=self._remaining_lifetime(),
        )

    async def _start_again(self, name: EnvironmentId | None) -> Standby:
        """A standby for a worker that has died, or was restarted: what was damaged meanwhile is mended before."""
        async with self.reservations.during(name):
            if name is not None:
                await self._mend(name)
            return await self._start_standby(name)

    async def _mend(self, name: EnvironmentId) -> None:
        try:
            await self.provision.provide(name, None, self._link_mode)
        except EnvironmentMissing:  # its manifest is damaged, and other hosts have it
            answer = await self.call("envship_find_manifest", environment_id=name)
            if "ok" not in answer:
                raise
            await self.provision.provide(name, answer["ok"], self._link_mode)

    async def _start_standby(self, name: EnvironmentId | None) -> Standby:
        interpreter = await self.interpreter(name)
        options = WorkerOptions.of_nanny(self.server)
        interpreter = interpreter._replace(environ={**interpreter.environ, **options.env})
        request = self.start_request(interpreter, worker=options.pickled())
        return await Standby.start(interpreter, request, self._start_timeout_s)

    def _is_current(self, standby: Standby) -> bool:
        """Whether it would start the worker that the nanny would: plugins change that, Dask's `Environ` for one."""
        return standby.worker == WorkerOptions.of_nanny(self.server).pickled()

    async def _start(self, new: HostedProcess, options: Mapping[str, Any]) -> None:
        self.server.process = new
        timeout_s = arrival_timeout_s(options)
        try:
            await asyncio.wait_for(new.start(), timeout_s)
        except asyncio.TimeoutError:
            interpreter = new.interpreter
            reason = f"the worker has not registered after {timeout_s:.0f} s, and was killed"
            raise StartError(interpreter.environment_id, interpreter.prefix, reason, "") from None
        self.reservations.drop(new.interpreter.environment_id)
        if self.server.status in (Status.closing, Status.closed):
            await new.kill()

    async def _start_when_scheduler_is_back(self, new: HostedProcess, options: Mapping[str, Any]) -> None:
        answer = await self._successor(options["commit_timeout_s"])
        if answer is None:
            return
        try:
            async with self._moving:
                if not isinstance(self.server.process, PendingProcess):
                    await new.kill()  # The cluster has turned back, and this nanny was asked to.
                    return
                if answer["target"] != new.interpreter.environment_id:
                    await new.kill()  # It has, before this nanny joined, so that it may never be asked.
                    new = await self._process_for(answer["target"])
                await self._start(new, options)
        except Exception as error:
            await self.call("envship_trouble", address=self.server.address, cause=str(error))

    async def _successor(self, timeout_s: float) -> dict[str, Any] | None:
        """What the scheduler's successor answers to our joining it; None, and the nanny leaves, if none comes."""
        host, port = dialled(self.server.scheduler.address)
        began = time.monotonic()
        while (waited_s := time.monotonic() - began) < timeout_s:
            await asyncio.sleep(max(RETRY_INTERVAL_S, RETRY_SHARE * waited_s))
            if not await _listens(host, port):
                continue
            with contextlib.suppress(OSError):
                answer = await self.call("envship_join", identity=await self.identify())
                if isinstance(answer, dict) and "target" in answer:
                    return answer
        logger.error("the scheduler did not come back within %.0f s: nanny %s leaves", timeout_s, self.server.address)
        self.leave("envship-scheduler-gone")
        return None

    def _remaining_lifetime(self) -> dict[str, Any]:
        """``--lifetime`` counts from the worker's start; a swap must not extend it."""
        given = self.server.worker_kwargs.get("lifetime")
        lifetime = parse_timedelta(given or dask.config.get("distributed.worker.lifetime.duration"))
        pid = getattr(self.server.process, "pid", None)
        if not lifetime or pid is None:
            return {}
        try:
            age = time.time() - psutil.Process(pid).create_time()
        except psutil.Error:
            return {}
        return {"lifetime": f"{max(1.0, lifetime - age)} s"}

    def _has_fixed_ports(self) -> bool:
        """Whether the new worker needs a port that the old one still listens on."""
        kwargs = self.server.worker_kwargs
        ports = [str(kwargs.get(name) or "").rpartition(":")[2] for name in ("port", "dashboard_address")]
        return any(port not in ("", "0") for port in ports) or self.server.contact_address is not None


async def _listens(host: str, port: int) -> bool:
    """Whether something accepts connections there; asked directly, because Dask's own back-off overshoots."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 1)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
