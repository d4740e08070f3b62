"""Which host holds which chunk: the tracker's memory, as bit masks over numbered hosts and chunks.

"Rarest chunk that this host lacks and a free host of its rack holds" is then a few operations on integers, whose cost
is that of copying a few hundred bytes, however many hosts and chunks there are. No decisions here; they are made in
`worker_bootstrap.tracker`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from worker_bootstrap.digest import Digest

EXACT_COPIES = 8
"""Chunks are told apart by their number of copies up to here, and by its power of two from here on."""


class Chunk:
    """A chunk that some environment consists of. *copies* counts those that are on their way."""

    __slots__ = ("bit", "copies", "digest", "holders", "number", "size_bytes")

    def __init__(self, digest: Digest, number: int, size_bytes: int) -> None:
        self.digest = digest
        self.number = number
        self.bit = 1 << number
        self.size_bytes = size_bytes
        self.holders = 0
        self.copies = 0


class Site:
    """Hosts between which bytes are cheap: *hosts*, the chunks that they *held*, and those *crossing* to them."""

    __slots__ = ("crossing", "held", "hosts")

    def __init__(self) -> None:
        self.hosts = 0
        self.held = 0
        self.crossing = 0


class Holdings:
    """Numbers for hosts and chunks, and who holds what.

    Notes
    -----
    A host's number is used again after it left; a chunk keeps its own as long as the scheduler lives (about 300 bytes).
    """

    def __init__(self) -> None:
        self.chunks: dict[Digest, Chunk] = {}
        self.numbered: list[Chunk] = []
        self.rarity: list[int] = []
        """For each degree of rarity, the mask of the chunks that have it; number 0: no copy at all."""
        self.sites: dict[str, Site] = {}
        self._hosts = 0

    def chunk(self, digest: Digest, size_bytes: int | None = None) -> Chunk:
        """The chunk of that name; *size_bytes* where it is known."""
        found = self.chunks.get(digest)
        if found is None:
            found = self.chunks[digest] = Chunk(digest, len(self.numbered), size_bytes or 0)
            self.numbered.append(found)
            self._move(found, None, 0)
        elif size_bytes is not None:
            found.size_bytes = size_bytes
        return found

    def known(self, digests: Iterable[Digest]) -> Iterator[Chunk]:
        """Those of *digests* that were ever heard of."""
        return (self.chunks[digest] for digest in digests if digest in self.chunks)

    def mask(self, sizes: Mapping[Digest, int]) -> int:
        """The mask of these chunks."""
        # A sum of shifted ones would copy the mask once for each of them.
        bits = bytearray(len(self.numbered) // 8 + len(sizes) // 8 + 2)
        for digest, size_bytes in sizes.items():
            number = self.chunk(digest, size_bytes).number
            bits[number >> 3] |= 1 << (number & 7)
        return int.from_bytes(bits, "little")

    def of(self, mask: int) -> Iterator[Chunk]:
        """The chunks of a mask, in the order in which they became known."""
        return (self.numbered[number] for number in bits_of(mask))

    def size_bytes(self, mask: int) -> int:
        """Of all chunks of a mask, uncompressed."""
        return sum(chunk.size_bytes for chunk in self.of(mask))

    # -- hosts

    def add_host(self, site: str) -> int:
        """A free number, for a host at *site*."""
        bit = ~self._hosts & (self._hosts + 1)
        self._hosts |= bit
        self.sites.setdefault(site, Site()).hosts |= bit
        return bit.bit_length() - 1

    def remove_host(self, number: int, site: str, have: int) -> None:
        """Forget a host and the copies that it holds."""
        for chunk in self.of(have):
            self.drop(chunk, number, site)
        self._hosts &= ~(1 << number)
        self.sites[site].hosts &= ~(1 << number)

    def keep(self, chunk: Chunk, number: int, site: str) -> None:
        """The host *number* at *site* now holds *chunk*."""
        chunk.holders |= 1 << number
        self.sites[site].held |= chunk.bit
        self.count(chunk, 1)

    def drop(self, chunk: Chunk, number: int, site: str) -> None:
        """The host *number* does not hold *chunk* any more."""
        chunk.holders &= ~(1 << number)
        there = self.sites[site]
        if not chunk.holders & there.hosts:
            there.held &= ~chunk.bit
        self.count(chunk, -1)

    def count(self, chunk: Chunk, change: int) -> None:
        """There are *change* more copies of *chunk*, or on their way."""
        before = _degree(chunk.copies)
        chunk.copies += change
        after = _degree(chunk.copies)
        if after != before:
            self._move(chunk, before, after)

    def _move(self, chunk: Chunk, before: int | None, after: int) -> None:
        while len(self.rarity) <= after:
            self.rarity.append(0)
        if before is not None:
            self.rarity[before] &= ~chunk.bit
        self.rarity[after] |= chunk.bit


def bits_of(mask: int) -> Iterator[int]:
    """The numbers in a mask, ascending."""
    # Clearing the lowest bit copies the whole mask, so it is walked byte by byte.
    data = mask.to_bytes((mask.bit_length() + 7) // 8, "little")
    for index, byte in enumerate(data):
        while byte:
            low = byte & -byte
            yield index * 8 + low.bit_length() - 1
            byte ^= low


def first_from(mask: int, start: int) -> int:
    """The first number in *mask* that is at least *start*, else the first of all; *mask* is not 0."""
    above = mask >> start
    if above:
        return start + (above & -above).bit_length() - 1
    return (mask & -mask).bit_length() - 1


def count_of(mask: int) -> int:
    """How many numbers are in a mask."""
    return bin(mask).count("1")


def _degree(copies: int) -> int:
    return copies if copies < EXACT_COPIES else EXACT_COPIES - 4 + copies.bit_length()
