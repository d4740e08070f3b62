"""Batches that were handed out: who fetches what from whom, until when, and how busy everybody is.

Book-keeping for `worker_bootstrap.tracker`, which decides; no I/O.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from worker_bootstrap.digest import Digest
from worker_bootstrap.holdings import Chunk, Holdings, count_of

PARALLEL = 4
"""Batches that a host fetches at the same time, and serves at the same time. One number for both: where hosts may serve
more than they fetch, some links are full while others idle. With three, the median of 16 hosts took 1.205 of
the time of one link, with four 1.197 (``benchmarks/spread.py``)."""
BATCH_TARGET_BYTES = 4 << 20
"""A batch is filled at least up to here, if there is enough to hand out: calls cost about half a millisecond each."""
BATCH_LIMIT_BYTES = 16 << 20
"""No batch is larger (a single chunk never is, see `worker_bootstrap.manifest`), so neither is any message."""
BATCH_LIMIT_CHUNKS = 4096
"""However small its chunks are, no batch lists more of them."""
SLACK = 6.0
"""A batch may take so many times as long as this host's batches usually do, by their bytes."""
LENIENCY_LIMIT = 32.0
LEAST_PATIENCE_S = 2.0


class Batch(NamedTuple):
    """Chunks to fetch, in one message, from the agent at the address *source*, within *timeout_s*."""

    source: str
    digests: tuple[Digest, ...]
    timeout_s: float = 60.0


class Offer(NamedTuple):
    """Answer to a host that asks for work: batches to fetch one after the other.

    There may be none while *outstanding* chunks are still missing.
    """

    batches: tuple[Batch, ...]
    outstanding: int


class Upload(NamedTuple):
    """Chunks that the client sends, in one message, to the agent at *address*."""

    address: str
    digests: tuple[Digest, ...]


class Host:
    """One store and the agents that share it, at a *place*: from the site down to the machine. Masks are of chunks."""

    def __init__(self, host_id: str, number: int, place: tuple[str, ...]) -> None:
        self.host_id = host_id
        self.number = number
        self.bit = 1 << number
        self.place = place
        self.addresses: dict[str, None] = {}
        self.have = 0
        self.missing = 0
        self.wanted = 0
        self.purposes: dict[str, int] = {}
        self.in_flight: dict[int, Assignment] = {}
        self.total_bytes = 0
        self.done_bytes = 0
        self.serving = 0
        self.seconds_per_byte: float | None = None
        self.leniency = 1.0

    def want(self, asked: int, purpose: str, holdings: Holdings) -> None:
        """Add the chunks of *asked* to what is wanted, for a *purpose*; where nothing was outstanding, begin anew."""
        if not self.outstanding():
            self.wanted = self.total_bytes = self.done_bytes = 0
        self.purposes[purpose] = self.purposes.get(purpose, 0) | asked
        new = asked & ~self.wanted
        self.wanted |= new
        self.missing |= new & ~self.have
        self.total_bytes += holdings.size_bytes(new)
        self.done_bytes += holdings.size_bytes(new & self.have)

    def give_up(self, purpose: str, holdings: Holdings) -> None:
        """Take back what is wanted for that *purpose* alone and has not come. Idempotent."""
        given_up = self.purposes.pop(purpose, 0)
        for others in self.purposes.values():
            given_up &= ~others
        absent = self.missing & given_up
        self.missing ^= absent
        self.wanted &= ~absent
        self.total_bytes -= holdings.size_bytes(absent)

    def outstanding(self, purpose: str | None = None) -> int:
        """How many chunks that are wanted, for that *purpose* or for any, have not come."""
        if purpose is None:
            return count_of(self.missing) + len(self.in_flight)
        asked = self.purposes.get(purpose, 0)
        return count_of(self.missing & asked) + sum(asked >> number & 1 for number in self.in_flight)

    @property
    def site(self) -> str:
        return self.place[0] if self.place else ""

    def next_address(self) -> str:
        """The address of one of its agents, of each in turn."""
        address = next(iter(self.addresses))
        self.addresses[address] = self.addresses.pop(address)
        return address


class Assignment:
    """A batch that *host* was given and has not reported in full; it fetches so many others *before* it."""

    def __init__(
        self, host: Host, source: Host, batch: Batch, chunks: Sequence[Chunk], now_s: float, before: int
    ) -> None:
        self.host = host
        self.source = source
        self.batch = batch
        self.pending = {chunk.number for chunk in chunks}
        self.size_bytes = sum(chunk.size_bytes for chunk in chunks)
        self.began_s = now_s
        self.before = before
        self.crosses = source.site != host.site


