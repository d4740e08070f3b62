"""What a scheduler leaves for its successor, between two real schedulers."""

from __future__ import annotations

import asyncio
import functools
import pickle
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Variable
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin

from worker_bootstrap.coordinator import Coordinator
from worker_bootstrap.errors import NotSwappable
from worker_bootstrap.reexec import STATE_VARIABLE, Arrival
from worker_bootstrap.scheduler_state import COORDINATOR, dask_setup, dump_plugins, load_plugin, save
from worker_bootstrap.swap import Swap

pytestmark = pytest.mark.usefixtures("no_leaks")

SWAP = {"prepare_timeout_s": 1.0, "commit_timeout_s": 1.0, "scheduler": None, "client_token": ""}


class Counting(SchedulerPlugin):
    """Refers to its scheduler, as many plugins do."""

    def __init__(self) -> None:
        self.count = 0
        self.scheduler: Any = None
        self.itself = [self]

    async def start(self, scheduler: Any) -> None:
        self.scheduler = scheduler


class Unpicklable(SchedulerPlugin):
    def __init__(self) -> None:
        self.generator = (number for number in range(3))


class Breaking(SchedulerPlugin):
    """Cannot be started a second time."""

    started = False

    async def start(self, scheduler: Any) -> None:
        if self.started:
            raise RuntimeError("only once")
        self.started = True


class Idle(WorkerPlugin):
    name = "idle"


def scheduler() -> Scheduler:
    return Scheduler(port=0, host="127.0.0.1", dashboard=False, dashboard_address=":0")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


async def register(scheduler: Scheduler, plugin: SchedulerPlugin, name: str) -> None:
    await scheduler.register_scheduler_plugin(plugin, name=name, idempotent=False)


async def succession(old: Scheduler, new: Scheduler, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """Hand over from *old* to *new*; returns the coordinator there."""
    swap = Swap(None, None, SWAP)
    swap.phase = "failed"
    state = {"target": None, "options": {}, "swap": swap.to_dict(), "agents": {}, "proven": ["ab"], "waiting": []}
    path = save(old, state, folder)
    monkeypatch.setenv(STATE_VARIABLE, str(path))
    monkeypatch.setenv("ENVSHIP_STORE", str(folder / "store"))
    await dask_setup(new)
    assert not path.exists()
    coordinator = new.plugins[COORDINATOR]
    assert isinstance(coordinator, Coordinator)
    return coordinator


@pytest.fixture(autouse=True)
def not_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arrival, "done", False)


def test_a_plugin_refers_to_the_scheduler_that_it_is_on() -> None:
    async def main() -> None:
        async with scheduler() as old, scheduler() as new:
            plugin = Counting()
            await register(old, plugin, "counting")
            plugin.count = 42
            [(name, data)] = dump_plugins(old)
            again = load_plugin(data, new)
            assert name == "counting"
            assert again.count == 42
            assert again.scheduler is new
            assert again.itself == [again]

    run(main)


def test_a_plugin_of_the_notebook_travels_by_value() -> None:
    """Classes of the user's ``__main__`` cannot be imported by the successor."""

    async def main() -> None:
        class Local(SchedulerPlugin):
            says = "hello"

        async with scheduler() as old:
            await register(old, Local(), "local")
            [(_, data)] = dump_plugins(old)
            assert pickle.loads(data).says == "hello"

    run(main)


def test_what_dask_registers_by_itself_is_left_out() -> None:
    async def main() -> None:
        async with scheduler() as old:
            assert old.plugins
            assert dump_plugins(old) == []

    run(main)


def test_every_plugin_that_cannot_be_pickled_is_named() -> None:
    async def main() -> None:
        async with scheduler() as old:
            for name in ("one", "two"):
                await register(old, Unpicklable(), name)
            await register(old, Counting(), "harmless")
            with pytest.raises(NotSwappable, match=r"one \(.*generator.*two \(") as caught:
                dump_plugins(old)
            assert "harmless" not in str(caught.value)

    run(main)


def test_plugins_and_values_are_there_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that refer to futures end with the tasks behind them."""

    async def main() -> None:
        async with scheduler() as old, scheduler() as new:
            await register(old, Counting(), "counting")
            await old.register_worker_plugin(comm=None, plugin=pickle.dumps(Idle()), name="idle", idempotent=False)
            await old.register_nanny_plugin(comm=None, plugin=b"the nanny's", name="nanny", idempotent=False)
            async with Client(old.address, asynchronous=True, set_as_default=False) as client:
                await client.set_metadata(["experiment", "seed"], 7)
                await Variable("plain", client=client).set({"rate": 0.1})
                future = client.submit(int, "1")
                await Variable("future", client=client).set(future)
                await client.publish_dataset(numbers=[1, 2], future=[future])
                future.release()

            coordinator = await succession(old, new, tmp_path, monkeypatch)
            assert Arrival.done
            assert coordinator.agent.proven >= {"ab"}
            assert new.plugins["counting"].scheduler is new
            assert {"idle", "envship-worker-agent"} <= set(new.worker_plugins)
            assert {"nanny", "envship-nanny-agent"} <= set(new.nanny_plugins)
            async with Client(new.address, asynchronous=True, set_as_default=False) as client:
                assert await client.get_metadata(["experiment", "seed"]) == 7
                assert await Variable("plain", client=client).get(timeout=5) == {"rate": 0.1}
                assert await client.list_datasets() == ("numbers",)
                assert await client.get_dataset("numbers") == [1, 2]
                with pytest.raises(asyncio.TimeoutError):
                    await Variable("future", client=client).get(timeout=0.1)

    run(main)


def test_a_plugin_that_breaks_in_the_successor_is_logged_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The cluster is there; to lose it over a plugin would be worse."""

    async def main() -> None:
        async with scheduler() as old, scheduler() as new:
            await register(old, Breaking(), "breaking")
            await register(old, Counting(), "counting")
            await succession(old, new, tmp_path, monkeypatch)
            assert "counting" in new.plugins

    run(main)
    assert "'breaking' could not be carried over" in caplog.text


def test_what_is_left_is_private(tmp_path: Path) -> None:
    async def main() -> None:
        async with scheduler() as old:
            path = await asyncio.to_thread(functools.partial(save, old, {}, tmp_path))
            assert stat.S_IMODE((await asyncio.to_thread(path.stat)).st_mode) == 0o600

    run(main)
