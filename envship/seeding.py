"""Seeding: how what the cluster lacks gets there, each chunk once, while hosts pass on what has come.

Hosts that see a bundle or a store themselves read it there. What is left the client uploads to different hosts in turn,
straight to their agents, or by way of the scheduler to those that it cannot connect to.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from distributed import Client

from envship import config
from envship.bundle import read_bundle
from envship.environment import Environment
from envship.errors import SourceNotFound
from envship.road import Road
from worker_bootstrap import mounts
from worker_bootstrap.assignments import Upload
from worker_bootstrap.bundle_index import Extent
from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.errors import EnvironmentMissing, EnvshipError, TransferError
from worker_bootstrap.manifest_delta import delta_of, likely_bases
from worker_bootstrap.shared import Place
from worker_bootstrap.transfer import EncodedChunk, Outcome, upload_chunks

UPLOAD_ATTEMPTS = 5

Extents = Mapping[Digest, Extent]
Ask = Callable[..., Awaitable[Any]]
Show = Callable[[str, int, int, str], None]


class Seeding:
    """What one call of the client brings into the cluster.

    Parameters
    ----------
    client
        Whose connections are used.
    ask
        Asks the coordinator.
    show
        Shows a phase, the bytes done and in total, and what else there is to say.
    environment_id
        The environment.
    environment
        Where its chunks are read here; None if only the cluster can hold them.
    bundle
        Path or URL of a bundle that holds them, and where in it each lies; *environment* then need not hold them yet.
    """

    def __init__(
        self,
        client: Client,
        ask: Ask,
        show: Show,
        environment_id: EnvironmentId,
        environment: Environment | None,
        bundle: tuple[str, Extents] | None = None,
    ) -> None:
        self.uploaded_bytes = 0
        self.uploaded_chunks = 0
        self.seconds = 0.0
        self._client = client
        self._ask = ask
        self._show = show
        self._environment_id = environment_id
        self._environment = environment
        self._bundle = bundle
        # Promises are given under this name; it begins with the client's id, so that they end with the client.
        self._name = f"{client.id} {uuid.uuid4().hex}"
        self._avoid: set[str] = set()

    @contextlib.asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        """Upload each chunk that the cluster lacks, once, while the block goes on.

        Raises
        ------
        EnvironmentMissing
            If the cluster lacks chunks, and there is nothing here to bring them from.
        TransferError
            If the cluster does not take them.
        """
        plan = await self._plan()
        uploading = asyncio.ensure_future(self._deliver(plan))
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

    async def _plan(self) -> list[Upload]:
        """What to upload, and to whom."""
        environment = self._environment
        delta = await self._manifest()
        try:
            offer = await self._offer(delta)
        except EnvironmentMissing:
            if environment is None:
                raise
            # What the delta was for was evicted there in this moment.
            offer = await self._offer(await asyncio.to_thread(delta_of, environment.manifest))
        if offer and environment is None:
            await self._ask("envship_withdraw", client=self._name)
            raise EnvironmentMissing(self._environment_id, "the store here, and not in full on the cluster")
        return [Upload(address, tuple(digests)) for address, digests in offer]

    async def _offer(self, delta: bytes | None) -> Sequence[tuple[str, Sequence[Digest]]]:
        offer: Sequence[tuple[str, Sequence[Digest]]] = await self._ask(
            "envship_offer",
            environment_id=self._environment_id,
            manifest=delta,
            avoid=sorted(self._avoid),
            client=self._name,
            topology=config.topology(),
            places=[(list(place), extents) for place, extents in self._places()],
        )
        return offer

    async def _manifest(self) -> bytes | None:
        """What the scheduler lacks of the manifest; None if it lacks nothing, or nobody here could help."""
        if self._environment is None:
            return None
        held = await self._ask("envship_bases", environment_id=self._environment_id)
        if held is None:
            return None
        bases = await asyncio.to_thread(likely_bases, held, self._environment.store.read_manifest)
        return await asyncio.to_thread(delta_of, self._environment.manifest, bases)

    def _places(self) -> list[tuple[Place, dict[Digest, list[int]] | None]]:
        """Where hosts may read the chunks themselves, if they see it."""
        places: list[tuple[Place, dict[Digest, list[int]] | None]] = []
        if self._bundle is not None:
            where, extents = self._bundle
            place = Place("bundle", where, self._environment_id)
            places.append((place, {digest: list(extent) for digest, extent in extents.items()}))
        elif self._environment is not None:
            store, share = self._environment.store, config.share_store()
            if share or (share is None and not mounts.is_local(store.layout.root)):
                places.append((Place("store", str(store.layout.root.resolve()), store.host_id), None))
        return places

    async def _deliver(self, plan: list[Upload]) -> None:
        """Upload what is planned, and plan anew what was not taken. What is given up is no longer waited for."""
        environment = self._environment
        started = time.perf_counter()
        try:
            for _ in range(UPLOAD_ATTEMPTS):
                if environment is None or not plan:
                    return
                if self._bundle is not None and environment.store.missing(d for upload in plan for d in upload.digests):
                    await self._read_bundle(self._bundle[0], environment)
                rest = await self._upload(environment, plan)
                self.seconds = time.perf_counter() - started
                if not rest:
                    return
                plan = await self._plan()
            raise TransferError(
                f"the cluster of {self._client.scheduler.address}", "it did not take all chunks; see its log"
            )
        except BaseException:
            with contextlib.suppress(EnvshipError):
                await self._ask("envship_withdraw", client=self._name)
            raise

    async def _read_bundle(self, where: str, environment: Environment) -> None:
        try:
            await asyncio.to_thread(read_bundle, where, environment.store)
        except OSError as error:
            raise SourceNotFound(where, [f"{where} here ({error.strerror or error})", "hosts that saw it"]) from error

    async def _upload(self, environment: Environment, plan: Sequence[Upload]) -> list[Digest]:
        sizes = environment.manifest.chunks
        digests = [digest for upload in plan for digest in upload.digests]
        total = sum(sizes[digest] for digest in digests)
        done = there = 0

        async def put(address: str, chunks: Sequence[EncodedChunk]) -> list[Digest]:
            kept = await road.put(address, chunks)
            self.uploaded_bytes += sum(len(chunk.payload) for chunk in chunks)
            self.uploaded_chunks += len(chunks)
            return kept

        async def report(outcome: Outcome) -> None:
            nonlocal done, there
            done += sum(sizes[digest] for digest in outcome.received)
            there += len(outcome.received)
            self._show("upload", done, total, f"{there:,} of {len(digests):,} chunks")
            if outcome.failed:
                self._avoid.add(outcome.source)
            await self._ask(
                "envship_uploaded",
                address=outcome.source,
                digests=list(outcome.received),
                size_bytes=outcome.size_bytes,
            )

        async with Road(self._client, config.timeout_s("upload"), config.rate_limit()) as road:
            await road.explore({upload.address for upload in plan})
            return await upload_chunks(environment.store, plan, held=road.held, put=put, report=report)
