"""Agents that wait where a test wants them to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def gated(operation: str, folder: str) -> Callable[[Any], None]:
    """What makes an agent wait with *operation* until there is a file ``open`` in *folder*, in which it says so."""

    # Made in here so that it is pickled by value: the cluster cannot import the tests.
    def install(dask_worker: Any) -> None:
        import asyncio
        import os
        import pathlib
        import time

        right = dask_worker.handlers[operation]

        def wait() -> None:
            pathlib.Path(folder, str(os.getpid())).touch()
            while not os.path.exists(os.path.join(folder, "open")):
                time.sleep(0.01)

        async def waiting(**what: Any) -> Any:
            await asyncio.to_thread(wait)
            return await right(**what)

        dask_worker.handlers[operation] = waiting

    return install