class Assignments:
    """All batches under way.

    Parameters
    ----------
    holdings
        Where copies that are on their way are counted.
    clock
        Returns seconds.
    uploads_per_source
        Batches that one host serves at the same time.
    patience_s
        No batch may take longer.
    """

    def __init__(
        self, holdings: Holdings, clock: Callable[[], float], uploads_per_source: int, patience_s: float
    ) -> None:
        self.serving = [0] * uploads_per_source
        """Masks of the hosts that serve 0, 1, … batches; those that serve as many as they may are in none."""
        self._holdings = holdings
        self._clock = clock
        self._patience_s = patience_s
        self._due: list[tuple[float, int, Assignment]] = []
        self._given = 0

    def __iter__(self) -> Iterator[Assignment]:
        return iter([assignment for _, _, assignment in self._due if assignment.pending])

    def give(self, host: Host, source: Host, chunks: Sequence[Chunk], before: int = 0) -> Batch:
        """*host* shall fetch *chunks* from *source*, after so many batches that it was given *before* in one answer."""
        now_s = self._clock()
        timeout_s = self._timeout_s(host, sum(chunk.size_bytes for chunk in chunks))
        batch = Batch(source.next_address(), tuple(chunk.digest for chunk in chunks), timeout_s)
        assignment = Assignment(host, source, batch, chunks, now_s, before)
        self._given += 1
        heapq.heappush(self._due, (now_s + timeout_s * (1 + before), self._given, assignment))
        self._serve(source, 1)
        for chunk in chunks:
            host.missing ^= chunk.bit
            host.in_flight[chunk.number] = assignment
            self._holdings.count(chunk, 1)
            if assignment.crosses:
                self._holdings.sites[host.site].crossing |= chunk.bit
        return batch

    def arrived(self, host: Host, chunk: Chunk) -> None:
        """*chunk* reached *host*, from wherever."""
        assignment = host.in_flight.get(chunk.number)
        if assignment is None:
            return
        self._release(assignment, chunk)
        if not assignment.pending:
            self._learn(assignment)

    def failed(self, host: Host, source: str, chunk: Chunk) -> bool:
        """*chunk* did not come from the address *source*; returns whether it was awaited from there."""
        assignment = host.in_flight.get(chunk.number)
        if assignment is None or assignment.batch.source != source:
            return False
        self._release(assignment, chunk)
        host.missing |= chunk.bit
        return True

    def give_back(self, assignment: Assignment) -> None:
        """Nothing more will come of a batch."""
        for number in list(assignment.pending):
            chunk = self._holdings.numbered[number]
            self._release(assignment, chunk)
            assignment.host.missing |= chunk.bit

    def expired(self) -> Iterator[Assignment]:
        """Batches whose time is over."""
        now_s = self._clock()
        while self._due and (self._due[0][0] <= now_s or not self._due[0][2].pending):
            assignment = heapq.heappop(self._due)[2]
            if assignment.pending:
                yield assignment

    def _timeout_s(self, host: Host, size_bytes: int) -> float:
        if host.seconds_per_byte is None:
            return self._patience_s
        usual_s = host.seconds_per_byte * max(size_bytes, BATCH_TARGET_BYTES)
        return min(self._patience_s, max(LEAST_PATIENCE_S, SLACK * host.leniency * usual_s))

    def _release(self, assignment: Assignment, chunk: Chunk) -> None:
        """*chunk* is no longer under way; the batch ends with its last chunk."""
        assignment.pending.remove(chunk.number)
        del assignment.host.in_flight[chunk.number]
        self._holdings.count(chunk, -1)
        if assignment.crosses:
            self._holdings.sites[assignment.host.site].crossing &= ~chunk.bit
        if not assignment.pending:
            self._serve(assignment.source, -1)

    def _learn(self, assignment: Assignment) -> None:
        """How fast batches usually reach a host: what it waits for the next ones goes by that."""
        host = assignment.host
        took_s = (self._clock() - assignment.began_s) / (1 + assignment.before)
        per_byte = took_s / max(assignment.size_bytes, BATCH_TARGET_BYTES)
        before = host.seconds_per_byte
        host.seconds_per_byte = per_byte if before is None else 0.8 * before + 0.2 * per_byte
        host.leniency = max(1.0, host.leniency * 0.9)

    def _serve(self, source: Host, change: int) -> None:
        if source.serving < len(self.serving):
            self.serving[source.serving] &= ~source.bit
        source.serving += change
        if source.serving < len(self.serving):
            self.serving[source.serving] |= source.bit


def cut(chunks: Iterable[Chunk], target_bytes: int = BATCH_TARGET_BYTES) -> Iterator[list[Chunk]]:
    """Runs of *chunks* of at least *target_bytes* (but for the last), within the limits of a batch."""
    batch: list[Chunk] = []
    size_bytes = 0
    for chunk in chunks:
        if batch and (size_bytes + chunk.size_bytes > BATCH_LIMIT_BYTES or len(batch) == BATCH_LIMIT_CHUNKS):
            yield batch
            batch, size_bytes = [], 0
        batch.append(chunk)
        size_bytes += chunk.size_bytes
        if size_bytes >= target_bytes:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch
