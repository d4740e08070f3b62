"""The account of a swap: where to, how far each host is, and how it ended.

What the client is shown, and what the scheduler's successor is handed; `worker_bootstrap.swap` does what it tells of.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from worker_bootstrap.digest import EnvironmentId

FINAL_PHASES = ("done", "failed")

_Account = TypeVar("_Account", bound="SwapAccount")


class SwapAccount:
    """The progress and the outcome of a swap.

    Parameters
    ----------
    environment_id, previous_id
        Where to, and from where; None is the base environment.
    options
        ``prepare_timeout_s``, ``start_timeout_s``, ``commit_timeout_s``, ``keep_warm``, ``link_mode``, ``scheduler``
        (move it: True, False, or None for "if it is a process of its own"), ``client_token``, ``manifest`` (canonical
        bytes), ``platform`` (what the environment is for; None if any).
    """

    def __init__(
        self,
        environment_id: EnvironmentId | None,
        previous_id: EnvironmentId | None,
        options: Mapping[str, Any],
    ) -> None:
        self.id = uuid.uuid4().hex
        self.environment_id = environment_id
        self.previous_id = previous_id
        self.options = dict(options)
        self.phase = "check"
        self.hosts: dict[str, dict[str, Any]] = {}
        self.labels: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.causes: dict[str, str] = {}
        self.error: str | None = None
        self.chunks_lost = False
        self.outcome = ""
        self.moves = False
        self.scheduler_moves = False
        self.expected = 0
        self.committed_at = 0.0
        self.downtime_s = 0.0
        self.version = 0
        self._changed = asyncio.Event()
        self._log: Callable[..., None] = _nowhere

    def tell_stages(self, log: Callable[..., None]) -> None:
        """Have *log* called with a stage, and keywords that describe it, whenever the swap or a host gets further."""
        self._log = log

    @property
    def kind(self) -> str:
        return "staging" if self.options.get("stage_only") else "swap"

    @property
    def finished(self) -> bool:
        return self.phase in FINAL_PHASES

    def status(self) -> dict[str, Any]:
        """What the client shows: only numbers, texts, lists and mappings."""
        return {
            "id": self.id,
            "version": self.version,
            "environment_id": self.environment_id,
            "previous_id": self.previous_id,
            "platform": self.options.get("platform"),
            "phase": self.phase,
            "hosts": self.hosts,
            "seconds": self.seconds,
            "causes": self.causes,
            "error": self.error,
            "chunks_lost": self.chunks_lost,
            "outcome": self.outcome,
            "moves": self.moves,
            "scheduler_moves": self.scheduler_moves,
            "workers": self.expected,
            "downtime_s": self.downtime_s,
        }

    async def changed(self, version: int, timeout_s: float) -> dict[str, Any]:
        """The status, as soon as it is newer than *version*, at the latest after *timeout_s*."""
        if self.version <= version and not self.finished:
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        return self.status()

    def note(self, host_id: str, state: str, done_bytes: int = 0, total_bytes: int = 0, detail: str = "") -> None:
        """Record how far a host is."""
        if self.hosts.get(host_id, {}).get("state") != state:
            self._tell(f"host {state}", host=self.labels.get(host_id, ""), host_id=host_id, detail=detail)
        self.hosts[host_id] = {
            "label": self.labels.get(host_id, host_id[:8]),
            "state": state,
            "done_bytes": done_bytes,
            "total_bytes": total_bytes,
            "detail": detail,
        }
        self._touch()

    def fail(self, error: str, causes: Mapping[str, str]) -> None:
        """Give up: *error* names the error's class, *causes* says where and why."""
        self.error, self.causes = error, dict(causes)
        self.set_phase("failed")

    def set_phase(self, phase: str) -> None:
        """Enter a phase; ``done`` and ``failed`` are final."""
        self.phase = phase
        self._tell(phase, **({"error": self.error, "causes": dict(self.causes)} if self.error else {}))
        self._touch()

    def _tell(self, stage: str, **what: Any) -> None:
        self._log(stage, swap=self.id, kind=self.kind, environment_id=self.environment_id, **what)

    def _touch(self) -> None:
        self.version += 1
        self._changed.set()

    # -- across the scheduler's replacement

    def to_dict(self) -> dict[str, Any]:
        """Everything that the scheduler's successor needs to `resume`."""
        state = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**state, "options": {**self.options, "manifest": None}}

    @classmethod
    def from_dict(cls: type[_Account], state: Mapping[str, Any]) -> _Account:
        """The inverse of `to_dict`."""
        swap = cls(state["environment_id"], state["previous_id"], state["options"])
        vars(swap).update(state)
        return swap


def _nowhere(stage: str, **what: Any) -> None:
    pass
