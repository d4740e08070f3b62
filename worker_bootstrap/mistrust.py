"""Which host does not ask which other one, for how long.

A peer that lied is asked, by everybody, only for what nobody else has. One that was silent is left out by the host that
waited for it, for a time that doubles from failure to failure, so that a network that was cut in two finds together
again; in the end it counts as gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

LACKS, SILENT, LIED = "lacks", "silent", "lied"
"""What can be wrong with an answer."""
SILENT_S = 2.0
"""So long a host does not ask a peer that was silent once."""
SILENT_LIMIT_S = 60.0
LIED_S = 600.0
HOPELESS_S = 30.0
"""A peer that is left out for so long, silent five times in a row, counts as gone with what only it has."""
COMPLAINTS = 2
"""A peer of which so many hosts complain is asked by the others only where nobody else will do."""


class Mistrust:
    """Masks of hosts, by the number of the host that mistrusts them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._liars: dict[int, float] = {}
        self._silent: dict[int, dict[int, tuple[float, float]]] = {}
        self._complaints: dict[int, set[int]] = {}

    def blame(self, host: int | None, culprit: int, fault: str) -> None:
        """*host* got something wrong, or nothing, from *culprit*."""
        now_s = self._clock()
        if fault == LIED:
            self._liars[culprit] = now_s + LIED_S
        elif fault == SILENT and host is not None:
            known = self._silent.setdefault(host, {})
            _, wait_s = known.get(culprit, (0.0, SILENT_S / 2))
            wait_s = min(2 * wait_s, SILENT_LIMIT_S)
            known[culprit] = (now_s + wait_s, wait_s)
            self._complaints.setdefault(culprit, set()).add(host)

    def is_hopeless(self, culprit: int, others: int) -> bool:
        """Whether so many of the *others* have waited for *culprit* so often that nobody should any more."""
        waits = (known[culprit][1] for known in self._silent.values() if culprit in known)
        return sum(wait_s >= HOPELESS_S for wait_s in waits) >= max(1, min(COMPLAINTS, others))

    def forgive(self, host: int) -> None:
        """What *host* had against others is forgotten; lies are not."""
        for culprit in self._silent.pop(host, ()):
            self._withdraw(host, culprit)

    def forget(self, number: int) -> None:
        """The host with that number is gone; the next one to get it is another."""
        self.forgive(number)
        self._liars.pop(number, None)
        self._complaints.pop(number, None)
        for known in self._silent.values():
            known.pop(number, None)

    def trusts(self, host: int, other: int) -> bool:
        """Whether *host* has nothing against *other*."""
        return not (self._liars_now() | self._silent_now(host)) >> other & 1

    def sieve(self, host: int, among: int) -> Iterator[int]:
        """*among* but for the silent, as masks: those of good repute, those that others complain of, then liars."""
        trusted = among
        if self._liars or self._silent:
            among &= ~self._silent_now(host)
            trusted = among & ~self._liars_now()
            suspect = 0
            for number, hosts in self._complaints.items():
                if len(hosts) >= COMPLAINTS:
                    suspect |= 1 << number
            if trusted & ~suspect:
                yield trusted & ~suspect
        yield trusted
        yield among

    def _liars_now(self) -> int:
        now_s, mask = self._clock(), 0
        for number, until_s in list(self._liars.items()):
            if until_s <= now_s:
                del self._liars[number]
            mask |= (until_s > now_s) << number
        return mask

    def _silent_now(self, host: int) -> int:
        now_s, mask = self._clock(), 0
        for number, (until_s, _) in self._silent.get(host, {}).items():
            if until_s > now_s:
                mask |= 1 << number
            else:
                self._withdraw(host, number)
        return mask

    def _withdraw(self, host: int, culprit: int) -> None:
        complaining = self._complaints.get(culprit)
        if complaining is not None:
            complaining.discard(host)
            if not complaining:
                del self._complaints[culprit]
