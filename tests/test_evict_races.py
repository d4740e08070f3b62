"""Processes that read, serve and build, while another one evicts: whatever it takes they miss, and never half of it.

The moments at which it matters most are met one by one in `tests.test_evict`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker_bootstrap.evict import collect
from worker_bootstrap.materialise import materialise
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_chunks, damaged_files

from .environments import tiny_environment

HEAD = """
import asyncio, sys
from pathlib import Path
from worker_bootstrap.digest import digest_of
from worker_bootstrap.errors import ChunkMissing, EnvironmentMissing
from worker_bootstrap.store import Store
store, name = Store(Path(sys.argv[1])), sys.argv[2]
chunks = sys.argv[3].split(",")
def seen(what):
    print(what, flush=True)
"""
ROLES = {
    "read": """
while True:
    try:
        for digest in chunks:
            assert digest_of(store.read_chunk(digest)) == digest
        seen("found")
    except ChunkMissing:
        seen("missed")
""",
    "serve": """
from worker_bootstrap.chunk_service import ChunkServer
from worker_bootstrap import codec
from tests.peers import Peer
async def main():
    async with Peer(ChunkServer(store).handlers()) as agent, Peer({}) as peer:
        while True:
            got = await peer.chunks().get(agent.address, chunks)
            for chunk in got:
                assert digest_of(codec.decode(chunk.payload, chunk.codec, 1 << 20)) == chunk.digest
            seen("found" if len(got) == len(chunks) else "missed")
asyncio.run(main())
""",
    "build": """
import time
from worker_bootstrap.lock import Lease
from worker_bootstrap import crew, writer
from worker_bootstrap.materialise import materialise
writer.ALONE_FILES = writer.JOB_BYTES = 0
while True:
    try:
        prefix = materialise(store, name, processes=2)
        lease = Lease(store.layout.lease(name))
        lease.hold()
        if store.built(name) is None:
            lease.release()
            raise EnvironmentMissing(name, "gone between build and lease")
        until = time.monotonic() + 0.3  # whatever is evicted meanwhile, this is not
        while time.monotonic() < until:
            assert len(list(prefix.iterdir())) == 60
        seen("found")
        lease.release()
        time.sleep(0.15)  # else the lease is never free, and nothing can be evicted
    except (ChunkMissing, EnvironmentMissing):
        seen("missed")
""",
}


class Watched:
    """Processes, one of each role, and what they say."""

    def __init__(self, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        self.processes = processes

    def until_each(self, what: str) -> None:
        """Read on until each of them has said *what*."""
        waiting = dict(self.processes)
        deadline = time.monotonic() + 60
        while waiting:
            assert time.monotonic() < deadline, f"{list(waiting)} never {what}"
            ready, _, _ = select.select([process.stdout for process in waiting.values()], [], [], 1)
            for role, process in list(waiting.items()):
                if process.stdout in ready:
                    assert process.stdout is not None
                    line = process.stdout.readline().decode().strip()
                    assert line, f"{role} ended with {process.wait()}"
                    if line == what:
                        del waiting[role]


@contextlib.contextmanager
def at_work(store: Store, name: str, chunks: list[str]) -> Iterator[Watched]:
    arguments = [str(store.layout.root), name, ",".join(chunks)]
    root = Path(__file__).parents[1]
    processes = {
        role: subprocess.Popen(
            [sys.executable, "-c", HEAD + program, *arguments], stdout=subprocess.PIPE, cwd=root, bufsize=0
        )
        for role, program in ROLES.items()
    }
    try:
        yield Watched(processes)
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


EVICT = [sys.executable, "-m", "envship.cli", "gc", "--limit", "0", "--grace", "0s", "--json", "--store"]


@pytest.mark.heavy
def test_processes_that_read_serve_and_build_miss_what_another_evicts(store: Store) -> None:
    environment_id = tiny_environment(store, {f"{i:03}": os.urandom(60) for i in range(60)})
    manifest = store.read_manifest(environment_id)
    content = {digest: store.read_chunk(digest) for digest in manifest.chunks}
    with at_work(store, environment_id, list(content)) as watched:
        for _ in range(3):
            watched.until_each("found")
            deadline = time.monotonic() + 60
            while not json.loads(subprocess.run([*EVICT, store.layout.root], capture_output=True).stdout)["evicted"]:
                assert time.monotonic() < deadline, "never evicted"
            watched.until_each("missed")
            for data in content.values():
                store.write_chunk(data)
            store.write_manifest(manifest)
    materialise(store, environment_id)
    assert list(damaged_files(store, environment_id)) == list(damaged_chunks(store, manifest)) == []
    assert collect(store, 0, grace_s=0).evicted == (environment_id,)
