"""The swaps of a cluster: which are under way, whose turn it is, and what follows one that worked out.

Swaps of several clients take turns. Staging moves nobody, so any number of environments may be staged at once, beside
a swap as well. Belongs to the coordinator; what a swap does is `worker_bootstrap.swap`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import EnvshipError
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.store import Store
from worker_bootstrap.swap import Cluster, Swap

PARK_DELAY_S = 1.0
"""Starting interpreters takes both cores of a small machine; the tasks that waited for the swap come first."""
KEPT_SWAPS = 20
TOLD_LATER = {"link_mode": "auto", "start_timeout_s": 60.0, "commit_timeout_s": 60.0}
"""Options of a swap that count for who joins after it; what they are before the first one."""


class SwapQueue:
    """The swaps of *cluster*.

    Parameters
    ----------
    cluster
        The coordinator.
    store
        The scheduler's own, which keeps the manifests.
    in_background
        Runs a coroutine that nobody waits for.
    log
        Called with a stage and what there is to say of it, whenever a swap or a host of it gets further.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        in_background: Callable[[Any], Any],
        log: Callable[..., None],
    ) -> None:
        self.swaps: dict[str, Swap] = {}
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """How many swaps and stagings ended how."""
        self._cluster = cluster
        self._store = store
        self._in_background = in_background
        self._log = log
        self._turn = asyncio.Lock()

    @property
    def moving(self) -> bool:
        """Whether a swap is under way."""
        return self._turn.locked()

    @property
    def busy(self) -> bool:
        """Whether a swap or a staging is under way, or waits for its turn."""
        return not all(swap.finished for swap in self.swaps.values())

    def begin(self, environment_id: EnvironmentId | None, options: Mapping[str, Any]) -> str:
        """Begin a swap, or (``stage_only``) a staging; returns its id."""
        swap = Swap(environment_id, self._cluster.target, options)
        self._add(swap)
        for old in list(self.swaps)[:-KEPT_SWAPS]:
            if self.swaps[old].finished:
                del self.swaps[old]
        self._start(swap)
        return swap.id

    async def wait(self, swap_id: str, version: int) -> dict[str, Any]:
        """The status of a swap, as soon as it is newer than *version*."""
        return await self.swaps[swap_id].changed(version, timeout_s=5.0)

    def report(self, host_id: str, state: str, done_bytes: int, total_bytes: int, detail: str = "") -> None:
        """A host tells how far it is."""
        for swap in self.swaps.values():
            if not swap.finished and host_id in swap.labels:
                swap.note(host_id, state, done_bytes, total_bytes, detail)

    def unfinished(self, but: Swap) -> list[dict[str, Any]]:
        """What the scheduler's successor needs to go on with all swaps but one."""
        return [swap.to_dict() for swap in self.swaps.values() if not swap.finished and swap is not but]

    def take_over(self, waiting: list[Mapping[str, Any]]) -> None:
        """Start what `unfinished` told of."""
        for swap in map(Swap.from_dict, waiting):
            self._add(swap)
            self._start(swap)

    def resume(self, swap: Swap, agents: Mapping[str, Mapping[str, Any]]) -> None:
        """Finish the swap in whose midst the scheduler was replaced."""
        self._add(swap)
        self._in_background(self._resume(swap, agents))

    async def manifest(self, environment_id: EnvironmentId | None) -> Manifest | None:
        """The manifest of an environment; None for the base environment."""
        if environment_id is None:
            return None
        return await asyncio.to_thread(self._store.read_manifest, environment_id)

    def _add(self, swap: Swap) -> None:
        self.swaps[swap.id] = swap
        swap.tell_stages(self._log)

    def _start(self, swap: Swap) -> None:
        self._in_background(self._run(swap) if swap.options.get("stage_only") else self._take_turn(swap))

    async def _take_turn(self, swap: Swap) -> None:
        async with self._turn:
            swap.previous_id = self._cluster.target
            self._cluster.options = {name: swap.options[name] for name in TOLD_LATER}
            await self._run(swap)
        await self._after(swap)

    async def _run(self, swap: Swap) -> None:
        try:
            manifest = await self.manifest(swap.environment_id)
        except EnvshipError as error:
            swap.fail("PrepareFailed", {"scheduler": str(error)})
            self._count(swap)
            return
        swap.options["platform"] = manifest and manifest.platform
        swap.options["manifest"] = manifest and manifest.to_bytes()
        await swap.run(self._cluster)
        swap.options["manifest"] = None
        self._count(swap)

    async def _resume(self, swap: Swap, agents: Mapping[str, Mapping[str, Any]]) -> None:
        async with self._turn:
            await swap.resume(self._cluster, agents)
        self._count(swap)
        await self._after(swap)

    def _count(self, swap: Swap) -> None:
        self.outcomes[swap.kind, swap.error or "done"] += 1

    async def _after(self, swap: Swap) -> None:
        if swap.phase == "done" and swap.previous_id != swap.environment_id:
            await self._park(swap)

    async def _park(self, swap: Swap) -> None:
        """A way back that takes no time: every nanny keeps a standby of the environment just left."""
        await asyncio.sleep(PARK_DELAY_S)
        if self._cluster.target != swap.environment_id:
            return
        what = {
            "environment_id": swap.previous_id,
            "keep": swap.options["keep_warm"],
            "prepare": {"start_timeout_s": swap.options["start_timeout_s"]},
        }
        roster = self._cluster.roster
        await asyncio.gather(*(roster.ask_quietly(address, "envship_park", **what) for address in roster))
