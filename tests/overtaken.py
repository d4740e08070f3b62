"""Work on a store while somebody else evicts everything in it, at a moment of the test's choice."""

from __future__ import annotations

from pathlib import Path

from worker_bootstrap import evict
from worker_bootstrap.evict import collect
from worker_bootstrap.store import Store


class Overtaken(Store):
    """A store in which everything is evicted at one moment of somebody's work: when *moment* is called."""

    def __init__(self, root: Path, moment: str) -> None:
        super().__init__(root)
        self.freed: list[evict.Freed] = []
        right = getattr(self, moment)

        def overtaken(*arguments: object) -> object:
            if not self.freed:
                self.freed.append(collect(Store(root), 0, grace_s=0))
            return right(*arguments)

        setattr(self, moment, overtaken)
