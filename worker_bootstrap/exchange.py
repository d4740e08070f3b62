"""The exchange: which host has which chunks of an environment, and who brings the rest.

The part of the coordinator between the client, the agents and the `worker_bootstrap.tracker`. It holds manifests only
in passing and chunks never.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.errors import EnvironmentMissing
from worker_bootstrap.ledger import CLIENT, Ledger
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.manifest_delta import delta_of, whole_of
from worker_bootstrap.mistrust import LACKS
from worker_bootstrap.pulling import Pulling
from worker_bootstrap.roster import Roster
from worker_bootstrap.store import Store
from worker_bootstrap.topology import Topology, place_of
from worker_bootstrap.tracker import Tracker

logger = logging.getLogger("envship.exchange")

BASES_LIMIT = 4
"""So many manifests a client may choose from, to send what is new in another one."""
LINGER_S = 1.0
"""So long a host that asks in vain is kept waiting for an answer."""
STIR_S = 0.01
STIR_LIMIT = 64
"""Of those that wait, so many are looked at at once; the others' turn comes at the next change."""


class Exchange:
    """Chunks between the hosts of *roster*.

    Parameters
    ----------
    roster
        The agents.
    store
        The scheduler's own, which keeps the manifests.
    log
        Called with a stage and what there is to say of it.
    """

    def __init__(self, roster: Roster, store: Store, log: Callable[..., None]) -> None:
        self.tracker = Tracker(clock=time.monotonic)
        self.ledger = Ledger(time.monotonic)
        self.pulling = Pulling(roster, self.tracker, self.ledger, self._stir, log)
        self._log = log
        self._roster = roster
        self._store = store
        self._known: set[EnvironmentId] = set()
        self._givers: set[str] = set()
        self._topology: Topology = {}
        self._waiting: deque[tuple[str, str, asyncio.Future[dict[str, Any]]]] = deque()
        self._stirring = False

    async def offer(
        self,
        environment_id: str,
        manifest: bytes | None = None,
        avoid: Sequence[str] = (),
        client: str = "",
        places: Sequence[tuple[Sequence[str], Mapping[Digest, Sequence[int]] | None]] = (),
        topology: Topology | None = None,
    ) -> list[tuple[str, list[Digest]]]:
        """What the client must upload: chunks that no host has, with the agent to take each; never one of *avoid*.

        Chunks that another client has promised are left out. A *client* that gives its id promises to bring the rest,
        so hosts may begin to fetch while it uploads; what it promised before is forgotten. What hosts can read
        themselves from one of *places* they are told to; each goes with where in it the chunks lie (`Pulling.begin`).
        *topology* says where hosts stand that do not know it themselves. *manifest* is a delta for one of `bases`.
        """
        self._topology = topology or self._topology
        wanted = EnvironmentId(environment_id)
        if manifest is not None:
            await asyncio.to_thread(self._keep_manifest, wanted, manifest)
        else:
            await self._find_manifest(wanted)
        hosts = await self._hosts()
        built = await asyncio.gather(*(self._is_built(address, wanted) for address in hosts.values()))
        if all(built):
            return []
        chunks = await self._survey(wanted, hosts, manifest)
        self.tracker.withdraw(client)
        listings = await self._listings(wanted)
        # Nothing can be built before all listings are there, so they come first.
        absent = sorted(self.tracker.absent(chunks), key=lambda digest: digest not in listings)
        for place, extents in places:
            absent = await self.pulling.begin(place, extents, absent, hosts)
        self._log("offer", environment_id=wanted, hosts=len(hosts), chunks=len(chunks), to_upload=len(absent))
        if client:
            self._givers.add(client)
            self.tracker.promise(client, absent)
        return [(address, list(digests)) for address, digests in self.tracker.plan_uploads(absent, avoid)]

    async def bases(self, environment_id: str) -> list[EnvironmentId] | None:
        """Environments whose manifests are held here, those used last; None if that one's is."""
        return await asyncio.to_thread(self._bases, EnvironmentId(environment_id))

    async def survey(self, where: str) -> dict[str, Any] | None:
        """Manifest and extents of a bundle that hosts see at *where*, from the first that does; None if none does."""
        for address in (await self._hosts()).values():
            found: dict[str, Any] | None = await self.pulling.survey(address, where)
            if found is not None:
                return found
        return None

    async def find_manifest(self, environment_id: str) -> bytes:
        """The canonical bytes of a manifest that anybody here holds.

        Raises
        ------
        EnvironmentMissing
            If nobody does.
        """
        wanted = EnvironmentId(environment_id)
        await self._find_manifest(wanted)
        return (await asyncio.to_thread(self._store.read_manifest, wanted)).to_bytes()

    async def uploaded(self, address: str, digests: list[Digest], size_bytes: int = 0) -> None:
        """The client has brought these chunks, *size_bytes* of them over the network, to the agent at *address*."""
        member = self._roster.members.get(address)
        if member is not None:  # else it left in this moment, and the chunks with it
            self.tracker.received(member["host_id"], digests)
            self.ledger.moved(member["host_id"], CLIENT, size_bytes)
            self._stir()

    async def want(
        self,
        host_id: str,
        address: str,
        environment_id: str,
        errand: str,
        missing: list[Digest],
        first: Sequence[Digest] | None = None,
        dropped: Sequence[Digest] = (),
    ) -> None:
        """A host lacks the *missing* chunks of an environment, and is about to fetch them, or only those of *first*.

        It has found those *dropped* damaged, whatever it has said of them before.

        It gives this *errand* a name of its own, so that a question that was asked for an earlier one, and waits here
        though nobody listens to the answer any more, is not given what then nobody fetches.
        """
        wanted = EnvironmentId(environment_id)
        chunks = (await asyncio.to_thread(self._store.read_manifest, wanted)).chunks
        absent_here = set(missing)
        have = [digest for digest in chunks if digest not in absent_here]
        self.tracker.add_host(host_id, address, have, dropped, self._place(address))
        if wanted not in self._known:
            hosts = await self._hosts()
            hosts.pop(host_id, None)
            await self._survey(wanted, hosts)
        self.tracker.want(host_id, {digest: chunks[digest] for digest in (missing if first is None else first)}, errand)

    async def next_batches(self, host_id: str, errand: str) -> dict[str, Any]:
        """What a host on an errand shall fetch now; ``lost`` counts chunks that nobody can give.

        ``batches`` are rows of source, digests and seconds. Where there is none at the moment, it waits a while: most
        often somebody soon reports what was missing. A host that was forgotten meanwhile (it was not heard for some
        seconds, or told another scheduler what it wants), or has given the errand up, is told so: ``known`` is false.
        """
        answer = self._answer(host_id, errand)
        if answer["batches"] or answer["lost"] or not answer["outstanding"]:
            return answer
        place = asyncio.get_running_loop().create_future()
        self._waiting.append((host_id, errand, place))
        try:
            found: dict[str, Any] = await asyncio.wait_for(place, LINGER_S)
        except asyncio.TimeoutError:
            return self._answer(host_id, errand)
        return found

    async def give_up(self, host_id: str, errand: str) -> None:
        """A host has ended an errand, because it has all, or because something went wrong."""
        self.tracker.give_up(host_id, errand)

    def settle(
        self,
        host_id: str,
        source: str,
        received: Sequence[Digest],
        failed: Sequence[Digest],
        size_bytes: int,
        fault: str,
        reason: str,
    ) -> tuple[int, int]:
        """A host reports what became of a batch; returns how far it is, as (bytes done, bytes in total)."""
        self.tracker.received(host_id, received)
        giver = self._roster.members.get(source, {}).get("host_id", source)
        if size_bytes:
            self.ledger.moved(host_id, giver, size_bytes)
        if failed:
            self.ledger.failed(host_id, giver, reason, blame=fault != LACKS)
            self._log("failed batch", host_id=host_id, source=source, fault=fault, chunks=len(failed), reason=reason)
            logger.log(logging.INFO if fault == LACKS else logging.WARNING, "%s for %s: %s", fault, host_id, reason)
            self.tracker.failed(host_id, source, failed, fault=fault)
        self._stir()
        return self.tracker.progress(host_id)

    def describe(self, host_id: str) -> str:
        """What a host still waits for and what it receives now, for people."""
        left = self.tracker.outstanding(host_id)
        flow = self.ledger.describe(host_id)
        return ", ".join([f"{left:,} chunk{'s' if left != 1 else ''} to come", *([flow] if flow else [])])

    async def withdraw(self, client: str) -> None:
        """A client gives up, or is gone: nobody waits any more for what it was about to upload."""
        self.tracker.withdraw(client)
        self._stir()

    async def client_gone(self, client_id: str) -> None:
        """A client has disconnected: whatever it promised, under any name that begins with its id, will not come."""
        for name in [name for name in self._givers if name.split(" ")[0] == client_id]:
            self._givers.discard(name)
            await self.withdraw(name)

    def _answer(self, host_id: str, errand: str) -> dict[str, Any]:
        if not self.tracker.knows(host_id, errand):
            return {"batches": [], "outstanding": 0, "lost": 0, "known": False}
        batches, outstanding = self.tracker.offer(host_id, errand)
        return {
            "batches": [[batch.source, list(batch.digests), batch.timeout_s] for batch in batches],
            "outstanding": outstanding,
            "lost": self.tracker.lost(host_id, errand) if not batches and outstanding else 0,
            "known": True,
        }

    def _stir(self) -> None:
        """Something changed that those who wait may have waited for; look in a moment, once for many changes."""
        if self._waiting and not self._stirring:
            self._stirring = True
            asyncio.get_running_loop().call_later(STIR_S, self._serve_waiting)

    def _serve_waiting(self) -> None:
        self._stirring = False
        vain: set[Any] = set()
        for _ in range(min(len(self._waiting), STIR_LIMIT)):
            host_id, errand, place = self._waiting.popleft()
            if place.done():
                continue
            asker = (host_id, errand)
            if asker not in vain:
                answer = self._answer(*asker)
                if answer["batches"] or answer["lost"] or not answer["outstanding"]:
                    place.set_result(answer)
                    continue
                vain.add(asker)  # its other questions would be answered in the same way
            self._waiting.append((*asker, place))

    async def _hosts(self) -> dict[str, str]:
        """One agent's address for every host that answers; the tracker forgets the others."""
        before = set(self._roster)
        agents = await self._roster.agents()
        for address in before - set(agents):
            self.tracker.remove_address(address)
        return {identity["host_id"]: address for address, identity in agents.items()}

    async def _listings(self, wanted: EnvironmentId) -> set[Digest]:
        manifest = await asyncio.to_thread(self._store.read_manifest, wanted)
        return {package.listing.digest for package in manifest.packages}

    def _place(self, address: str) -> tuple[str, ...]:
        identity = self._roster.members.get(address, {})
        names = self._roster.names(address) if self._topology else []
        return place_of(identity.get("place", ()), identity.get("machine", address), names, self._topology)

    async def _is_built(self, address: str, wanted: EnvironmentId) -> bool:
        return bool(await self._roster.ask_quietly(address, "envship_has_built", environment_id=wanted))

    def _bases(self, wanted: EnvironmentId) -> list[EnvironmentId] | None:
        held = self._store.environments()
        if wanted in held:
            with contextlib.suppress(EnvironmentMissing):
                self._store.read_manifest(wanted)
                return None
        return self._store.used_last(held)[:BASES_LIMIT]

    def _keep_manifest(self, wanted: EnvironmentId, delta: bytes) -> None:
        self._store.write_manifest(whole_of(delta, wanted, self._store.read_manifest))

    async def _survey(
        self, wanted: EnvironmentId, hosts: Mapping[str, str], delta: bytes | None = None
    ) -> Mapping[Digest, int]:
        """Tell the tracker what *hosts* have of an environment; returns all that there is to have.

        A host that does not hold the manifest is given *delta*, or where that is not enough for it all of it.
        """
        manifest = await asyncio.to_thread(self._store.read_manifest, wanted)
        whole = await asyncio.to_thread(delta_of, manifest)

        async def look(host_id: str, address: str) -> None:
            for known in dict.fromkeys((None, delta, whole)):
                missing = await self._roster.ask_quietly(
                    address, "envship_missing", environment_id=wanted, manifest=known
                )
                if missing is not None:
                    break
            if missing is not None:
                lacks = set(missing)
                have = [digest for digest in manifest.chunks if digest not in lacks]
                self.tracker.add_host(host_id, address, have, lacks, self._place(address))

        await asyncio.gather(*(look(host_id, address) for host_id, address in hosts.items()))
        self._known.add(wanted)
        return manifest.chunks

    async def _find_manifest(self, wanted: EnvironmentId) -> None:
        """Make sure that the scheduler's store holds the manifest, from whichever host has it."""
        with contextlib.suppress(EnvironmentMissing):
            await asyncio.to_thread(self._store.read_manifest, wanted)
            return
        for address in (await self._hosts()).values():
            data = await self._roster.ask_quietly(address, "envship_manifest", environment_id=wanted)
            if data is not None:
                await asyncio.to_thread(self._store.write_manifest, Manifest.from_bytes(data, wanted))
                return
        raise EnvironmentMissing(wanted, "the cluster: no host holds it")
