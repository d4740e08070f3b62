"""Byte code that is asked for before it is needed, where there are processors to make it meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from envship.reading import Reader
from envship.sources.draft import CodeItem, Item

_AHEAD = 32
"""So many modules ahead: some hundred kilobytes, enough to have interpreters busy while large files are read."""


class CodeAhead:
    """Byte code of modules one after the other. A context manager.

    Parameters
    ----------
    reader
        Makes it; for each thread with an interpreter of its own.
    threads
        How many ask. 0: whoever needs it does, when it is needed.
    """

    def __init__(self, reader: Reader, threads: int = 0) -> None:
        self._reader = reader
        self._pool = ThreadPoolExecutor(threads, "envship-code") if threads else None

    def each(self, items: Iterable[Item]) -> Iterator[bytes | None]:
        """What `Reader.byte_code` says of each `CodeItem` among *items*."""
        modules = (item for item in items if isinstance(item, CodeItem))
        if self._pool is None:
            yield from map(self._reader.byte_code, modules)
            return
        asked: deque[Future[bytes | None]] = deque()
        for module in modules:
            asked.append(self._pool.submit(self._reader.byte_code, module))
            if len(asked) > _AHEAD:
                yield asked.popleft().result()
        for future in asked:
            yield future.result()

    def __enter__(self) -> CodeAhead:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
