"""Hosts, links and time, simulated around the real tracker: what `benchmarks.spread` cannot put on one machine.

Events in virtual time; nothing is random but what a seed decides. Assumptions, all of them:

- Every host, and the client, has a link of its own, of the same rate in each direction; what lies between is not the
  limit (a switch that carries all links at once). A transfer goes at the rate of the fullest of its two link ends,
  which its transfers share evenly.
- Whoever asks another machine gets its answer after *call_s*; the scheduler, one process, is besides busy with those
  who asked before: `SERVICE_S` for each call, as measured on the real one (Dask's own handling included). A link in use
  keeps calls waiting behind what is queued there, so *call_s* of slow links is large: see `queueing_s`.
- No packet is lost: TCP fills a link.
- A message costs `MESSAGE_S` on both ends beside its bytes: reading, hashing and writing go on at the same time as the
  next transfers, and disks and processors keep up with the link.
- Chunks are of the sizes of a real environment: half to one and a half MiB, compressed to a third.

See also `tests/test_swarm.py`, where peers of such a swarm die, stall, crawl and lie.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from worker_bootstrap.assignments import PARALLEL, Batch, Upload
from worker_bootstrap.digest import Digest, digest_of
from worker_bootstrap.tracker import Tracker
from worker_bootstrap.transfer import UPLOADS, Outbox

CALL_S = 0.001
"""On a fast network."""
SERVICE_S = 0.0004
MESSAGE_S = 0.002
LINGER_S = 1.0
STIR_S = 0.01
STIR_LIMIT = 64
COMPRESSION = 0.33


def chunks_of(count: int, seed: int = 0) -> dict[Digest, int]:
    """So many chunks, of 0.5 to 1.5 MiB."""
    sizes = random.Random(seed)
    return {digest_of(f"{seed} {n}".encode()): sizes.randrange(1 << 19, 3 << 19) for n in range(count)}


def queueing_s(rate: float, queue_bytes: int) -> float:
    """What a call takes there and back, where each of the two links on its way has *queue_bytes* before it half of the
    time."""
    return CALL_S + 2 * (queue_bytes / 2) / rate


@dataclass(eq=False)
class Link:
    """One direction of a host's link."""

    rate: float
    carried: dict[Flow, None] = field(default_factory=dict)


@dataclass(eq=False)
class Flow:
    """A message under way."""

    source: Link
    target: Link
    left_bytes: float
    done: Callable[[], None]
    rate: float = 0.0
    since_s: float = 0.0
    version: int = 0
    ended: bool = False


@dataclass(eq=False)
class SwarmHost:
    """A host: its links, and how it behaves."""

    name: str
    place: tuple[str, ...]
    up: Link
    down: Link
    alive: bool = True
    stalled: bool = False
    lies: bool = False
    full: bool = False
    side: int = 0
    complete_s: float | None = None
    flows: dict[Any, None] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"sim://{self.name}:1"


