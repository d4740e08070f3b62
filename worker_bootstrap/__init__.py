"""Everything of envship that runs on cluster machines.

Standard library, ``distributed``, and nothing else: this package travels to the machines of a cluster inside
plugins (see `worker_bootstrap.carry`) and must import on Python 3.9 where nothing of ours is installed.
``zstandard`` is used where it is there. `envship` builds on this package, never the other way round.
"""
