"""Move a running Dask cluster into your software environment."""

from envship._version import __version__

__all__ = ["__version__"]
