"""One call of the client: what it asks the coordinator for, what it uploads, how it follows a swap.

A journey is made for each call of `envship.client` and thrown away after it. It survives the scheduler's replacement.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from dask.utils import parse_timedelta
from distributed import Client

from envship.bundle import bundle_at, survey_bundle
from envship.environment import Environment, guess, resolve
from envship.errors import SourceNotFound
from envship.options import PackOptions
from envship.progress import Display, HostProgress
from envship.reconnect import reconnect, until_listening
from envship.seeding import Extents, Seeding
from worker_bootstrap.bundle_index import Extent
from worker_bootstrap.coordinator import PROTOCOL, Coordinator
from worker_bootstrap.digest import EnvironmentId, is_digest
from worker_bootstrap.errors import (
    CommitFailed,
    EnvironmentMissing,
    EnvshipError,
    IncompatibleEnvironment,
    NotSwappable,
    PrepareFailed,
    SchedulerLost,
)
from worker_bootstrap.location import open_store
from worker_bootstrap.manifest import Manifest

ATTEMPTS = 3
"""A chunk that is lost or damaged on the cluster after it was brought there is brought again so often."""
LOSS_TIMEOUT_S = 10.0
"""So long a scheduler may be out of reach that is not about to be replaced."""
FAREWELL_TIMEOUT_S = 2.0
"""Longer nobody waits to take a hint back; hosts forget it by themselves."""
DISPLAYED = {"prepare": "prepare", "commit": "move", "back": "move back", "check": "check", "done": "done"}

_Result = TypeVar("_Result")


class Journey:
    """One call: its clock, its display, what it sent."""

    def __init__(self, client: Client, display: Display) -> None:
        self.client = client
        self.display = display
        self.seconds: dict[str, float] = {}
        self._seedings: list[Seeding] = []
        self._bundle: tuple[str, Extents] | None = None
        self._shown: tuple[str, dict[str, HostProgress]] = ("check", {})
        self._started = time.perf_counter()
        self._mark = self._started

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._started

    @property
    def uploaded_bytes(self) -> int:
        return sum(seeding.uploaded_bytes for seeding in self._seedings)

    @property
    def uploaded_chunks(self) -> int:
        return sum(seeding.uploaded_chunks for seeding in self._seedings)

    def lap(self, phase: str) -> None:
        """Everything since the last lap was *phase*."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    def show(self, phase: str, done_bytes: int, total_bytes: int, detail: str = "", *, state: str = "fetching") -> None:
        """Show how far this machine is; while the cluster is at work, in one list with its hosts."""
        here = HostProgress("this machine", state, done_bytes, total_bytes, detail)
        of_cluster, hosts = self._shown
        self._shown = (of_cluster, {**hosts, "here": here})
        self.display.update(of_cluster if len(hosts) > 1 else phase, self._shown[1])

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """The coordinator's answer.

        Raises
        ------
        EnvironmentMissing
            No host holds the environment that *arguments* name.
        SchedulerLost
            If nobody answers, or another one does.
        EnvshipError
            What it answers if it cannot.
        """
        try:
            answer: dict[str, Any] | None = await getattr(self.client.scheduler, operation)(**arguments)
        except OSError as error:
            raise self._lost(error) from error
        if answer is None:  # so Dask answers what it does not know
            reason = "another one listens there now, which knows nothing of what this one was asked for"
            raise SchedulerLost(self.client.scheduler.address, reason)
        if answer.get("type") == "EnvironmentMissing" and "environment_id" in arguments:
            raise EnvironmentMissing(arguments["environment_id"], f"the cluster of {self.client.scheduler.address}")
        if "error" in answer:
            raise EnvshipError(f"the coordinator on {self.client.scheduler.address}: {answer['error']}")
        return answer["ok"]

    def _lost(self, error: OSError) -> SchedulerLost:
        reason = "this client has given it up" if self._is_closed else str(error).rstrip(".") or type(error).__name__
        return SchedulerLost(self.client.scheduler.address, reason)

    @property
    def _is_closed(self) -> bool:
        """Whether Dask has closed the client, as it does when the scheduler is away for too long."""
        return self.client.status in ("closing", "closed")

    async def find(self, source: Any, options: PackOptions) -> tuple[Manifest, Environment | None]:
        """The environment that *source* names; None beside its manifest if only the cluster holds it.

        Raises
        ------
        PackError, BundleInvalid
            As `envship.environment.resolve`.
        EnvironmentMissing
            If it is an id that nobody holds.
        """

        def report(stage: str, done_bytes: int, total_bytes: int) -> None:
            self.show(stage, done_bytes, total_bytes, state="building")

        if (where := bundle_at(source)) is not None:
            # Not read into the store here: perhaps the hosts see it, too.
            manifest, extents = await self._survey(where)
            self._bundle = where, extents
            self.lap("pack")
            return manifest, Environment(manifest, await asyncio.to_thread(open_store))
        try:
            environment = await asyncio.to_thread(resolve, source, options=options, report=report)
        except (EnvironmentMissing, SourceNotFound):
            if not is_digest(source):
                raise
            self.lap("pack")
            data = await self.ask("envship_find_manifest", environment_id=source)
            return Manifest.from_bytes(data, EnvironmentId(source)), None
        self.lap("pack")
        return environment.manifest, environment

    @contextlib.asynccontextmanager
    async def expecting(self, source: Any, options: PackOptions, start_timeout_s: float) -> AsyncIterator[None]:
        """While the block finds out what *source* is, hosts start the interpreter of what it was the last time.

        No more than a hint: where it cannot be given, everything takes its course without.
        """

        async def tell(environment_id: EnvironmentId | None) -> None:
            with contextlib.suppress(EnvshipError):
                await self.ask("envship_expect", environment_id=environment_id, start_timeout_s=start_timeout_s)

        async def expect() -> bool:
            expected = await asyncio.to_thread(guess, source, options)
            if expected is not None:
                await tell(expected)
            return expected is not None

        async def take_back() -> None:
            if await told:
                await tell(None)

        told = asyncio.ensure_future(expect())
        try:
            yield
            await told
        except BaseException:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(take_back(), FAREWELL_TIMEOUT_S)
            raise

    async def _survey(self, where: str) -> tuple[Manifest, Extents]:
        """What lies in the bundle at *where*, on this machine, or as the hosts of the cluster see it."""
        try:
            return await asyncio.to_thread(survey_bundle, where)
        except SourceNotFound:
            found = await self.ask("envship_survey_bundle", where=where)
            if found is None:
                raise
        return Manifest.from_bytes(found["manifest"]), {d: Extent(*row) for d, row in found["extents"].items()}

    async def connect(self) -> None:
        """Make sure that the scheduler has a coordinator."""
        plugin = Coordinator()
        try:
            await self.client._register_scheduler_plugin(plugin, plugin.name, idempotent=True)
        except (ValueError, TypeError, RuntimeError) as error:
            raise NotSwappable(
                f"the cluster of {self.client.scheduler.address}",
                f"its scheduler does not accept plugins ({error})",
                "Ask whoever runs it to allow them (distributed.scheduler.blocked-handlers).",
            ) from error
        except OSError as error:
            raise self._lost(error) from error

        theirs = await self.ask("envship_protocol")
        if theirs != PROTOCOL:
            raise NotSwappable(
                f"the cluster of {self.client.scheduler.address}",
                f"it is coordinated by another version of envship (protocol {theirs}, here {PROTOCOL})",
                "Install that version, or restart the cluster.",
            )

    async def with_chunks(
        self, environment_id: EnvironmentId, environment: Environment | None, work: Callable[[], Awaitable[_Result]]
    ) -> _Result:
        """The result of *work*, while each chunk that the cluster lacks is brought there, once.

        Chunks that get lost on the cluster meanwhile are brought again, and *work* is done again.
        """
        for attempt in range(1, ATTEMPTS + 1):
            seeding = Seeding(self.client, self.ask, self.show, environment_id, environment, self._bundle)
            self._seedings.append(seeding)
            try:
                async with seeding.under_way():
                    self.lap("check")
                    return await work()
            except PrepareFailed as error:
                if not error.retryable or environment is None or attempt == ATTEMPTS:
                    raise
            finally:
                if seeding.seconds:
                    self.seconds["upload"] = seeding.seconds
        raise AssertionError("unreachable")

    async def follow(self, swap_id: str) -> Mapping[str, Any]:
        """Wait for the end of a swap, showing how it goes; returns its last status.

        Raises
        ------
        SchedulerLost
            If the scheduler does not come back: from being replaced, or from wherever it went.
        """
        version = -1
        moves = False
        while True:
            try:
                status: Mapping[str, Any] = await self.ask("envship_wait", swap_id=swap_id, version=version)
            except SchedulerLost as error:
                if error.__cause__ is None:  # somebody answered, but not whom we asked
                    raise
                timeout_s = parse_timedelta(self.client._timeout) if moves else LOSS_TIMEOUT_S
                await until_listening(self.client.scheduler.address, timeout_s)
                if self._is_closed:
                    raise
                continue
            moves = status["scheduler_moves"]
            version = status["version"]
            hosts = {name: HostProgress(**host) for name, host in status["hosts"].items()}
            here = self._shown[1].get("here")
            if here is not None and here.done_bytes < here.total_bytes:
                hosts["here"] = here
            self._shown = (DISPLAYED.get(status["phase"], status["phase"]), hosts)
            self.display.update(*self._shown)
            if status["phase"] in ("done", "failed"):
                break
        await reconnect(self.client)
        _raise_for(status, self.client.scheduler.address)
        for phase, seconds in status["seconds"].items():
            if phase != "prepare":
                self.seconds[phase] = seconds
        return status


def _raise_for(status: Mapping[str, Any], address: str) -> None:
    causes = dict(status["causes"])
    if status["error"] == "NotSwappable":
        reasons = "; ".join(f"{where}: {cause}" for where, cause in causes.items())
        raise NotSwappable(f"the cluster of {address}", reasons, "Nothing was changed.")
    if status["error"] == "IncompatibleEnvironment":
        mismatches = [(f"platform of {where}", there, status["platform"]) for where, there in causes.items()]
        raise IncompatibleEnvironment(status["environment_id"], mismatches, "Pack it on a machine of that platform.")
    if status["error"] == "CommitFailed":
        raise CommitFailed(status["environment_id"], causes, status["outcome"])
    if status["error"] is not None:
        failed = PrepareFailed(status["environment_id"], causes)
        failed.retryable = status["chunks_lost"]
        raise failed
