"""What moved between hosts: bytes, rates, sources and failures, as `environment_status` and ``/metrics`` show them.

Fed by `worker_bootstrap.exchange` with what hosts and clients report. Keeps sums, not a history, but for the last
seconds that a rate is taken over. No I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

RATE_WINDOW_S = 5.0
"""A rate is the mean over so long."""
CLIENT = "client"
"""Name, as a source, of clients that uploaded; hosts go by their ids."""
SHARED = "shared file"
"""Name, as a source, of a bundle or a store that the host itself can read."""


class HostAccount:
    """What one host received and gave. Bytes are those that travelled, compressed."""

    def __init__(self) -> None:
        self.received: dict[str, int] = {}
        self.served_bytes = 0
        self.failures: dict[str, int] = {}
        self.blamed: dict[str, str] = {}
        self.recent: deque[tuple[float, int]] = deque()

    @property
    def received_bytes(self) -> int:
        return sum(self.received.values())


class Ledger:
    """The accounts of all hosts, by host id.

    Parameters
    ----------
    clock
        Returns seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.hosts: dict[str, HostAccount] = {}
        self._clock = clock

    def moved(self, host_id: str, source: str, size_bytes: int) -> None:
        """The host received *size_bytes* from *source*: another host's id, `CLIENT` or `SHARED`."""
        account = self._account(host_id)
        account.blamed.pop(source, None)
        account.received[source] = account.received.get(source, 0) + size_bytes
        account.recent.append((self._clock(), size_bytes))
        self._forget(account)
        if source not in (CLIENT, SHARED):
            self._account(source).served_bytes += size_bytes

    def failed(self, host_id: str, source: str, reason: str, blame: bool) -> None:
        """The host did not get what it asked *source* for; with *blame*, *source* is at fault."""
        account = self._account(host_id)
        account.failures[source] = account.failures.get(source, 0) + 1
        if blame:
            account.blamed[source] = reason

    def rate(self, host_id: str) -> float:
        """Bytes a second that the host received in the last `RATE_WINDOW_S`."""
        account = self.hosts.get(host_id)
        if account is None:
            return 0.0
        self._forget(account)
        if not account.recent:
            return 0.0
        span_s = max(self._clock() - account.recent[0][0], 1.0)
        return sum(size_bytes for _, size_bytes in account.recent) / span_s

    def describe(self, host_id: str) -> str:
        """What a host receives now, for people: the rate, and from how many sources."""
        rate = self.rate(host_id)
        if not rate:
            return ""
        sources = len(self.hosts[host_id].received)
        return f"{rate / 1e6:.1f} MB/s from {sources} source{'s' if sources != 1 else ''}"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All accounts: only numbers, texts and mappings."""
        return {
            host_id: {
                "received": dict(account.received),
                "served_bytes": account.served_bytes,
                "rate": self.rate(host_id),
                "failures": dict(account.failures),
                "blamed": dict(account.blamed),
            }
            for host_id, account in self.hosts.items()
        }

    def _account(self, host_id: str) -> HostAccount:
        return self.hosts.setdefault(host_id, HostAccount())

    def _forget(self, account: HostAccount) -> None:
        oldest = self._clock() - RATE_WINDOW_S
        while account.recent and account.recent[0][0] < oldest:
            account.recent.popleft()
