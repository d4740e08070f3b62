"""Who fetches what from whom next.

Decisions only: no I/O, no Dask, and no clock of its own. The coordinator feeds it with what agents report and hands
out what it decides; `worker_bootstrap.transfer` moves the bytes. In the manner of Meta's Owl: peers are dumb, one
tracker sees everything, so that a dead or lying peer costs a retry and not the exchange. Its memory is in `holdings`,
`assignments`, `mistrust` and `promises`; what it hands out is chosen in `choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from worker_bootstrap.assignments import (
    LENIENCY_LIMIT,
    PARALLEL,
    Assignments,
    Batch,
    Host,
    Offer,
    Upload,
    cut,
)
from worker_bootstrap.choice import Choice
from worker_bootstrap.digest import Digest
from worker_bootstrap.holdings import Holdings, count_of
from worker_bootstrap.mistrust import LIED, SILENT, Mistrust
from worker_bootstrap.promises import Promises

MANY = 192
"""Of so many hosts and more, each is given several batches at once: a scheduler answers some 2,500 calls a second."""
AT_ONCE_LIMIT = 4


class Tracker:
    """The exchange of chunks between the hosts of one cluster.

    Parameters
    ----------
    clock
        Returns seconds, never going back.
    uploads_per_source
        Batches that one host serves at the same time.
    patience_s
        A batch that is not reported for so long is handed out again, from another source if there is one; sooner where
        the host's other batches were much faster.

    Notes
    -----
    Deterministic: the same calls give the same answers in every process. Not thread-safe; meant for one event loop.
    Holdings are kept as long as the host is known, so a second environment needs only what the first did not bring.
    """

    def __init__(
        self, *, clock: Callable[[], float], uploads_per_source: int = PARALLEL, patience_s: float = 60.0
    ) -> None:
        self._hosts: dict[str, Host] = {}
        self._numbered: dict[int, Host] = {}
        self._host_of: dict[str, Host] = {}
        self._holdings = Holdings()
        self._mistrust = Mistrust(clock)
        self._near: dict[tuple[str, ...], int] = {}
        self._assignments = Assignments(self._holdings, clock, uploads_per_source, patience_s)
        self._promises = Promises(clock, patience_s)
        self._choice = Choice(self._numbered, self._near, self._holdings, self._assignments, self._mistrust)
        self._next_upload = 0

    # -- hosts ------------------------------------------------------------------------------------------------------

    def add_host(
        self,
        host_id: str,
        address: str,
        have: Iterable[Digest] = (),
        lacks: Iterable[Digest] = (),
        place: Sequence[str] = (),
    ) -> None:
        """Make the agent at *address* known as one of the host *host_id*, which holds *have* and not *lacks*.

        May be called again, with another address of the same host or with more chunks. An address belongs to one
        host: a new host at a known address replaces the old one. *place* says where the host stands, from the site
        down to the machine; the place that a host was first given counts.
        """
        known = self._host_of.get(address)
        if known is not None and known.host_id != host_id:
            self.remove_address(address)
        host = self._hosts.get(host_id)
        if host is None:
            host = self._new_host(host_id, tuple(place))
        host.addresses[address] = None
        self._host_of[address] = host
        self.received(host_id, have)
        self._lose(host, lacks)

    def remove_address(self, address: str) -> None:
        """Forget an agent that left; a host without agents is forgotten with all that it holds. Idempotent."""
        host = self._host_of.pop(address, None)
        if host is None:
            return
        for assignment in self._assignments:
            if assignment.batch.source == address:
                self._assignments.give_back(assignment)
        del host.addresses[address]
        if not host.addresses:
            self._remove_host(host)

    def knows(self, host_id: str, purpose: str) -> bool:
        """Whether the host has said that it needs something for that *purpose*, and neither gave up nor left since."""
        return host_id in self._hosts and purpose in self._hosts[host_id].purposes

    def hosts(self) -> dict[str, tuple[str, ...]]:
        """The addresses of every known host, by host id."""
        return {host_id: tuple(host.addresses) for host_id, host in self._hosts.items()}

    # -- needs ------------------------------------------------------------------------------------------------------

    def want(self, host_id: str, chunks: Mapping[Digest, int], purpose: str = "") -> None:
        """The host needs *chunks* (digest to uncompressed bytes) for a *purpose*; those that it holds count as done.

        Adds to what it wanted before; where nothing was outstanding, `progress` starts anew and blame is forgotten.
        Chunks that are wanted for several purposes are fetched once.

        Raises
        ------
        KeyError
            If the host is not known.
        """
        host = self._hosts[host_id]
        if not host.outstanding():
            self._mistrust.forgive(host.number)
        host.want(self._holdings.mask(chunks), purpose, self._holdings)

    def give_up(self, host_id: str, purpose: str) -> None:
        """The host does not go on fetching for that *purpose*, done or not. Idempotent."""
        host = self._hosts.get(host_id)
        if host is None:
            return
        if set(host.purposes) <= {purpose}:  # else what is on its way may be for another one
            for assignment in dict.fromkeys(host.in_flight.values()):
                self._assignments.give_back(assignment)
        host.give_up(purpose, self._holdings)

    def outstanding(self, host_id: str, purpose: str | None = None) -> int:
        """How many chunks that the host wants (None: for any *purpose*) have not arrived; 0 for an unknown host."""
        return self._hosts[host_id].outstanding(purpose) if host_id in self._hosts else 0

    def progress(self, host_id: str) -> tuple[int, int]:
        """(bytes there, bytes wanted) of what the host wants, uncompressed."""
        host = self._hosts.get(host_id)
        return (host.done_bytes, host.total_bytes) if host else (0, 0)

    def lost(self, host_id: str, purpose: str | None = None) -> int:
        """How many of the chunks that the host wants (for one *purpose*) nobody holds, brings, or has promised."""
        host = self._hosts.get(host_id)
        if host is None or not host.missing & self._holdings.rarity[0]:
            return 0
        asked = host.missing if purpose is None else host.missing & host.purposes.get(purpose, 0)
        return count_of(asked & self._holdings.rarity[0] & ~self._promises.mask())

    # -- what the client uploads ------------------------------------------------------------------------------------

    def absent(self, chunks: Mapping[Digest, int]) -> list[Digest]:
        """Those of *chunks* that no known host holds, and no client has promised: to be uploaded, once."""
        asked = self._holdings.mask(chunks) & ~self._promises.mask()
        return [c.digest for c in self._holdings.known(chunks) if not c.holders and asked & c.bit]

    def promise(self, who: str, digests: Iterable[Digest]) -> None:
        """*who* begins to upload *digests*: hosts that need them wait for them, as long as some arrive now and then."""
        self._promises.make(who, sum(c.bit for c in self._holdings.known(dict.fromkeys(digests)) if not c.holders))

    def promised(self) -> bool:
        """Whether anybody is still bringing chunks."""
        return bool(self._promises.mask())

    def withdraw(self, who: str) -> None:
        """Whatever *who* promised will not come any more. Idempotent."""
        self._promises.withdraw(who)

    def plan_uploads(self, digests: Iterable[Digest], avoid: Collection[str] = ()) -> list[Upload]:
        """Messages that bring *digests* into the cluster, each to one host, to different hosts in turn.

        Parameters
        ----------
        digests
            Chunks whose sizes are known from `want` or `absent`.
        avoid
            Addresses that the client could not reach.

        Raises
        ------
        ValueError
            If there are chunks to upload, and no address to send them to.
        """
        chunks = list(self._holdings.known(dict.fromkeys(digests)))
        if not chunks:
            return []
        reachable = ([a for a in host.addresses if a not in avoid] for host in self._hosts.values())
        targets = [addresses[0] for addresses in reachable if addresses]
        if not targets:
            raise ValueError("no host is known that could be reached")
        uploads = []
        for batch in cut(chunks):
            uploads.append(Upload(targets[self._next_upload % len(targets)], tuple(c.digest for c in batch)))
            self._next_upload += 1
        return uploads

    # -- the exchange -----------------------------------------------------------------------------------------------

    def offer(self, host_id: str, purpose: str | None = None) -> Offer:
        """`next_batch`, several times where there are many hosts, and `outstanding` in one answer.

        The batches may serve another purpose as well.
        """
        batches: list[Batch] = []
        for _ in range(min(1 + len(self._hosts) // MANY, AT_ONCE_LIMIT)):
            batch = self.next_batch(host_id, len(batches))
            if batch is None:
                break
            batches.append(batch)
        return Offer(tuple(batches), self.outstanding(host_id, purpose))

    def next_batch(self, host_id: str, before: int = 0) -> Batch | None:
        """What the host should fetch now, or None if there is nothing to hand out at the moment; see `Choice`.

        It fetches so many other batches *before*, which it was given in the same answer.
        """
        self._expire()
        host = self._hosts.get(host_id)
        return None if host is None else self._choice.next_batch(host, before)

    def received(self, host_id: str, digests: Iterable[Digest]) -> None:
        """The host now holds *digests*, wherever they came from. Idempotent; unknown hosts are ignored."""
        host = self._hosts.get(host_id)
        if host is None:
            return
        for digest in digests:
            chunk = self._holdings.chunk(digest)
            if host.have & chunk.bit:
                continue
            host.have |= chunk.bit
            self._promises.keep(chunk.bit)
            self._holdings.keep(chunk, host.number, host.site)
            if chunk.number in host.in_flight or host.missing & chunk.bit:
                host.missing &= ~chunk.bit
                host.done_bytes += chunk.size_bytes
            self._assignments.arrived(host, chunk)

    def failed(self, host_id: str, source: str, digests: Iterable[Digest], *, fault: str) -> None:
        """The host did not get *digests* from *source*.

        Parameters
        ----------
        fault
            ``lacks``: the source does not hold them. ``lied``: it sent something else under their names; it no longer
            counts as their holder, and everybody is sent elsewhere wherever there is an elsewhere. ``silent``: it died,
            broke off or took too long; this host is sent elsewhere for a time that doubles with every such failure.
        """
        digests = tuple(digests)
        culprit = self._host_of.get(source)
        host = self._hosts.get(host_id)
        if culprit is not None:
            if fault != SILENT:
                self._lose(culprit, digests)
            if fault == LIED or host is not None:
                self._mistrust.blame(host.number if host else None, culprit.number, fault)
        if host is None:
            return
        awaited = [self._assignments.failed(host, source, chunk) for chunk in self._holdings.known(digests)]
        if fault == SILENT and any(awaited):
            host.leniency = min(2 * host.leniency, LENIENCY_LIMIT)
        if culprit is not None:
            self._give_up(culprit, digests)

    # -- book-keeping -----------------------------------------------------------------------------------------------

    def _new_host(self, host_id: str, place: tuple[str, ...]) -> Host:
        host = Host(host_id, self._holdings.add_host(place[0] if place else ""), place)
        self._hosts[host_id] = self._numbered[host.number] = host
        for depth in range(1, len(place) + 1):
            self._near[place[:depth]] = self._near.get(place[:depth], 0) | host.bit
        self._assignments.serving[0] |= host.bit
        return host

    def _remove_host(self, host: Host) -> None:
        for assignment in self._assignments:
            if host in (assignment.host, assignment.source):
                self._assignments.give_back(assignment)
        for depth in range(1, len(host.place) + 1):
            self._near[host.place[:depth]] &= ~host.bit
        self._assignments.serving[0] &= ~host.bit
        self._holdings.remove_host(host.number, host.site, host.have)
        self._mistrust.forget(host.number)
        del self._hosts[host.host_id], self._numbered[host.number]

    def _expire(self) -> None:
        for assignment in self._assignments.expired():
            self._mistrust.blame(assignment.host.number, assignment.source.number, SILENT)
            self._assignments.give_back(assignment)
            self._give_up(assignment.source, assignment.batch.digests)

    def _give_up(self, host: Host, digests: Iterable[Digest]) -> None:
        """Of a host that stays silent, what only it holds counts as lost: a client can bring it again."""
        if self._mistrust.is_hopeless(host.number, len(self._hosts) - 1):
            self._lose(host, [c.digest for c in self._holdings.known(digests) if c.holders == host.bit])

    def _lose(self, host: Host, digests: Iterable[Digest]) -> None:
        for chunk in self._holdings.known(digests):
            if not host.have & chunk.bit:
                continue
            host.have ^= chunk.bit
            self._holdings.drop(chunk, host.number, host.site)
            if host.wanted & chunk.bit and (host.missing or host.in_flight):
                host.missing |= chunk.bit
                host.done_bytes -= chunk.size_bytes
            else:  # what it fetched is complete; should it need the chunk again, it will say so
                host.wanted &= ~chunk.bit
