"""Large files that are compressed while everything else is planned, which keeps one processor only.

What comes of it is chunks that the store has when the pack gets to them. Nothing depends on it: where the guess was
wrong (a piece in which the prefix will be replaced, a file that changes), a chunk is kept that nobody needs, as after a
pack that was interrupted.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Collection, Iterator
from types import TracebackType

from envship.chunking import LIMIT_BYTES
from envship.crew import die_with_parent
from envship.large_files import LARGE_OVER_BYTES
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.store import Store


class HeadStart:
    """A process, forked from this one, that keeps large files below *prefix* until the end of the block.

    Nobody else may have threads here.

    Parameters
    ----------
    skip
        Entries of *prefix* to pass over.
    """

    def __init__(self, prefix: str, skip: Collection[str], store: Store) -> None:
        self._stopped = mmap.mmap(-1, 1)
        self._pid = os.fork()
        if self._pid == 0:
            _child(lambda: self._keep(prefix, skip, store))

    def __enter__(self) -> HeadStart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped[0] = 1
        os.waitpid(self._pid, 0)
        self._stopped.close()

    def _keep(self, prefix: str, skip: Collection[str], store: Store) -> None:
        for path in _large_files(prefix, skip):
            # What cannot be read, the pack will tell of.
            with contextlib.suppress(OSError), open(path, "rb") as file:
                while not self._stopped[0] and (piece := file.read(LIMIT_BYTES)):
                    store.write_chunk(piece)
            if self._stopped[0]:
                return


def _child(work: Callable[[], None]) -> None:
    """What the fork does; never returns."""
    try:
        die_with_parent()
        # A full disk, for one: the pack will meet it.
        with contextlib.suppress(EnvshipError, OSError):
            work()
    finally:
        os._exit(0)


def _large_files(folder: str, skip: Collection[str] = ()) -> Iterator[str]:
    """Files that the pack reads piece by piece; no links."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in skip:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _large_files(entry.path)
            elif entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size > LARGE_OVER_BYTES:
                yield entry.path
