"""The choice: which batch a host fetches next, and from whom.

Rarest chunks first (copies under way count), from the nearest, then the least busy host that holds them. Between sites
each chunk travels once. Liars are asked only for what nobody else holds, one chunk at a time. Decisions only, for
`worker_bootstrap.tracker`, whose memory it reads.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from worker_bootstrap.assignments import (
    BATCH_LIMIT_BYTES,
    BATCH_LIMIT_CHUNKS,
    BATCH_TARGET_BYTES,
    Assignments,
    Batch,
    Host,
)
from worker_bootstrap.holdings import Chunk, Holdings, first_from
from worker_bootstrap.mistrust import Mistrust

BATCHES_PER_HOST = 256
"""What a host needs is cut into about this many batches, as far as their limits allow."""
CROWD = 16
"""With more hosts than that, batches are larger in proportion."""
TRIES = 16
"""So many chunks, or sources, are looked at for one decision before the host is told to ask again."""


class Choice:
    """Decides by what the tracker knows.

    Parameters
    ----------
    hosts
        By number.
    near
        Masks of the hosts at each place.

    Notes
    -----
    Deterministic: the same calls give the same answers in every process. A decision looks at no more than `TRIES`
    chunks and as many sources, however many there are.
    """

    def __init__(
        self,
        hosts: Mapping[int, Host],
        near: Mapping[tuple[str, ...], int],
        holdings: Holdings,
        assignments: Assignments,
        mistrust: Mistrust,
    ) -> None:
        self._hosts = hosts
        self._near = near
        self._holdings = holdings
        self._assignments = assignments
        self._mistrust = mistrust
        self._random = random.Random(0)

    def next_batch(self, host: Host, before: int) -> Batch | None:
        """What *host* should fetch now, after so many others; None if there is nothing to hand out at the moment."""
        if not host.missing:
            return None
        wanted = host.missing & ~self._elsewhere(host)
        tries = TRIES
        for rare in self._holdings.rarity[1:]:
            candidates = wanted & rare
            while candidates and tries:
                chunk = self._holdings.numbered[self._any_of(candidates)]
                source = self._source(host, chunk.holders)
                if source is not None:
                    return self._assign(host, source, wanted, chunk, before)
                # Where the only holder is busy, or mistrusted, its other chunks cannot be had now, either.
                only = self._hosts.get(chunk.holders.bit_length() - 1)
                candidates &= ~(only.have if only and chunk.holders == only.bit else chunk.bit)
                tries -= 1
        return self._from_any_source(host, wanted, before)

    def _elsewhere(self, host: Host) -> int:
        """Chunks that *host* shall leave to others of its site, because they are on their way there from outside."""
        site = self._holdings.sites[host.site]
        return site.crossing & ~site.held

    def _source(self, host: Host, holders: int) -> Host | None:
        """The host among *holders* that shall serve *host* now, or None if those that may are busy."""
        here = self._holdings.sites[host.site].hosts
        for trusted in self._mistrust.sieve(host.number, holders):
            for near in self._circles(host, trusted & here or trusted):
                for serving in self._assignments.serving:
                    if near & serving:
                        return self._hosts[self._any_of(near & serving)]
            if trusted:
                return None  # they are busy: worth waiting for, rather than asking whom we mistrust
        return None

    def _circles(self, host: Host, among: int) -> Iterator[int]:
        """*among*, those on the same machine first, then those of the same rack, of the same site, and all."""
        for depth in range(len(host.place), 0, -1):
            yield among & self._near[host.place[:depth]]
        yield among

    def _from_any_source(self, host: Host, wanted: int, before: int) -> Batch | None:
        """A batch of whatever a host that is free has; where the sources of the rarest chunks are all busy."""
        tries = TRIES
        for serving in self._assignments.serving:
            free = serving & ~host.bit
            while free and tries:
                source = self._hosts[self._any_of(free)]
                free ^= source.bit
                tries -= 1
                shared = source.have & wanted
                if source.site != host.site:
                    shared &= ~self._holdings.sites[host.site].held
                if shared and self._mistrust.trusts(host.number, source.number):
                    return self._assign(host, source, wanted, next(self._rarest(shared)), before)
        return None

    def _assign(self, host: Host, source: Host, wanted: int, first: Chunk, before: int) -> Batch:
        shared = source.have & wanted & ~first.bit
        if source.site != host.site:
            shared &= ~self._holdings.sites[host.site].held
        chunks = [first]
        # From a source that is mistrusted, only what has no other holder: one chunk at a time shows that.
        if self._mistrust.trusts(host.number, source.number):
            chunks = self._filled(chunks, self._rarest(shared), host.total_bytes // BATCHES_PER_HOST)
        return self._assignments.give(host, source, chunks, before)

    def _filled(self, chunks: list[Chunk], more: Iterator[Chunk], share_bytes: int) -> list[Chunk]:
        # A scheduler answers some 2,500 calls a second: the more hosts there are, the more a call must bring.
        crowd_bytes = BATCH_TARGET_BYTES * len(self._hosts) // CROWD
        target_bytes = max(BATCH_TARGET_BYTES, min(max(share_bytes, crowd_bytes), BATCH_LIMIT_BYTES))
        size_bytes = sum(chunk.size_bytes for chunk in chunks)
        for chunk in more:
            if size_bytes >= target_bytes or len(chunks) == BATCH_LIMIT_CHUNKS:
                break
            if size_bytes + chunk.size_bytes <= BATCH_LIMIT_BYTES:
                chunks.append(chunk)
                size_bytes += chunk.size_bytes
        return chunks

    def _rarest(self, among: int) -> Iterator[Chunk]:
        """The chunks of a mask, rarest first, equally rare ones from a place that differs from call to call."""
        for rare in self._holdings.rarity:
            candidates = among & rare
            if candidates:
                start = int(self._random.random() * candidates.bit_length())
                above = candidates >> start << start
                yield from self._holdings.of(above)
                yield from self._holdings.of(candidates ^ above)

    def _any_of(self, mask: int) -> int:
        return first_from(mask, int(self._random.random() * mask.bit_length()))
