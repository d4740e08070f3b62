"""What clients are uploading just now: chunks that nobody holds yet, and that hosts may wait for all the same.

A promise lasts as long as its client goes on keeping it, a chunk now and then; one that vanishes is found out by that.
"""

from __future__ import annotations

from collections.abc import Callable


class Promises:
    """Masks of chunks (see `worker_bootstrap.holdings`), by who promised them.

    Parameters
    ----------
    clock
        Returns seconds.
    patience_s
        A client that brings nothing for so long has vanished.
    """

    def __init__(self, clock: Callable[[], float], patience_s: float) -> None:
        self._clock = clock
        self._patience_s = patience_s
        self._made: dict[str, tuple[int, float]] = {}

    def make(self, who: str, mask: int) -> None:
        """*who* will bring the chunks of *mask*, beside what was promised before."""
        known, _ = self._made.get(who, (0, 0.0))
        self._made[who] = (known | mask, self._clock() + self._patience_s)

    def keep(self, bit: int) -> None:
        """A promised chunk has arrived: whoever promised it is alive."""
        for who, (mask, _) in list(self._made.items()):
            if mask & bit:
                self._made[who] = (mask & ~bit, self._clock() + self._patience_s)
                if not mask & ~bit:
                    del self._made[who]

    def withdraw(self, who: str) -> None:
        """*who* brings nothing more. Idempotent."""
        self._made.pop(who, None)

    def mask(self) -> int:
        """The chunks that may still be waited for."""
        now_s, promised = self._clock(), 0
        for who, (mask, until_s) in list(self._made.items()):
            if until_s <= now_s:
                del self._made[who]
            else:
                promised |= mask
        return promised
