"""What the driver of `benchmarks.spread_rivals.ray_tree` does, on the client's host; prints one line of JSON.

    python benchmarks/ray_tree.py ADDRESS FILE HOST_ADDRESS…

Puts the file's bytes into Ray's object store, and has it fetched by one host, then by two more, then by four: every
stage can take it from all hosts that have it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

JOIN_TIMEOUT_S = 120


@ray.remote(num_cpus=0)
def length(blob: bytes) -> int:
    """The task that needs the bytes: Ray brings them to its host before it starts."""
    return len(blob)


def main() -> None:
    """Connect, wait for the hosts, take the time of all stages."""
    address, path, *hosts = sys.argv[1:]
    ray.init(address=address, _node_ip_address=address.partition(":")[0], log_to_driver=False)
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while set(hosts) - (nodes := alive()).keys():
        if time.monotonic() > deadline:
            raise TimeoutError("not every host has joined")
        time.sleep(0.2)
    strategies = [NodeAffinitySchedulingStrategy(nodes[host], soft=False) for host in hosts]
    ray.get([length.options(scheduling_strategy=each).remote(b"") for each in strategies])  # starts the workers
    blob = Path(path).read_bytes()
    began = time.time()
    reference = ray.put(blob)
    stage = 1
    while strategies:
        now, strategies = strategies[:stage], strategies[stage:]
        assert {len(blob)} == set(ray.get([length.options(scheduling_strategy=each).remote(reference) for each in now]))
        stage *= 2
    print(json.dumps({"seconds": time.time() - began}), flush=True)


def alive() -> dict[str, str]:
    """Node ids by address."""
    return {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}


if __name__ == "__main__":
    main()
