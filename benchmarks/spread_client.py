"""What the client's process of `benchmarks.spread` does, inside its network namespace; prints one line of JSON.

    python benchmarks/spread_client.py METHOD ADDRESS HOSTS ARGUMENT…

Methods are the functions of `METHODS`. Each waits until the cluster is complete, then takes the time of one way to
bring the same bytes to every host.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from distributed import Client

READY_TIMEOUT_S = 300


def stage(client: Client, hosts: int, environment_id: str) -> dict[str, Any]:
    """envship: chunks only, nothing is built."""
    import envship  # noqa: F401  # adds the methods

    deadline = time.monotonic() + READY_TIMEOUT_S
    while len(client.environment_status().hosts) < hosts + 1:  # and the scheduler's
        if time.monotonic() > deadline:
            raise TimeoutError("not every host has joined")
        time.sleep(0.2)
    began = time.time()
    result = client.stage_environment(environment_id, build=False, progress=False)
    return {
        "began": began,
        "seconds": time.time() - began,
        "uploaded_bytes": result.uploaded_bytes,
        "uploaded_chunks": result.uploaded_chunks,
        "phases": result.seconds,
    }


METHODS = {"stage": stage}


def main() -> None:
    """Connect, wait for the workers, run one method."""
    method, address, hosts, *arguments = sys.argv[1:]
    with Client(address, timeout="60s") as client:
        client.wait_for_workers(int(hosts), timeout=READY_TIMEOUT_S)
        answer = METHODS[method](client, int(hosts), *arguments)
    print(json.dumps(answer))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
