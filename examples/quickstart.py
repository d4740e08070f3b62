"""Move a cluster into the environment of this script, look at it, and move it back.

    python examples/quickstart.py [SCHEDULER_ADDRESS]

Without an address, on a LocalCluster with two workers.
"""

from __future__ import annotations

import sys

from distributed import Client, LocalCluster

import envship  # noqa: F401  adds use_environment and others to the client


def where() -> str:
    """The prefix of the process that runs this task."""
    return sys.prefix


def main() -> None:
    address = (
        sys.argv[1] if len(sys.argv) > 1 else LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    )
    with Client(address) as client:
        print("tasks run in", client.submit(where, pure=False).result())

        result = client.use_environment()  # the environment of this script; or a name, a path, a bundle, an id
        print(result)
        print("tasks run in", client.submit(where, pure=False).result())
        print(client.environment_status())

        print(client.reset_environment())
        print("tasks run in", client.submit(where, pure=False).result())
        if isinstance(address, LocalCluster):
            address.close()


if __name__ == "__main__":
    main()
