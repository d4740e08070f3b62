"""Where the content of a package is cut into chunks. Pure.

Cuts lie at file boundaries, after a file whose own digest says so, so that a decision depends on that file alone: an
edited, added or removed file changes the chunk that it lies in and no other, and equal runs of files give equal chunks
in every package. Large files stand alone, in pieces. Cutting inside files by content was measured and saves next to
nothing for compiled libraries.
"""

from __future__ import annotations

from worker_bootstrap.digest import Digest

AVERAGE_BYTES = 768 << 10
"""Mean size of a chunk of small files."""
LIMIT_BYTES = 4 << 20
"""No chunk is larger."""
PROJECT_AVERAGE_BYTES = 64 << 10
PROJECT_LIMIT_BYTES = 256 << 10
"""The same for projects in editable mode, of which single files are edited all the time."""
LARGE_FILE_BYTES = 2 << 20
"""Files over this size share no chunk with others."""


class Cutter:
    """Decides, file after file in the order of a listing, where one chunk ends and the next begins.

    For each file: ask `cuts_before`, then either cut the file into `piece_sizes` (if it is large) or add it to the open
    chunk and ask `cuts_after`. Whoever asks keeps the bytes; the cutter only counts them.

    Parameters
    ----------
    average_bytes
        Mean size of a chunk.
    limit_bytes
        Size that a chunk of several files does not exceed.
    """

    def __init__(self, average_bytes: int = AVERAGE_BYTES, limit_bytes: int = LIMIT_BYTES) -> None:
        self.open_bytes = 0
        self._average_bytes = average_bytes
        self._limit_bytes = limit_bytes

    def cuts_before(self, size_bytes: int) -> bool:
        """Whether the open chunk ends before a file of this size. Never where nothing is open."""
        full = self.open_bytes + size_bytes > self._limit_bytes
        cut = self.open_bytes > 0 and (full or is_large(size_bytes))
        if cut:
            self.open_bytes = 0
        return cut

    def cuts_after(self, digest: Digest, size_bytes: int) -> bool:
        """Whether the chunk ends after this file, which has been added to it.

        The chance is the file's share of the mean size, so that chunks have this size on average whatever the sizes
        of the files are.
        """
        self.open_bytes += size_bytes
        cut = int(digest[:8], 16) * self._average_bytes < size_bytes << 32
        if cut:
            self.open_bytes = 0
        return cut


def is_large(size_bytes: int) -> bool:
    """Whether a file of this size is cut into pieces of its own."""
    return size_bytes > LARGE_FILE_BYTES


def piece_sizes(size_bytes: int) -> list[int]:
    """Sizes of the pieces of a large file, in order."""
    whole, rest = divmod(size_bytes, LIMIT_BYTES)
    return [LIMIT_BYTES] * whole + [rest] * (rest > 0)
