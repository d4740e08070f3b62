"""Files too large to be held in memory, as they are read piece by piece: canonical content in constant memory.

As they are, or, where a package recorded how they name the prefix, with the placeholder back in its place: a binary
file is taken apart between two of its strings, so that each part can be restored by itself. `envship.canonical` does
the same with a file as a whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from envship.canonical import Own, Recorded, Treatment
from envship.chunking import LIMIT_BYTES
from envship.scripts import Script
from worker_bootstrap.digest import Digest
from worker_bootstrap.manifest import Relocation
from worker_bootstrap.paths import PATH_LIMIT
from worker_bootstrap.relocate import RelocationError, relocate, restore

LARGE_OVER_BYTES = 32 << 20
"""Larger files are not held in memory, and not searched for prefixes unless a package recorded that they name one."""

Read = Callable[[], Iterator[bytes]]
"""Reads the file from its beginning, in pieces of whatever size."""


class LargeContent(NamedTuple):
    """Canonical bytes, in pieces of `LIMIT_BYTES`, and how they name the prefix."""

    pieces: Iterator[bytes]
    relocation: Relocation | None


def is_streamed(size_bytes: int, treatment: Treatment) -> bool:
    """Whether a file of this size is read piece by piece; not text with a recorded prefix: its parts hang together."""
    known = isinstance(treatment, (Own, Script)) or (
        isinstance(treatment, Recorded) and (treatment.relocation is None or treatment.relocation.mode == "binary")
    )
    return known and size_bytes > LARGE_OVER_BYTES


def large_content(read: Read, treatment: Treatment) -> LargeContent:
    """The canonical content of a file that `is_streamed`. Read several times: what it is shows at its end only."""
    found = _original(read, treatment) if isinstance(treatment, Recorded) else None
    return found or LargeContent(_evenly(read()), None)


def restored(pieces: Iterator[bytes], relocation: Relocation, prefix: str) -> Iterator[bytes]:
    """What `restore` makes of a binary file, piece by piece."""
    for part, is_end in _between_strings(pieces, os.fsencode(prefix)):
        yield restore(part, relocation, prefix, is_end=is_end)


def relocated(pieces: Iterator[bytes], relocation: Relocation, prefix: str) -> Iterator[bytes]:
    """What `relocate` makes of a binary file, piece by piece."""
    for part, _ in _between_strings(pieces, os.fsencode(relocation.placeholder)):
        yield relocate(part, relocation, prefix)


def _original(read: Read, treatment: Recorded) -> LargeContent | None:
    """The file with the placeholder in it: the original, or what an edited one comes from; None if it is neither."""
    relocation, prefixes = treatment.relocation, treatment.own.prefixes
    if relocation is None:
        return None
    digests = {}
    for prefix in prefixes:
        digests[prefix] = _digest(restored(read(), relocation, prefix))
        if digests[prefix] == treatment.digest:
            return LargeContent(_evenly(restored(read(), relocation, prefix)), relocation)
    now = _digest(read())
    for prefix, digest in digests.items():
        if digest != now and _comes_back(read, relocation, prefix, now):
            return LargeContent(_evenly(restored(read(), relocation, prefix)), relocation)
    return None


def _comes_back(read: Read, relocation: Relocation, prefix: str, digest: Digest) -> bool:
    try:
        return _digest(relocated(restored(read(), relocation, prefix), relocation, prefix)) == digest
    except RelocationError:
        return False


def _between_strings(pieces: Iterator[bytes], name: bytes) -> Iterator[tuple[bytes, bool]]:
    """*pieces* cut so that no string in which *name* occurs is apart from the NULs after it, nor *name* itself cut.

    With each part, whether the file ends with it.
    """
    held = b""
    for piece in pieces:
        held += piece
        text = held.rstrip(b"\0")
        string = text.rfind(b"\0") + 1
        count = text.count(name, string)
        # More NULs than any placeholders take need not be kept together.
        is_over = count == 0 or len(held) - len(text) > count * PATH_LIMIT
        end = max(string, len(held) - len(name) + 1) if is_over else string
        if end > 0:
            yield held[:end], False
            held = held[end:]
    yield held, True


def _evenly(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """*pieces*, each of `LIMIT_BYTES` but for the last."""
    held = b""
    for piece in pieces:
        held = held + piece if held else piece
        while len(held) >= LIMIT_BYTES:
            yield held[:LIMIT_BYTES]
            held = held[LIMIT_BYTES:]
    if held:
        yield held


def _digest(pieces: Iterator[bytes]) -> Digest:
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
    return Digest(state.hexdigest())
