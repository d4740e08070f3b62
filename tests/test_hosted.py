"""A nanny's worker process in an environment of its own: what `distributed.nanny.WorkerProcess` does, this does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker
from distributed.core import Status
from distributed.nanny import WorkerProcess

from worker_bootstrap import carry
from worker_bootstrap.errors import StartError
from worker_bootstrap.hosted import HostedProcess, PendingProcess, RefusedProcess
from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.standby import Standby, StartRequest
from worker_bootstrap.store import Store
from worker_bootstrap.worker_options import WorkerOptions

pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT_S = 60.0
THIS = Interpreter(None, sys.prefix, sys.executable, dict(os.environ))


class Lab:
    """A scheduler, and workers hosted beside it; *exits* are the exit codes that they reported."""

    def __init__(self, scheduler: Scheduler, code: str, folder: Path) -> None:
        self.scheduler = scheduler
        self.code = code
        self.folder = folder
        self.exits: list[int] = []
        self.starts = 0

    async def standby(self, **kwargs: Any) -> Standby:
        self.starts += 1
        given = {
            "scheduler_ip": self.scheduler.address,
            "nthreads": 1,
            "local_directory": str(self.folder),
            "dashboard": False,
            **kwargs,
        }
        options = WorkerOptions(Worker, given, {}, {}, None).pickled()
        return await Standby.start(THIS, StartRequest(self.code, None, options), TIMEOUT_S)

    def process(self, standby: Standby | None = None, **more: Any) -> HostedProcess:
        return HostedProcess(THIS, self.standby, self.exits.append, standby, **more)

    async def registered(self, address: str | None) -> None:
        async def there() -> None:
            while address not in self.scheduler.workers:  # noqa: ASYNC110  the scheduler sets no event
                await asyncio.sleep(0.01)

        await asyncio.wait_for(there(), TIMEOUT_S)


@contextlib.asynccontextmanager
async def laboratory(store: Store, folder: Path) -> AsyncIterator[Lab]:
    async with Scheduler(port=0, host="127.0.0.1", dashboard=False, dashboard_address=":0") as scheduler:
        yield Lab(scheduler, str(carry.publish(store.layout)), folder)


def in_laboratory(test: Callable[[Lab], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test beside a scheduler."""

    @functools.wraps(test)
    def run(store: Store, tmp_path: Path) -> None:
        async def main() -> None:
            async with laboratory(store, tmp_path / "scratch") as lab:
                await test(lab)

        asyncio.run(main())

    run.__signature__ = inspect.signature(run, follow_wrapped=False)  # type: ignore[attr-defined]
    return run


@in_laboratory
async def test_a_worker_starts_stops_and_starts_again(lab: Lab) -> None:
    """With the same object, as a nanny does on ``client.restart``."""
    standby = await lab.standby()
    process = lab.process(standby, override={"name": "first"})
    assert await process.start() == await process.start() == Status.running
    assert process.is_alive()
    assert process.pid == standby.pid
    await lab.registered(process.worker_address)
    assert lab.scheduler.workers[process.worker_address].name == "first"

    await process.kill()
    assert process.status == Status.stopped
    assert not process.is_alive()
    assert process.pid is None
    assert lab.exits == [0]

    await process.start()
    await lab.registered(process.worker_address)
    assert lab.scheduler.workers[process.worker_address].name != "first", "an override is for one start only"
    assert process.pid not in (None, standby.pid)
    assert lab.starts == 2
    await process.kill()


@in_laboratory
async def test_a_worker_that_dies_is_reported_and_its_folder_removed(lab: Lab) -> None:
    process = lab.process()
    await process.start()
    assert process.worker_dir is not None and process.pid is not None
    folder = Path(process.worker_dir)
    (folder / "storage").mkdir(exist_ok=True)
    (folder / "storage" / "spilled").write_bytes(b"left by a worker that could not clean up")
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.wait_for(process.stopped.wait(), TIMEOUT_S)
    assert lab.exits == [-signal.SIGKILL]
    assert not await asyncio.to_thread(folder.exists)
    await process.start()
    assert process.is_alive()
    await process.kill()


