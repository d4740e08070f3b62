"""The agent: what acts for its host inside a Dask server.

A nanny, a worker without nanny, or a scheduler of its own gets one. This class holds what all of them do: say what the
host has, fetch and build an environment, prove that its interpreter starts. How each kind moves is in
`worker_bootstrap.nanny_agent` and `worker_bootstrap.exec_agent`; who tells it to, in `worker_bootstrap.coordinator`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import platform
import socket
import sys
from collections.abc import Awaitable, Mapping
from typing import Any, Callable

from worker_bootstrap import activation, carry, codec, topology
from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.errors import EnvironmentMissing, EnvshipError
from worker_bootstrap.interpreter import (
    PROCESS_TOKEN,
    Interpreter,
    base_interpreter,
    own_environment_id,
    platform_name,
    python_of,
)
from worker_bootstrap.manifest_delta import whole_of
from worker_bootstrap.provision import Call, Provision
from worker_bootstrap.reservation import Reservations
from worker_bootstrap.shared import SharedReader
from worker_bootstrap.standby import Standby, StartRequest
from worker_bootstrap.store import Store
from worker_bootstrap.transfer import ChunkServer

logger = logging.getLogger("envship.agent")

_LEAVING: set[asyncio.Task[Any]] = set()


def answering(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Turn errors into answers: ``{"ok": value}`` or ``{"error": text, "type": name}``, never a pickled exception."""

    @functools.wraps(method)
    async def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return {"ok": await method(*args, **kwargs)}
        except asyncio.CancelledError:
            raise
        except (EnvshipError, OSError) as error:
            return {"error": str(error) or repr(error), "type": type(error).__name__}
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            return {"error": f"{type(error).__name__}: {error}", "type": type(error).__name__}

    return answer