class Swarm:
    """A client and hosts that spread *chunks*, by the decisions of a real `Tracker`.

    Parameters
    ----------
    hosts
        How many.
    chunks
        What the client has, and every host wants.
    rate
        Bytes a second of every link, in each direction.
    place
        Where the host with a number stands.
    """

    def __init__(
        self,
        hosts: int,
        chunks: Mapping[Digest, int],
        *,
        rate: float = 125e6,
        place: Callable[[int], Sequence[str]] = lambda number: (),
        service_s: float = SERVICE_S,
        call_s: float = CALL_S,
        **options: Any,
    ) -> None:
        self.now_s = 0.0
        self.chunks = dict(chunks)
        self.rate = rate
        self.tracker = Tracker(clock=lambda: self.now_s, **options)
        self.hosts: dict[str, SwarmHost] = {}
        self.by_address: dict[str, SwarmHost] = {}
        self.client_up = Link(rate)
        self.deciding_s = 0.0
        self.calls = 0
        self.moved: list[tuple[str, str, Digest]] = []
        self.record = hosts * len(chunks) <= 100_000
        self.uploaded_bytes = 0.0
        self.wasted_bytes = 0.0
        self.lost: set[str] = set()
        self._service_s, self._call_s = service_s, call_s
        self._free_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._waiting: deque[tuple[SwarmHost, Callable[[Sequence[Batch]], None], float]] = deque()
        self._stirring = False
        self._place = place
        for number in range(hosts):
            self.join(number)

    # -- what happens to the swarm

    def join(self, number: int) -> SwarmHost:
        """A host joins, with nothing."""
        host = SwarmHost(f"h{number}", tuple(self._place(number)), Link(self.rate), Link(self.rate))
        self.hosts[host.name] = self.by_address[host.address] = host
        self._timed(lambda: self.tracker.add_host(host.name, host.address, place=host.place))
        return host

    def start(self, host: SwarmHost, chunks: Mapping[Digest, int] | None = None) -> None:
        """The host wants *chunks* (all, if none are named) and begins to fetch."""
        self._timed(lambda: self.tracker.want(host.name, self.chunks if chunks is None else chunks))
        for _ in range(PARALLEL):
            self._ask(host)

    def upload(self) -> None:
        """The client begins to upload what nobody has."""
        self.tracker.withdraw("client")
        absent = self.tracker.absent(self.chunks)
        plan = self._timed(lambda: self.tracker.plan_uploads(absent))
        self.tracker.promise("client", absent)
        outbox = Outbox(plan)
        for _ in range(UPLOADS):
            self._send_next(outbox)

    def vanish(self) -> None:
        """The client is gone, in the middle of whatever it was sending."""
        self.client_up.rate = 0.0
        self.tracker.withdraw("client")

    def kill(self, host: SwarmHost) -> None:
        """The host dies; the scheduler hears of it at once, its peers when their connections break."""
        host.alive = False
        self.tracker.remove_address(host.address)
        for flow, broken in list(host.flows):
            self._end(flow)
            broken()

    def stall(self, host: SwarmHost) -> None:
        """The host stays connected, and sends nothing any more."""
        host.stalled = True
        host.up.rate = 0.0
        self._retime(host.up)

    def slow(self, host: SwarmHost, factor: float) -> None:
        """The host's link gets so many times slower."""
        for link in (host.up, host.down):
            link.rate /= factor
            self._retime(link)

    def fill_disk(self, host: SwarmHost) -> None:
        """The host keeps nothing more: it says that it gives up, and lets go of what is on its way to it."""
        host.full = True
        self.tracker.give_up(host.name, "")
        for flow, broken in list(host.flows):
            if flow.target is host.down:
                broken()

    def split(self, sides: Callable[[SwarmHost], int]) -> None:
        """Hosts reach only those of their own side (and the scheduler); the same side for all heals it."""
        for host in self.hosts.values():
            host.side = sides(host)
        for host in self.hosts.values():
            for flow, broken in list(host.flows):
                ends = [h for h in self.hosts.values() if flow.source is h.up or flow.target is h.down]
                if len({h.side for h in ends}) > 1:
                    self._end(flow)
                    broken()

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        """Have *event* happen then."""
        self._sequence += 1
        heapq.heappush(self._events, (when_s, self._sequence, event))

    def run(self, until_s: float = 1e9) -> None:
        """Let time pass until nothing more happens, or every living host is complete."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()

    # -- figures

    @property
    def wire_bytes(self) -> float:
        """All chunks, compressed."""
        return sum(self.chunks.values()) * COMPRESSION

    @property
    def limit_s(self) -> float:
        """The time of all bytes over one link."""
        return self.wire_bytes / self.rate

    def completions_s(self) -> list[float]:
        """When each host was complete, sorted; those that are not are left out."""
        return sorted(host.complete_s for host in self.hosts.values() if host.complete_s is not None)

    # -- the scheduler

    def _timed(self, decide: Callable[[], Any]) -> Any:
        began = time.thread_time()
        try:
            return decide()
        finally:
            self.deciding_s += time.thread_time() - began

    def _call(self, then: Callable[[], None]) -> None:
        """A call reaches the scheduler, waits for its turn, and is worked on."""
        self.calls += 1
        self._free_s = max(self._free_s, self.now_s + self._call_s / 2) + self._service_s
        self.at(self._free_s, then)

    def _ask(self, host: SwarmHost, settles: Sequence[Callable[[], None]] = ()) -> None:
        def answer() -> None:
            if not host.alive or host.full:
                return
            for settle in settles:
                self._timed(settle)
                self._stir()
            self._look(host, lambda batches: self._fetch(host, batches, []), self.now_s + LINGER_S)

        self._call(answer)

    def _look(self, host: SwarmHost, use: Callable[[Sequence[Batch]], None], until_s: float) -> None:
        if not host.alive:
            return
        batches, outstanding = self._timed(lambda: self.tracker.offer(host.name))
        if batches:
            self.at(self.now_s + self._call_s / 2, lambda: use(batches))
        elif outstanding:
            if self._timed(lambda: self.tracker.lost(host.name)):
                self.lost.add(host.name)
                return
            self._waiting.append((host, use, until_s))
            self.at(until_s, self._stir)
        elif host.complete_s is None:
            host.complete_s = self.now_s

    def _stir(self) -> None:
        if self._waiting and not self._stirring:
            self._stirring = True
            self.at(self.now_s + STIR_S, self._serve_waiting)

    def _serve_waiting(self) -> None:
        self._stirring = False
        vain: set[str] = set()
        for _ in range(min(len(self._waiting), STIR_LIMIT)):
            host, use, until_s = self._waiting.popleft()
            if host.name in vain and until_s > self.now_s:
                self._waiting.append((host, use, until_s))
                continue
            vain.add(host.name)
            self._look(host, use, max(until_s, self.now_s + LINGER_S) if until_s <= self.now_s else until_s)

    # -- the hosts

    def _fetch(self, host: SwarmHost, batches: Sequence[Batch], settles: list[Callable[[], None]]) -> None:
        """The host asks the source of the first batch, which begins to send when it hears of it; then for the others.

        What became of all of them it tells at the end.
        """

        def then(settle: Callable[[], None]) -> None:
            settles.append(settle)
            if len(batches) > 1 and not host.full:
                self._fetch(host, batches[1:], settles)
            else:
                self._ask(host, settles)

        self.at(self.now_s + self._call_s / 2, lambda: self._begin(host, batches[0], then))

    def _begin(self, host: SwarmHost, batch: Batch, then: Callable[[Callable[[], None]], None]) -> None:
        if not host.alive:
            return
        source = self.by_address[batch.source]
        if not source.alive or source.side != host.side:
            self.at(self.now_s + 0.1, lambda: then(lambda: self._fail(host, batch, "silent")))
            return
        size_bytes = sum(self.chunks[digest] for digest in batch.digests) * COMPRESSION
        state = {"over": False}

        def finish(settle: Callable[[], None]) -> None:
            if not state["over"]:
                state["over"] = True
                for end in (host, source):
                    end.flows.pop(entry, None)
                self._end(flow)
                then(settle)

        def arrived() -> None:
            if source.lies:
                finish(lambda: self._fail(host, batch, "lied"))
            else:
                finish(lambda: self._arrive(host, batch))

        def broken() -> None:
            self.wasted_bytes += size_bytes - flow.left_bytes
            finish(lambda: self._fail(host, batch, "silent"))

        flow = self._send(source.up, host.down, size_bytes, arrived)
        entry = (flow, broken)
        for end in (host, source):
            end.flows[entry] = None
        self.at(self.now_s + batch.timeout_s, lambda: None if state["over"] else broken())

    def _arrive(self, host: SwarmHost, batch: Batch) -> None:
        if self.record:
            self.moved.extend((host.name, batch.source, digest) for digest in batch.digests)
        self.tracker.received(host.name, batch.digests)
        if host.complete_s is None and not self.tracker.outstanding(host.name):
            host.complete_s = self.now_s

    def _fail(self, host: SwarmHost, batch: Batch, fault: str) -> None:
        self.tracker.failed(host.name, batch.source, batch.digests, fault=fault)

    # -- the client

    def _send_next(self, outbox: Outbox) -> None:
        upload = outbox.take()
        if upload is None:
            return
        host = self.by_address[upload.address]
        began_s = self.now_s
        size_bytes = sum(self.chunks[digest] for digest in upload.digests) * COMPRESSION
        self.uploaded_bytes += size_bytes

        def arrived() -> None:
            outbox.sent(upload.address, self.now_s - began_s)
            self._call(self._kept(host, upload))
            self._send_next(outbox)

        def send() -> None:
            if host.alive:
                self._send(self.client_up, host.down, size_bytes, arrived)
            else:  # whoever is dead stays busy, so the rest goes to others
                self._send_next(outbox)

        self.at(self.now_s + self._call_s, send)  # it asks first what the host holds already

    def _kept(self, host: SwarmHost, upload: Upload) -> Callable[[], None]:
        def tell() -> None:
            if host.alive:
                self._timed(lambda: self.tracker.received(host.name, upload.digests))
                self._stir()

        return tell

    # -- the network

    def _send(self, source: Link, target: Link, size_bytes: float, done: Callable[[], None]) -> Flow:
        flow = Flow(source, target, size_bytes + MESSAGE_S * self.rate, done)
        flow.since_s = self.now_s
        source.carried[flow] = target.carried[flow] = None
        self._retime(source)
        self._retime(target)
        return flow

    def _retime(self, link: Link) -> None:
        """The rates of the flows on *link* have changed: move on to now, and see anew when each will be through."""
        for flow in list(link.carried):
            flow.left_bytes -= flow.rate * (self.now_s - flow.since_s)
            flow.since_s = self.now_s
            flow.rate = min(end.rate / len(end.carried) for end in (flow.source, flow.target))
            flow.version += 1
            if flow.rate > 0:
                self.at(self.now_s + max(0.0, flow.left_bytes) / flow.rate, self._completion(flow, flow.version))

    def _completion(self, flow: Flow, version: int) -> Callable[[], None]:
        def complete() -> None:
            if flow.version == version and not flow.ended:
                self._end(flow)
                flow.done()

        return complete

    def _end(self, flow: Flow) -> None:
        if flow.ended:
            return
        flow.ended = True
        for link in (flow.source, flow.target):
            del link.carried[flow]
            self._retime(link)