@in_laboratory
async def test_a_task_that_cannot_be_cancelled_does_not_delay_the_end(lab: Lab) -> None:
    process = lab.process()
    await process.start()
    async with Client(lab.scheduler.address, asynchronous=True, set_as_default=False) as client:
        future = client.submit(time.sleep, 3600)
        while not any(worker.processing for worker in lab.scheduler.workers.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.wait_for(process.kill(timeout=20, executor_wait=False), 15)
        future.release()
    assert lab.exits == [0], "it closed by itself, and was not killed"


@in_laboratory
async def test_a_worker_that_does_not_close_is_killed(lab: Lab) -> None:
    process = lab.process()
    await process.start()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    await asyncio.wait_for(process.kill(timeout=0.5), TIMEOUT_S)
    assert lab.exits == [-signal.SIGKILL]


@in_laboratory
async def test_kills_at_the_same_time_are_one(lab: Lab) -> None:
    process = lab.process()
    await process.start()
    await asyncio.gather(process.kill(), process.kill())
    assert lab.exits == [0]
    await process.kill()
    assert process.status == Status.stopped


@in_laboratory
async def test_a_process_that_was_replaced_reports_nothing(lab: Lab) -> None:
    process = lab.process()
    await process.start()
    process.on_exit = None
    await process.kill()
    assert lab.exits == []


@in_laboratory
async def test_a_standby_that_was_never_started_ends_as_well(lab: Lab) -> None:
    standby = await lab.standby()
    process = lab.process(standby)
    await process.kill()
    assert not standby.alive


@in_laboratory
async def test_a_standby_that_has_died_is_made_anew(lab: Lab) -> None:
    standby = await lab.standby()
    standby.signal(signal.SIGKILL)
    await standby.wait()
    process = lab.process(standby)
    await process.start()
    assert lab.starts == 2
    await process.kill()


@in_laboratory
async def test_a_worker_that_does_not_start_leaves_nothing_behind(lab: Lab) -> None:
    process = lab.process(await lab.standby(interface="no-such-interface"))
    with pytest.raises(StartError, match="no-such-interface"):
        await process.start()
    assert process.status == Status.failed
    assert not process.is_alive()
    assert process.process is None
    await process.kill()
    assert lab.exits == []


@in_laboratory
async def test_the_memory_manager_can_end_it(lab: Lab) -> None:
    """`NannyMemoryManager` goes past the nanny, to ``process.process``."""
    for end, number in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
        process = lab.process()
        await process.start()
        assert process.process is not None
        assert process.process.pid == process.pid
        getattr(process.process, end)()
        await asyncio.wait_for(process.stopped.wait(), TIMEOUT_S)
        assert lab.exits.pop() in (-number, 0, 1)


# -- what a nanny counts on


@pytest.mark.parametrize("method", ["start", "kill", "is_alive"])
@pytest.mark.parametrize("kind", [HostedProcess, PendingProcess, RefusedProcess])
def test_it_can_be_called_as_dask_calls_its_own(kind: type[Any], method: str) -> None:
    theirs = inspect.signature(getattr(WorkerProcess, method)).parameters
    ours = inspect.signature(getattr(kind, method)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values())
    assert takes_any or set(theirs) <= set(ours)


def test_a_pending_process_starts_and_ends_at_once() -> None:
    async def main() -> None:
        pending = PendingProcess()
        assert await pending.start() == Status.running
        assert pending.is_alive()
        await pending.kill(timeout=1, reason="test")

    asyncio.run(main())


def test_a_refused_process_says_why() -> None:
    refused = RefusedProcess(StartError(None, "/p", "no room", ""))
    with pytest.raises(StartError, match="no room"):
        asyncio.run(refused.start())
    assert not refused.is_alive()


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Dask reports lost workers as warnings; they are what is tested here."""
    logging.getLogger("distributed").setLevel(logging.ERROR)
