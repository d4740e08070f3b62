"""What is planned of very large environments, in a file: so that memory holds one package at a time, not all of them.

Of an ordinary environment everything is held: it is needed soon, and by several processes.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from envship.sources.draft import Draft, Item, SortedItems

HELD_ITEMS = 150_000
"""So many items are held in memory, all packages together: twice those of a large environment."""
_BATCH_ITEMS = 1000
"""Read back at a time."""


class Spool:
    """A file without a name, which is gone when it is closed. A context manager.

    Parameters
    ----------
    folder
        Where there is room for it: some 150 bytes for each item.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def take_over(self, drafts: list[Draft]) -> bool:
        """Put the items of *drafts* into the file, if they are many; returns whether they are.

        The list's drafts are replaced.
        """
        are_many = sum(len(draft.items) for draft in drafts) > HELD_ITEMS
        if are_many:
            for number, draft in enumerate(drafts):
                drafts[number] = draft._replace(items=self._written(sorted(draft.items, key=lambda item: item.path)))
            self._file.flush()
        return are_many

    def _written(self, items: Sequence[Item]) -> _Spooled:
        places = []
        for start in range(0, len(items), _BATCH_ITEMS):
            data = pickle.dumps(items[start : start + _BATCH_ITEMS])
            places.append((self._file.tell(), len(data)))
            self._file.write(data)
        return _Spooled(self._file.fileno(), places, len(items))


class _Spooled(SortedItems):
    """Items that are read whenever they are asked for, by any process that has the file open."""

    def __init__(self, file: int, places: Sequence[tuple[int, int]], count: int) -> None:
        self._file = file
        self._places = places
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        for offset, size_bytes in self._places:
            yield from pickle.loads(os.pread(self._file, size_bytes, offset))

    def __contains__(self, item: object) -> bool:
        return any(item == each for each in self)
