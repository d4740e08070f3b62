"""Move a running Dask cluster into your software environment.

Importing this package adds `use_environment`, `stage_environment`, `environment_status` and `reset_environment` to
`distributed.Client`.
"""

from envship import client as _client
from envship._version import __version__
from envship.environment import Environment
from envship.options import PackOptions
from envship.pack import pack
from envship.result import EnvironmentStatus, StagedResult, SwapResult
from worker_bootstrap.errors import EnvshipError

_client.install()

__all__ = [
    "Environment",
    "EnvironmentStatus",
    "EnvshipError",
    "PackOptions",
    "StagedResult",
    "SwapResult",
    "__version__",
    "pack",
]
