"""Who holds which chunk, and who fetches what from whom next.

Decisions only: no I/O, no Dask, and no clock of its own. The coordinator feeds it with what agents report and hands
out what it decides; `worker_bootstrap.transfer` moves the bytes. In the manner of Meta's Owl: peers are dumb, one
tracker sees everything, so that a dead or lying peer costs a retry and not the exchange.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from worker_bootstrap.digest import Digest

BATCH_TARGET_BYTES = 4 << 20
"""A batch is filled at least up to here, if there is enough to hand out: calls cost about half a millisecond each."""
BATCH_LIMIT_BYTES = 16 << 20
"""No batch is larger (a single chunk never is, see `worker_bootstrap.manifest`), so neither is any message."""
BATCH_LIMIT_CHUNKS = 4096
"""However small its chunks are, no batch lists more of them."""
BATCHES_PER_SHARE = 4
"""What a host still needs is cut into about this many batches, so that it can use several sources at once."""
WINDOW_CHUNKS = 512
"""The rarest chunk is looked for among this many, so that a decision's cost does not grow with the environment."""


class Batch(NamedTuple):
    """Chunks to fetch, in one message, from the agent at the address *source*."""

    source: str
    digests: tuple[Digest, ...]


class Offer(NamedTuple):
    """Answer to a host that asks for work: *batch* may be None while *outstanding* chunks are still missing."""

    batch: Batch | None
    outstanding: int


class Upload(NamedTuple):
    """Chunks that the client sends, in one message, to the agent at *address*."""

    address: str
    digests: tuple[Digest, ...]


class _Host:
    """One store and the agents that share it."""

    def __init__(self) -> None:
        self.addresses: dict[str, None] = {}
        self.have: set[Digest] = set()
        self.missing: dict[Digest, None] = {}
        self.in_flight: dict[Digest, _Assignment] = {}
        self.wanted: set[Digest] = set()
        self.total_bytes = 0
        self.done_bytes = 0
        self.blamed: set[str] = set()
        self.slow: set[str] = set()


class _Assignment:
    """A batch that a host was given and has not reported in full."""

    def __init__(self, host_id: str, batch: Batch, deadline_s: float) -> None:
        self.host_id = host_id
        self.source = batch.source
        self.pending = dict.fromkeys(batch.digests)
        self.deadline_s = deadline_s


