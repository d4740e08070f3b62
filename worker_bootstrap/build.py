"""Building an environment in a subprocess, seen from an event loop, while its chunks are still being fetched.

`worker_bootstrap.materialise` does the work; here its process is started, told of chunks that arrive, listened to and
ended with us.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Sequence
from typing import Any, Callable

from worker_bootstrap import arrivals, process_limit
from worker_bootstrap.digest import Digest, EnvironmentId
from worker_bootstrap.errors import ChunkInvalid, ChunkMissing, MaterialiseError
from worker_bootstrap.location import store_limit_bytes
from worker_bootstrap.store import Store

STUB = "import sys; sys.path[:1] = [sys.argv.pop(1)]; from worker_bootstrap.materialise import main; main()"
TIDY_S = 10.0
"""So long a build that was called off may take to remove what it wrote, before it is killed."""

Arrived = Callable[[Sequence[Digest]], None]
Fetch = Callable[[Arrived], Awaitable[None]]
"""Fetches what is missing, and calls its argument with the chunks that have arrived."""


async def build(
    store: Store,
    environment_id: EnvironmentId,
    code: str,
    link_mode: str,
    report: Callable[[int, int], None],
    fetch: Fetch | None = None,
) -> str:
    """Build an environment in *store*; return its prefix.

    Parameters
    ----------
    code
        Folder that holds this package, for the subprocess.
    report
        Called with (bytes done, bytes in total).
    fetch
        Brings the chunks that are missing, while those that are there are written already. None: all are there.

    Raises
    ------
    EnvshipError
        Whatever *fetch* raised, else whatever the subprocess did: `ChunkMissing`, `StoreFull`, `MaterialiseError`, …

    Notes
    -----
    Cancelling ends the subprocess; what it built so far is swept away by the next build. Where *fetch* fails, the
    subprocess removes it itself. A chunk that turns out damaged does not end *fetch*: the next try has less to do.
    """
    read_only = [part for layout in store.layouts[:-1] for part in ("--read-only", str(layout.root))]
    limit_bytes = store_limit_bytes()
    limit = [] if limit_bytes is None else ["--store-limit", str(limit_bytes)]
    # -B: an interpreter that compiles us on a full disk leaves byte code cut short, and no later build would start.
    with process_limit.named():
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-B", "-c", STUB, code, str(store.layout.root), environment_id),
            *("--link-mode", link_mode, *read_only, *limit, *(["--arriving"] if fetch is not None else [])),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    building = asyncio.ensure_future(_outcome(process, environment_id, report))
    try:
        if fetch is not None:
            await _feed(process, building, fetch)
        return await building
    finally:
        building.cancel()
        await asyncio.gather(building, return_exceptions=True)
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await process.wait()


async def _outcome(
    process: asyncio.subprocess.Process, environment_id: EnvironmentId, report: Callable[[int, int], None]
) -> str:
    assert process.stdout is not None and process.stderr is not None
    errors = asyncio.ensure_future(process.stderr.read())
    try:
        async for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                from worker_bootstrap.materialise import read_error  # not what every agent needs to start

                raise read_error(message["error"])
            if "prefix" in message:
                return str(message["prefix"])
            report(message["done_bytes"], message["total_bytes"])
        tail = (await errors).decode(errors="replace").strip()[-2000:]
        raise MaterialiseError(environment_id, "", f"its process ended with {await process.wait()}: {tail}")
    finally:
        errors.cancel()


async def _feed(process: asyncio.subprocess.Process, building: asyncio.Future[str], fetch: Fetch) -> None:
    """Fetch, telling the build of what arrives. Returns when all has come, or the build ended before."""
    stdin = process.stdin
    assert stdin is not None

    def tell(message: bytes) -> None:
        # Never waited for: the other end reads whatever it does besides, and a message is small.
        if not stdin.is_closing():
            stdin.write(message)

    fetching = asyncio.ensure_future(fetch(lambda digests: tell(arrivals.announce(digests))))
    try:
        while not fetching.done():
            both: set[asyncio.Future[Any]] = {fetching, building}
            await asyncio.wait(both, timeout=arrivals.WORD_S, return_when=asyncio.FIRST_COMPLETED)
            if building.done() and not isinstance(building.exception(), (ChunkMissing, ChunkInvalid)):
                return
            if building.done():
                await asyncio.wait({fetching})
            tell(arrivals.announce())
        fetching.result()
        tell(arrivals.finish())
    except BaseException as error:
        tell(arrivals.finish(str(error) or type(error).__name__))
        if isinstance(error, Exception):
            await asyncio.wait({building}, timeout=TIDY_S)
        raise
    finally:
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
