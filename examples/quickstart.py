"""Move a cluster into the environment of this script, look at it, and move it back.

    python examples/quickstart.py [SCHEDULER_ADDRESS]

Without an address, on a cluster of two workers on this machine.
"""

from __future__ import annotations

import sys

from distributed import Client

import envship  # noqa: F401  adds use_environment and others to the client


def where() -> str:
    """The prefix of the process that runs this task."""
    return sys.prefix


def main() -> None:
    # Without an address, the client starts a cluster of its own, and stops it when it closes.
    where_from = {"address": sys.argv[1]} if len(sys.argv) > 1 else {"n_workers": 2, "threads_per_worker": 1}
    with Client(**where_from) as client:
        print("tasks run in", client.submit(where, pure=False).result())

        print(client.use_environment())  # the environment of this script; or give a name, a path, a bundle, an id
        print("tasks run in", client.submit(where, pure=False).result())
        print(client.environment_status())

        print(client.reset_environment())
        print("tasks run in", client.submit(where, pure=False).result())


if __name__ == "__main__":
    main()