class Tracker:
    """The exchange of chunks between the hosts of one cluster.

    Parameters
    ----------
    clock
        Returns seconds, never going back.
    uploads_per_source
        Batches that one source address serves at the same time.
    patience_s
        A batch that is not reported for so long is handed out again, from another source if there is one.

    Notes
    -----
    Deterministic: the same calls give the same answers in every process. Not thread-safe; meant for one event loop.
    Holdings are kept as long as the host is known, so a second environment needs only what the first did not bring.
    """

    def __init__(self, *, clock: Callable[[], float], uploads_per_source: int = 4, patience_s: float = 60.0) -> None:
        self._clock = clock
        self._uploads_per_source = uploads_per_source
        self._patience_s = patience_s
        self._hosts: dict[str, _Host] = {}
        self._host_of: dict[str, str] = {}
        self._sizes: dict[Digest, int] = {}
        # Dicts as ordered sets: the order of a set of strings differs from process to process.
        self._holders: dict[Digest, dict[str, None]] = {}
        self._copies_coming: dict[Digest, int] = {}
        self._serving: dict[str, int] = {}
        self._assignments: dict[_Assignment, None] = {}
        self._next_upload = 0

    # -- hosts ------------------------------------------------------------------------------------------------------

    def add_host(self, host_id: str, address: str, have: Iterable[Digest] = (), lacks: Iterable[Digest] = ()) -> None:
        """Make the agent at *address* known as one of the host *host_id*, which holds *have* and not *lacks*.

        May be called again, with another address of the same host or with more chunks. An address belongs to one
        host: a new host at a known address replaces the old one.
        """
        if self._host_of.get(address, host_id) != host_id:
            self.remove_address(address)
        self._hosts.setdefault(host_id, _Host()).addresses[address] = None
        self._host_of[address] = host_id
        self.received(host_id, have)
        self._lose(host_id, lacks)

    def remove_address(self, address: str) -> None:
        """Forget an agent that left; a host without agents is forgotten with all that it holds. Idempotent."""
        host_id = self._host_of.pop(address, None)
        if host_id is None:
            return
        for assignment in [a for a in self._assignments if a.source == address]:
            self._give_back(assignment)
        host = self._hosts[host_id]
        del host.addresses[address]
        if not host.addresses:
            for assignment in [a for a in self._assignments if a.host_id == host_id]:
                self._give_back(assignment)
            for digest in host.have:
                self._drop_holder(digest, host_id)
            del self._hosts[host_id]

    def hosts(self) -> dict[str, tuple[str, ...]]:
        """The addresses of every known host, by host id."""
        return {host_id: tuple(host.addresses) for host_id, host in self._hosts.items()}

    # -- needs ------------------------------------------------------------------------------------------------------

    def want(self, host_id: str, chunks: Mapping[Digest, int]) -> None:
        """The host needs *chunks* (digest to uncompressed bytes); those that it holds count as done.

        Adds to what it wanted before; where nothing was outstanding, `progress` starts anew and blame is forgotten.

        Raises
        ------
        KeyError
            If the host is not known.
        """
        host = self._hosts[host_id]
        if not self.outstanding(host_id):
            host.wanted.clear()
            host.blamed.clear()
            host.slow.clear()
            host.total_bytes = host.done_bytes = 0
        self._sizes.update(chunks)
        # Every host asks in an order of its own, so that hosts which start together soon have something to give.
        for digest in sorted(chunks, key=lambda name: (zlib.crc32(f"{host_id}{name}".encode()), name)):
            if digest in host.wanted:
                continue
            host.wanted.add(digest)
            host.total_bytes += chunks[digest]
            if digest in host.have:
                host.done_bytes += chunks[digest]
            else:
                host.missing[digest] = None

    def outstanding(self, host_id: str) -> int:
        """How many of the chunks that the host wants have not arrived; 0 also for a host that is not known."""
        host = self._hosts.get(host_id)
        return len(host.missing) + len(host.in_flight) if host else 0

    def progress(self, host_id: str) -> tuple[int, int]:
        """(bytes there, bytes wanted) of what the host wants, uncompressed."""
        host = self._hosts.get(host_id)
        return (host.done_bytes, host.total_bytes) if host else (0, 0)

    # -- what the client uploads ------------------------------------------------------------------------------------

    def absent(self, chunks: Mapping[Digest, int]) -> list[Digest]:
        """Those of *chunks* that no known host holds: what the client must upload, once."""
        self._sizes.update(chunks)
        return [digest for digest in chunks if not self._holders.get(digest)]

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
        chunks = list(dict.fromkeys(digests))
        if not chunks:
            return []
        reachable = ([a for a in host.addresses if a not in avoid] for host in self._hosts.values())
        targets = [addresses[0] for addresses in reachable if addresses]
        if not targets:
            raise ValueError("no host is known that could be reached")
        target_bytes = _target_bytes(sum(self._sizes[digest] for digest in chunks) // len(targets))
        uploads = []
        for batch in self._cut(chunks, target_bytes):
            uploads.append(Upload(targets[self._next_upload % len(targets)], batch))
            self._next_upload += 1
        return uploads

    # -- the exchange -----------------------------------------------------------------------------------------------

    def offer(self, host_id: str) -> Offer:
        """`next_batch` and `outstanding` in one answer."""
        return Offer(self.next_batch(host_id), self.outstanding(host_id))

    def next_batch(self, host_id: str) -> Batch | None:
        """What the host should fetch now, or None if there is nothing to hand out at the moment.

        Rarest chunks first (copies under way count), from the least busy agent that holds them. A source that this
        host blamed is asked only for chunks that nobody else holds.
        """
        self._expire()
        host = self._hosts.get(host_id)
        if host is None:
            return None
        window = self._window(host)
        for digest in window:
            source = self._source(host, digest)
            if source is not None:
                return self._assign(host_id, source, window, first=digest)
        return None

    def received(self, host_id: str, digests: Iterable[Digest]) -> None:
        """The host now holds *digests*, wherever they came from. Idempotent; unknown hosts are ignored."""
        host = self._hosts.get(host_id)
        if host is None:
            return
        for digest in digests:
            if digest in host.have:
                continue
            host.have.add(digest)
            self._holders.setdefault(digest, {})[host_id] = None
            needed = digest in host.missing or digest in host.in_flight
            if digest in host.in_flight:
                self._release(host.in_flight[digest], digest)
            host.missing.pop(digest, None)
            if needed:
                host.done_bytes += self._sizes[digest]

    def failed(self, host_id: str, source: str, digests: Iterable[Digest], *, blame: bool) -> None:
        """The host did not get *digests* from *source*, which no longer counts as their holder.

        Parameters
        ----------
        blame
            The source sent wrong bytes or died: this host is sent elsewhere from now on, wherever there is an
            elsewhere. Without blame, the source merely lacks the chunks.
        """
        digests = tuple(digests)
        if source in self._host_of:
            self._lose(self._host_of[source], digests)
        host = self._hosts.get(host_id)
        if host is None:
            return
        if blame:
            host.blamed.add(source)
        for digest in digests:
            assignment = host.in_flight.get(digest)
            if assignment is not None and assignment.source == source:
                self._release(assignment, digest)
                host.missing[digest] = None

    # -- decisions --------------------------------------------------------------------------------------------------

    def _window(self, host: _Host) -> list[Digest]:
        held = (digest for digest in host.missing if self._holders.get(digest))
        return sorted(islice(held, WINDOW_CHUNKS), key=self._copies)

    def _copies(self, digest: Digest) -> int:
        return len(self._holders[digest]) + self._copies_coming.get(digest, 0)

    def _source(self, host: _Host, digest: Digest) -> str | None:
        """The least busy address that may serve *digest* to *host* now."""
        addresses = [address for host_id in self._holders[digest] for address in self._hosts[host_id].addresses]
        trusted = [address for address in addresses if address not in host.blamed]
        free = [a for a in trusted or addresses if self._serving.get(a, 0) < self._uploads_per_source]
        return min(free, key=lambda a: (a in host.slow, self._serving.get(a, 0)), default=None)

    def _assign(self, host_id: str, source: str, window: Sequence[Digest], first: Digest) -> Batch:
        host = self._hosts[host_id]
        held = self._hosts[self._host_of[source]].have
        blamed = source in host.blamed
        # From a blamed source, only what has no other holder: one chunk at a time shows that.
        wanted = [first] if blamed else [first, *(d for d in window if d in held and d != first)]
        target_bytes = _target_bytes(sum(self._sizes[digest] for digest in window) // BATCHES_PER_SHARE)
        batch = Batch(source, next(self._cut(wanted, target_bytes)))
        assignment = _Assignment(host_id, batch, self._clock() + self._patience_s)
        self._assignments[assignment] = None
        self._serving[source] = self._serving.get(source, 0) + 1
        for digest in batch.digests:
            del host.missing[digest]
            host.in_flight[digest] = assignment
            self._copies_coming[digest] = self._copies_coming.get(digest, 0) + 1
        return batch

    def _cut(self, digests: Sequence[Digest], target_bytes: int) -> Iterator[tuple[Digest, ...]]:
        """Runs of *digests* of at least *target_bytes* (but for the last), within the limits of a batch."""
        batch: list[Digest] = []
        size_bytes = 0
        for digest in digests:
            if batch and (size_bytes + self._sizes[digest] > BATCH_LIMIT_BYTES or len(batch) == BATCH_LIMIT_CHUNKS):
                yield tuple(batch)
                batch, size_bytes = [], 0
            batch.append(digest)
            size_bytes += self._sizes[digest]
            if size_bytes >= target_bytes:
                yield tuple(batch)
                batch, size_bytes = [], 0
        if batch:
            yield tuple(batch)

    # -- book-keeping -----------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        now_s = self._clock()
        while self._assignments:
            oldest = next(iter(self._assignments))
            if oldest.deadline_s > now_s:
                return
            self._hosts[oldest.host_id].slow.add(oldest.source)
            self._give_back(oldest)

    def _give_back(self, assignment: _Assignment) -> None:
        host = self._hosts[assignment.host_id]
        for digest in list(assignment.pending):
            self._release(assignment, digest)
            host.missing[digest] = None

    def _release(self, assignment: _Assignment, digest: Digest) -> None:
        """*digest* is no longer under way; the batch ends with its last chunk."""
        del assignment.pending[digest]
        del self._hosts[assignment.host_id].in_flight[digest]
        self._copies_coming[digest] -= 1
        if not self._copies_coming[digest]:
            del self._copies_coming[digest]
        if not assignment.pending:
            del self._assignments[assignment]
            self._serving[assignment.source] -= 1
            if not self._serving[assignment.source]:
                del self._serving[assignment.source]

    def _lose(self, host_id: str, digests: Iterable[Digest]) -> None:
        for digest in digests:
            self._hosts[host_id].have.discard(digest)
            self._drop_holder(digest, host_id)

    def _drop_holder(self, digest: Digest, host_id: str) -> None:
        holders = self._holders.get(digest, {})
        holders.pop(host_id, None)
        if not holders:
            self._holders.pop(digest, None)


def _target_bytes(share_bytes: int) -> int:
    return max(BATCH_TARGET_BYTES, min(share_bytes, BATCH_LIMIT_BYTES))
