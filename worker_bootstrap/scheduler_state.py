"""What a scheduler hands to its successor when it is re-executed.

Plugins of users (scheduler's, workers', nannies') are carried over; metadata, and variables and published datasets that
hold no futures; the coordinator, with the swap that it is in the middle of. Tasks and futures end with the process,
and with them queues, locks, events, and the variables and datasets that refer to futures.
The state lies in a private file for the moment between two processes of the same user; it never travels.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle

from worker_bootstrap.errors import NotSwappable
from worker_bootstrap.reexec import STATE_VARIABLE, Arrival

logger = logging.getLogger("envship.scheduler")

COORDINATOR = "envship-coordinator"


def dump_plugins(scheduler: Any) -> list[tuple[str, bytes]]:
    """The users' plugins on *scheduler*, pickled as they are now; a reference to the scheduler stays one.

    Raises
    ------
    NotSwappable
        Naming every plugin that cannot be pickled.
    """
    dumped, problems = [], []
    for name, plugin in scheduler.plugins.items():
        if name == COORDINATOR or type(plugin).__module__.split(".")[0] in ("distributed", "dask"):
            continue
        try:
            dumped.append((name, _dump(plugin, scheduler)))
        except Exception as error:
            problems.append(f"{name} ({error})")
    if problems:
        raise NotSwappable(
            f"the scheduler {scheduler.address}",
            f"these plugins cannot be carried over: {', '.join(problems)}",
            "Unregister them, or make them picklable.",
        )
    return dumped


def load_plugin(data: bytes, scheduler: Any) -> Any:
    """A plugin from `dump_plugins`, now referring to *scheduler*."""
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.scheduler = scheduler
    return unpickler.load()


def save(scheduler: Any, coordinator: dict[str, Any], folder: Path) -> Path:
    """Write what the successor of *scheduler* needs to a private file in *folder*."""
    state = {
        "coordinator": coordinator,
        "scheduler_plugins": dump_plugins(scheduler),
        "worker_plugins": dict(scheduler.worker_plugins),
        "nanny_plugins": dict(scheduler.nanny_plugins),
        "values": _values(scheduler),
    }
    handle, path = tempfile.mkstemp(dir=folder, suffix=".scheduler")
    with os.fdopen(handle, "wb") as file:
        _StatePickler(file, protocol=4).dump(state)
    return Path(path)


async def dask_setup(scheduler: Any) -> None:
    """Preload hook of the successor: takes over before the first worker or client has been heard."""
    from worker_bootstrap.coordinator import Coordinator

    state = _take_state()
    scheduler.worker_plugins.update(state["worker_plugins"])
    scheduler.nanny_plugins.update(state["nanny_plugins"])
    _restore_values(scheduler, state["values"])
    coordinator = Coordinator()
    coordinator.take_over(scheduler, state["coordinator"])
    await scheduler.register_scheduler_plugin(coordinator, name=COORDINATOR, idempotent=False)
    Arrival.arrive()
    for name, data in state["scheduler_plugins"]:
        try:
            plugin = load_plugin(data, scheduler)
            await scheduler.register_scheduler_plugin(plugin, name=name, idempotent=False)
        except Exception:
            logger.exception("the scheduler plugin %r could not be carried over", name)


def _values(scheduler: Any) -> dict[str, Any]:
    """What users left on *scheduler* that does not depend on its tasks."""
    variables = getattr(scheduler.extensions.get("variables"), "variables", {})
    datasets = getattr(scheduler.extensions.get("publish"), "datasets", {})
    return {
        "metadata": dict(scheduler.task_metadata),
        "variables": {name: record for name, record in variables.items() if record["type"] != "Future"},
        "datasets": {name: record for name, record in datasets.items() if not record["keys"]},
    }


def _restore_values(scheduler: Any, values: dict[str, Any]) -> None:
    scheduler.task_metadata.update(values["metadata"])
    for extension, attribute in (("variables", "variables"), ("publish", "datasets")):
        if extension in scheduler.extensions:
            getattr(scheduler.extensions[extension], attribute).update(values[attribute])


def _take_state() -> dict[str, Any]:
    path = Path(os.environ.pop(STATE_VARIABLE))
    state: dict[str, Any] = pickle.loads(path.read_bytes())
    path.unlink()
    return state


def _dump(plugin: Any, scheduler: Any) -> bytes:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=4)
    pickler.scheduler = scheduler
    pickler.dump(plugin)
    return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is not typed
    scheduler: Any = None

    def persistent_id(self, value: Any) -> str | None:
        return "scheduler" if value is self.scheduler else None


class _StatePickler(pickle.Pickler):
    """Published datasets are kept as frames that are views of what came over the wire."""

    def reducer_override(self, value: Any) -> Any:
        return (bytes, (value.tobytes(),)) if isinstance(value, memoryview) else NotImplemented


class _Unpickler(pickle.Unpickler):
    scheduler: Any = None

    def persistent_load(self, name: Any) -> Any:
        return self.scheduler