class Agent:
    """What acts for its host in *server*.

    Parameters
    ----------
    server
        The nanny, worker or scheduler.
    store
        The writable store of this host.
    call
        Calls the coordinator.
    """

    role = "agent"

    def __init__(self, server: Any, store: Store, call: Call) -> None:
        self.server = server
        self.store = store
        self.call = call
        self.code = str(carry.publish(store.layout))
        self.base = base_interpreter()
        self.provision = Provision(server, store, self.code, call)
        self.reservations = Reservations(store)
        self.tasks: set[asyncio.Task[Any]] = set()

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """The operations that this agent adds to its server."""
        shared = SharedReader(self.store, self.provision.arrived, self.provision.receiving)
        own: dict[str, Callable[..., Awaitable[Any]]] = {
            "envship_sees": shared.sees,
            "envship_survey": shared.survey,
            "envship_pull": shared.pull,
            "envship_identify": self.identify,
            "envship_has_built": self.has_built,
            "envship_missing": self.missing,
            "envship_provide": self.provide,
            "envship_expect": self.expect,
            "envship_prepare": self.prepare,
            "envship_discard": self.discard,
            "envship_commit": self.commit,
            "envship_park": self.park,
            "envship_built": self.built,
            "envship_manifest": self.manifest,
            "envship_rejoin": self.rejoin,
            "envship_wait_out": self.wait_out,
        }
        chunks = ChunkServer(self.store, self.provision.arrived, self.provision.sending, self.provision.receiving)
        return {**{name: answering(method) for name, method in own.items()}, **chunks.handlers()}

    # -- what the coordinator asks for

    async def identify(self) -> dict[str, Any]:
        """Who this agent is, and what its host has; only numbers, texts and lists."""
        self.restore()
        room = os.statvfs(self.store.layout.root)
        return {
            "address": self.server.address,
            "role": self.role,
            "host_id": self.store.host_id,
            "hostname": socket.gethostname(),
            "place": topology.own_place(),
            "machine": topology.machine(socket.gethostname()),
            "pid": os.getpid(),
            "token": PROCESS_TOKEN,
            "environment_id": self.environment_id,
            "prefix": sys.prefix,
            "python": platform.python_version(),
            "platform": platform_name(platform.system(), platform.machine()),
            "store": str(self.store.layout.root),
            "free_bytes": room.f_bavail * room.f_frsize,
            "codecs": list(codec.accepted()),
            "warm": [],
            "warm_bytes": 0,
            "obstacle": self.obstacle(),
        }

    async def has_built(self, environment_id: str) -> bool:
        """Whether an environment is built here."""
        return await asyncio.to_thread(self.store.built, EnvironmentId(environment_id)) is not None

    async def missing(self, environment_id: str, manifest: bytes | None = None) -> list[Digest]:
        """Chunks of an environment that this host lacks; *manifest*, as a delta, is kept if it is given."""
        wanted = EnvironmentId(environment_id)

        def look() -> list[Digest]:
            if manifest is not None:
                self.store.write_manifest(whole_of(manifest, wanted, self.store.read_manifest))
            self.store.touch(wanted)
            return self.store.missing(self.store.read_manifest(wanted).chunks)

        return await asyncio.to_thread(look)

    async def provide(
        self,
        environment_id: str,
        manifest: bytes | None = None,
        link_mode: str = "auto",
        chunks_only: bool = False,
        rate_limit: float | None = None,
        reserve: bool = False,
    ) -> dict[str, Any]:
        """Fetch what is missing and, unless *chunks_only*, build; returns the seconds that each took.

        From now on, chunks are sent and received at no more than *rate_limit* bytes per second. Nobody evicts the
        environment meanwhile; with *reserve* not either until a process runs from it, or it is discarded.
        """
        self.provision.limit(rate_limit)
        await asyncio.to_thread(self.restore)
        wanted = EnvironmentId(environment_id)
        if reserve:
            await self.reservations.keep(wanted)
        async with self.reservations.during(wanted):
            return await self.provision.provide(wanted, manifest, link_mode, chunks_only)

    async def expect(self, environment_id: str | None, start_timeout_s: float) -> None:
        """`prepare` will probably be asked for this environment in a moment; for none if it is None after all."""

    async def prepare(self, environment_id: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Prove that the environment's interpreter starts; returns the standby's description."""
        raise NotImplementedError

    async def commit(self, environment_id: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Move there. The environment was prepared."""
        raise NotImplementedError

    async def park(self, environment_id: str | None, keep: int, prepare: Mapping[str, Any]) -> None:
        """Keep a standby of an environment left a moment ago; at most *keep* of them."""

    async def discard(self, environment_id: str | None) -> None:
        """Forget what `prepare` made: the swap was given up."""
        self.reservations.drop(None if environment_id is None else EnvironmentId(environment_id))

    async def built(self) -> list[str]:
        """Ids of the environments that are built here."""

        def look() -> list[str]:
            return [name for name in self.store.environments() if self.store.built(name) is not None]

        return await asyncio.to_thread(look)

    async def manifest(self, environment_id: str) -> bytes:
        """The canonical bytes of a manifest that this host holds."""
        found = await asyncio.to_thread(self.store.read_manifest, EnvironmentId(environment_id))
        return found.to_bytes()

    async def join(self) -> None:
        """Announce this agent to the coordinator, and bring its process where that wants it."""
        answer = await self.call("envship_join", identity=await self.identify())
        if "wait" in answer:
            self.hold()
            await self.wait_out(answer["timeout_s"])
        elif answer["target"] != self.environment_id:
            self.hold()
            self.in_background(self.conform(answer["target"], answer["manifest"], answer["options"]))

    async def rejoin(self) -> None:
        """The coordinator found this process outside the target environment: join again."""
        await self.join()

    async def wait_out(self, timeout_s: float) -> None:
        """The scheduler is about to be replaced, and this process is not part of that swap: join its successor."""
        raise NotImplementedError

    def hold(self) -> None:
        """Make sure, before anything else happens, that the process behind this agent runs no task."""
        raise NotImplementedError

    async def conform(self, target: EnvironmentId | None, manifest: bytes | None, options: Mapping[str, Any]) -> None:
        """Bring a process that came late into the environment *target*, or let it leave, saying why."""
        raise NotImplementedError

    # -- what the kinds of agents build on

    @property
    def environment_id(self) -> EnvironmentId | None:
        """The environment that the process behind this agent should be running in now."""
        return own_environment_id()

    def obstacle(self) -> str | None:
        """Why the process behind this agent cannot be moved, or None."""
        return None

    async def interpreter(self, environment_id: str | None) -> Interpreter:
        """The activated interpreter of an environment that is built here."""
        if environment_id is None:
            return self.base
        wanted = EnvironmentId(environment_id)

        def activate() -> Interpreter:
            prefix = self.store.built(wanted)
            if prefix is None:
                raise EnvironmentMissing(wanted, f"{self.store.layout.root} (it is not built)")
            manifest = self.store.read_manifest(wanted)
            base_prefixes = [self.base.prefix, sys.base_prefix]
            environ = activation.activated(
                self.base.environ, str(prefix), manifest.environ, base_prefixes=base_prefixes
            )
            marks = {"ENVSHIP_ENVIRONMENT": wanted, "ENVSHIP_PREFIX": str(prefix)}
            return Interpreter(wanted, str(prefix), python_of(prefix), {**environ, **marks})

        return await asyncio.to_thread(activate)

    async def probe(self, interpreter: Interpreter, request: StartRequest, timeout_s: float) -> dict[str, Any]:
        """Start *interpreter*, see it get ready, end it; returns its description."""
        standby = await Standby.start(interpreter, request, timeout_s)
        await standby.discard()
        return dict(standby.description)

    def restore(self) -> None:
        """Make again what somebody removed of the store, in which our code lies as well, while this process lived."""
        self.store.restore()
        if not os.path.isdir(self.code):
            carry.publish(self.store.layout)

    def start_request(self, interpreter: Interpreter, **more: Any) -> StartRequest:
        """What every interpreter that this agent starts is given; *more* are fields of `StartRequest`."""
        self.restore()
        return StartRequest(code=self.code, lease=self.lease_of(interpreter), **more)

    def lease_of(self, interpreter: Interpreter) -> str | None:
        """The file that whoever runs *interpreter* holds; None for the base environment."""
        if interpreter.environment_id is None:
            return None
        return str(self.store.lease(interpreter.environment_id))

    def in_background(self, work: Any) -> asyncio.Task[Any]:
        """Run a coroutine that nobody waits for; its failure is logged."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def leave(self, reason: str, **how: Any) -> None:
        """Close the server behind this agent. Not in a task of ours: closing the server ends those."""
        closing = asyncio.ensure_future(self.server.close(reason=reason, **how))
        _LEAVING.add(closing)
        closing.add_done_callback(_LEAVING.discard)

    async def close(self) -> None:
        """End what this agent started."""
        await self.provision.close()
        for task in list(self.tasks):
            task.cancel()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("work in the background failed", exc_info=task.exception())
