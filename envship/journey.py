"""One call of the client: what it asks the coordinator for, what it uploads, how it follows a swap.

A journey is made for each call of `envship.client` and thrown away after it. It survives the scheduler's replacement.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from distributed import Client

from envship import config
from envship.environment import Environment, resolve
from envship.options import PackOptions
from envship.progress import Display, HostProgress
from envship.reconnect import reconnect, until_listening
from worker_bootstrap.coordinator import PROTOCOL, Coordinator
from worker_bootstrap.digest import Digest, EnvironmentId, is_digest
from worker_bootstrap.errors import (
    CommitFailed,
    EnvironmentMissing,
    EnvshipError,
    IncompatibleEnvironment,
    NotSwappable,
    PrepareFailed,
    SourceNotFound,
    TransferError,
)
from worker_bootstrap.tracker import Upload
from worker_bootstrap.transfer import EncodedChunk, Outcome, PeerChunks, upload_chunks

UPLOAD_ATTEMPTS = 5
CONNECT_TIMEOUT_S = 5.0
DISPLAYED = {"prepare": "prepare", "commit": "move", "back": "move back", "check": "check", "done": "done"}


class Journey:
    """One call: its clock, its display, what it sent."""

    def __init__(self, client: Client, display: Display) -> None:
        self.client = client
        self.display = display
        self.seconds: dict[str, float] = {}
        self.uploaded_bytes = 0
        self.uploaded_chunks = 0
        self._shown: tuple[str, dict[str, HostProgress]] = ("check", {})
        self._started = time.perf_counter()
        self._mark = self._started

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._started

    def lap(self, phase: str) -> None:
        """Everything since the last lap was *phase*."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    def show(self, phase: str, done_bytes: int, total_bytes: int, state: str = "fetching") -> None:
        """Show how far this machine is; while the cluster is at work, in one list with its hosts."""
        here = HostProgress("this machine", state, done_bytes, total_bytes, "")
        of_cluster, hosts = self._shown
        self._shown = (of_cluster, {**hosts, "here": here})
        self.display.update(of_cluster if len(hosts) > 1 else phase, self._shown[1])

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """The coordinator's answer.

        Raises
        ------
        EnvshipError
            What it answers if it cannot.
        """
        answer: dict[str, Any] = await getattr(self.client.scheduler, operation)(**arguments)
        if "error" in answer:
            raise EnvshipError(f"the coordinator on {self.client.scheduler.address}: {answer['error']}")
        return answer["ok"]

    async def find(self, source: Any, options: PackOptions) -> tuple[EnvironmentId, Environment | None]:
        """The environment that *source* names; None if only the cluster can hold it."""

        def report(stage: str, done_bytes: int, total_bytes: int) -> None:
            self.show(stage, done_bytes, total_bytes, "building")

        try:
            environment = await asyncio.to_thread(resolve, source, options=options, report=report)
        except (EnvironmentMissing, SourceNotFound):
            if not is_digest(source):
                raise
            self.lap("pack")
            return EnvironmentId(source), None
        self.lap("pack")
        return environment.id, environment

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

        theirs = await self.ask("envship_protocol")
        if theirs != PROTOCOL:
            raise NotSwappable(
                f"the cluster of {self.client.scheduler.address}",
                f"it is coordinated by another version of envship (protocol {theirs}, here {PROTOCOL})",
                "Install that version, or restart the cluster.",
            )

    @contextlib.asynccontextmanager
    async def bringing(self, environment_id: EnvironmentId, environment: Environment | None) -> AsyncIterator[None]:
        """Upload each chunk that the cluster lacks, once, while the block goes on; hosts begin with what is there."""
        plan = await self._plan(environment_id, environment, set())
        uploading = asyncio.ensure_future(self._deliver(environment_id, environment, plan))
        try:
            yield
            await uploading
        except EnvshipError:
            # Hosts that wait in vain only say that chunks are missing; the upload knows why.
            if uploading.done() and not uploading.cancelled():
                await uploading
            raise
        finally:
            uploading.cancel()
            await asyncio.gather(uploading, return_exceptions=True)

    async def _plan(
        self, environment_id: EnvironmentId, environment: Environment | None, avoid: set[str]
    ) -> list[Upload]:
        """What to upload, and to whom; none of *avoid*, to which those are added that cannot be reached."""
        manifest = None if environment is None else environment.manifest.to_bytes()
        for _ in range(UPLOAD_ATTEMPTS):
            offer = await self.ask(
                "envship_offer",
                environment_id=environment_id,
                manifest=manifest,
                avoid=sorted(avoid),
                client=self.client.id,
            )
            if offer and environment is None:
                await self.ask("envship_withdraw", client=self.client.id)
                raise EnvironmentMissing(environment_id, "the store here, and not in full on the cluster")
            plan = [Upload(address, tuple(digests)) for address, digests in offer]
            unreachable = await self._unreachable({upload.address for upload in plan})
            if not unreachable:
                self.lap("check")
                return plan
            avoid |= unreachable
        raise self._refused()

    async def _deliver(
        self, environment_id: EnvironmentId, environment: Environment | None, plan: list[Upload]
    ) -> None:
        """Upload what is planned, and plan anew what was not taken. What is given up is no longer waited for."""
        started = time.perf_counter()
        avoid: set[str] = set()
        try:
            for _ in range(UPLOAD_ATTEMPTS):
                if environment is None or not plan:
                    return
                rest = await self._upload(environment, plan)
                self.seconds["upload"] = time.perf_counter() - started
                if not rest:
                    return
                plan = await self._plan(environment_id, environment, avoid)
            raise self._refused()
        except BaseException:
            with contextlib.suppress(OSError, EnvshipError):
                await self.ask("envship_withdraw", client=self.client.id)
            raise

    def _refused(self) -> TransferError:
        return TransferError(
            f"the cluster of {self.client.scheduler.address}", "it did not take all chunks; see its log"
        )

    async def _unreachable(self, addresses: set[str]) -> set[str]:
        """Those of *addresses* that this machine cannot connect to: a firewall, or a network of the cluster's own."""

        async def connect(address: str) -> bool:
            try:
                comm = await self.client.rpc.connect(address, timeout=CONNECT_TIMEOUT_S)
            except OSError:
                return False
            self.client.rpc.reuse(address, comm)
            return True

        ordered = sorted(addresses)
        reached = await asyncio.gather(*map(connect, ordered))
        return {address for address, there in zip(ordered, reached, strict=True) if not there}

    async def _upload(self, environment: Environment, plan: list[Upload]) -> list[Digest]:
        sources = PeerChunks(self.client.rpc, config.timeout_s("upload"))
        sizes = environment.manifest.chunks
        total = sum(sizes[digest] for upload in plan for digest in upload.digests)
        done = 0

        async def put(address: str, chunks: Sequence[EncodedChunk]) -> list[Digest]:
            kept = await sources.put(address, chunks)
            self.uploaded_bytes += sum(len(chunk.payload) for chunk in chunks)
            self.uploaded_chunks += len(chunks)
            return kept

        async def report(outcome: Outcome) -> None:
            nonlocal done
            done += sum(sizes[digest] for digest in outcome.received)
            self.show("upload", done, total)
            await self.ask("envship_uploaded", address=outcome.source, digests=list(outcome.received))

        return await upload_chunks(environment.store, plan, held=sources.held, put=put, report=report)

    async def follow(self, swap_id: str) -> Mapping[str, Any]:
        """Wait for the end of a swap, showing how it goes; returns its last status."""
        version = -1
        while True:
            try:
                status: Mapping[str, Any] = await self.ask("envship_wait", swap_id=swap_id, version=version)
            except OSError:
                await until_listening(self.client.scheduler.address)
                continue
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
