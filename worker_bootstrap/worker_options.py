"""What a nanny was told about its worker, in a form that another interpreter can be started with."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

from worker_bootstrap.errors import NotSwappable


class WorkerOptions(NamedTuple):
    """What a nanny was told about its worker. *env* are the variables for its process, *config* is Dask's."""

    worker_class: Any
    kwargs: Mapping[str, Any]
    env: Mapping[str, str]
    config: Mapping[str, Any]
    silence_logs: Any

    @classmethod
    def of_nanny(cls, nanny: Any) -> WorkerOptions:
        """The options that *nanny* would start its worker with (see `Nanny.instantiate`)."""
        kwargs = {
            "scheduler_ip": nanny.scheduler_addr,
            "nthreads": nanny.nthreads,
            "local_directory": nanny._original_local_dir,
            "services": nanny.services,
            "nanny": nanny.address,
            "name": nanny.name,
            "memory_limit": nanny.memory_manager.memory_limit,
            "resources": nanny.resources,
            "validate": nanny.validate,
            "silence_logs": nanny.silence_logs,
            "death_timeout": nanny.death_timeout,
            "preload": nanny.preload,
            "preload_argv": nanny.preload_argv,
            "security": nanny.security,
            "contact_address": nanny.contact_address,
        }
        kwargs.update(nanny.worker_kwargs)
        return cls(nanny.Worker, kwargs, nanny.env, nanny.config, nanny.silence_logs)

    def pickled(self) -> bytes:
        """For a process of the same user on the same machine.

        Raises
        ------
        NotSwappable
            If an option cannot be pickled.
        """
        config = {name: value for name, value in self.config.items() if name not in ("scheduler", "shuffle")}
        options = {
            "class": self.worker_class,
            "kwargs": dict(self.kwargs),
            "env": dict(self.env),
            "config": config,
            "silence_logs": self.silence_logs,
        }
        try:
            return pickle.dumps(options, protocol=4)
        except Exception as error:
            raise NotSwappable(
                f"the worker {self.kwargs.get('name')!r}",
                f"its options cannot be sent to another interpreter ({error})",
                "Start it with options that pickle.",
            ) from error
