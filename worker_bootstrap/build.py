"""Building an environment in a subprocess, seen from an event loop.

`worker_bootstrap.materialise` does the work; here its process is started, listened to and ended with us.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Callable

from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import MaterialiseError
from worker_bootstrap.materialise import read_error
from worker_bootstrap.store import Store

_STUB = "import sys; sys.path[:1] = [sys.argv.pop(1)]; from worker_bootstrap.materialise import main; main()"


async def build(
    store: Store,
    environment_id: EnvironmentId,
    code: str,
    link_mode: str,
    report: Callable[[int, int], None],
) -> str:
    """Build an environment whose chunks are all in *store*; return its prefix.

    Parameters
    ----------
    code
        Folder that holds this package, for the subprocess.
    report
        Called with (bytes done, bytes in total).

    Raises
    ------
    EnvshipError
        Whatever the subprocess raised: `ChunkMissing`, `StoreFull`, `MaterialiseError`, …

    Notes
    -----
    Cancelling ends the subprocess; what it built so far is swept away by the next build.
    """
    read_only = [part for layout in store.layouts[:-1] for part in ("--read-only", str(layout.root))]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _STUB, code, str(store.layout.root), environment_id),
        *("--link-mode", link_mode, *read_only),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        async for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise read_error(message["error"])
            if "prefix" in message:
                return str(message["prefix"])
            report(message["done_bytes"], message["total_bytes"])
        tail = (await errors).decode(errors="replace").strip()[-2000:]
        raise MaterialiseError(environment_id, "", f"its process ended with {await process.wait()}: {tail}")
    finally:
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        errors.cancel()
