"""Chunks that come while a build goes on: what is there, what is still awaited, and when to stop waiting.

The two ends of a pipe: the process that fetches (`announce`, `finish`) tells the one that builds (`Arrivals`), which
so begins with what there is and is done soon after the last chunk. Chunks themselves go through the store.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from worker_bootstrap.digest import Digest
from worker_bootstrap.errors import TransferError

if TYPE_CHECKING:
    from worker_bootstrap.blueprint import Run

SILENCE_S = 120.0
"""A build that hears nothing for so long, not even that it should wait, gives up: whoever fetches hangs."""
WORD_S = 20.0
"""So often whoever fetches says that it still does."""
LOOK_S = 0.5
"""So often the store is looked at for chunks that came some other way: uploads to another agent of this host."""


def announce(digests: Iterable[Digest] = ()) -> bytes:
    """The message that these chunks are in the store now; without any, that more will come."""
    return json.dumps({"arrived": list(digests)}).encode() + b"\n"


def finish(reason: str | None = None) -> bytes:
    """The message that all chunks have come; with a *reason*, that no more will."""
    return json.dumps({"complete": reason is None, "reason": reason}).encode() + b"\n"


class Arrivals:
    """What a build knows of the chunks that it waits for. Thread-safe.

    Parameters
    ----------
    silence_s
        Give up after so long without a message.
    """

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self._news = threading.Condition()
        self._fresh: list[Digest] = []
        self._complete = False
        self._reason: str | None = None
        self._heard = time.monotonic()

    @classmethod
    def none(cls) -> Arrivals:
        """Nothing is awaited: all that there is to have is in the store."""
        arrivals = cls()
        arrivals._complete = True
        return arrivals

    @property
    def are_complete(self) -> bool:
        """Whether nothing more will come."""
        with self._news:
            return self._complete

    def listen(self, handle: int) -> None:
        """Read messages from the pipe *handle* until it closes; call it in a thread of its own."""
        rest = b""
        while data := os.read(handle, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self.hear(line)

    def hear(self, line: bytes) -> None:
        """Take in one message of `announce` or `finish`."""
        message = json.loads(line)
        with self._news:
            self._heard = time.monotonic()
            self._fresh += message.get("arrived", ())
            self._complete = self._complete or message.get("complete", False)
            self._reason = message.get("reason") or self._reason
            self._news.notify_all()

    def until(self, needed: Collection[Digest], has: Callable[[Digest], bool]) -> None:
        """Wait until the store *has* the *needed* chunks, or all that will come has.

        Raises
        ------
        TransferError
            If no more will come, or nothing is heard any more.
        """
        missing = {digest for digest in needed if not has(digest)}
        while missing:
            fresh = self._next()
            if fresh is None:
                return
            missing.difference_update(fresh or [digest for digest in missing if has(digest)])

    def as_they_come(self, runs: Sequence[Run], has: Callable[[Digest], bool]) -> Iterator[Run]:
        """*runs*, each when the store *has* its chunks; of those that can be written at once, the largest first.

        Raises
        ------
        TransferError
            As `until`.
        """
        if self.are_complete:
            yield from _largest_first(runs)
            return
        needed = dict.fromkeys(chunk.digest for run in runs for chunk in run.chunks)
        absent = {digest for digest in needed if not has(digest)}
        awaited = [{chunk.digest for chunk in run.chunks} & absent for run in runs]
        waiting: dict[Digest, list[int]] = {}
        for number, digests in enumerate(awaited):
            for digest in digests:
                waiting.setdefault(digest, []).append(number)
        yield from _largest_first(run for run, digests in zip(runs, awaited) if not digests)
        while waiting:
            fresh = self._next()
            if fresh is None:
                # Whatever has not been told of is looked for in the store, and found missing there if it is.
                yield from _largest_first(run for run, digests in zip(runs, awaited) if digests)
                return
            ready = []
            for digest in fresh or [digest for digest in waiting if has(digest)]:
                for number in waiting.pop(digest, ()):
                    awaited[number].discard(digest)
                    if not awaited[number]:
                        ready.append(runs[number])
            yield from _largest_first(ready)

    def _next(self) -> list[Digest] | None:
        """What has arrived since the last call; nothing, when it is time to look; None when all that comes has come."""
        with self._news:
            if not self._fresh and self._reason is None and not self._complete:
                self._news.wait(LOOK_S)
            if self._reason is not None:
                raise TransferError("the process that fetches", self._reason)
            if not self._fresh and self._complete:
                return None
            if time.monotonic() - self._heard > self._silence_s:
                raise TransferError("the process that fetches", f"nothing was heard of it for {self._silence_s:g} s")
            fresh, self._fresh = self._fresh, []
            return fresh


def _largest_first(runs: Iterable[Run]) -> list[Run]:
    """No long one shall be left for the end."""
    return sorted(runs, key=lambda run: run.size_bytes, reverse=True)
