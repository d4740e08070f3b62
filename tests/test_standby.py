"""Interpreters that get ready, and all the ways in which one does not."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Worker

from worker_bootstrap import carry
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.errors import StartError
from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.lock import Lease
from worker_bootstrap.standby import Standby, StartRequest, exit_text
from worker_bootstrap.standby_main import HEADER, STUB
from worker_bootstrap.store import Store

from .cluster import eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

NAME = EnvironmentId(digest_of(b"some environment"))
TIMEOUT_S = 60.0
THIS = Interpreter(None, sys.prefix, sys.executable, dict(os.environ))
WORKERS = '''
"""Workers that behave as told, without a scheduler."""

import asyncio


class Quiet:
    address, local_directory = "tcp://quiet", "/nowhere"

    def __init__(self, **kwargs):
        self.closed = asyncio.Event()
        self.kwargs = kwargs
        self.address = kwargs.get("address", self.address)

    def __await__(self):
        return self.start().__await__()

    async def start(self):
        return self

    async def finished(self):
        await self.closed.wait()

    async def close(self, **how):
        self.closed.set()


class Broken(Quiet):
    async def start(self):
        raise ValueError("no scheduler in sight")


class Crashing(Quiet):
    async def start(self):
        import os
        os._exit(7)


class Stubborn(Quiet):
    async def close(self, **how):
        pass
'''


@pytest.fixture
def code(store: Store) -> str:
    return str(carry.publish(store.layout))


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., bytes]]:
    """Makes the pickled options of a worker of `WORKERS`; *more* replaces what is in them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "some_workers.py").write_text(WORKERS)

    def options(kind: str = "Quiet", **more: Any) -> bytes:
        import some_workers  # type: ignore[import-not-found]

        given = {"class": getattr(some_workers, kind), "kwargs": {}, "env": {}, "config": {}, "silence_logs": None}
        return pickle.dumps({**given, **more})

    yield options
    sys.modules.pop("some_workers", None)


def program(folder: Path, text: str, mode: int = 0o755) -> Interpreter:
    """Something in the place of an interpreter."""
    path = folder / "python"
    path.write_text(text)
    path.chmod(mode)
    return Interpreter(NAME, str(folder), str(path), dict(os.environ))


def refused(interpreter: Interpreter, request: StartRequest, timeout_s: float = TIMEOUT_S) -> StartError:
    """The error that starting *interpreter* ends with."""
    with pytest.raises(StartError) as caught:
        asyncio.run(Standby.start(interpreter, request, timeout_s))
    assert caught.value.prefix == interpreter.prefix
    return caught.value


def is_gone(pid: int) -> bool:
    """Whether the process has ended; where nobody reaps orphans, it stays a zombie."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


# -- it gets ready


def test_it_says_where_it_runs(code: str) -> None:
    async def main() -> None:
        standby = await Standby.start(THIS, StartRequest(code, None), TIMEOUT_S)
        assert standby.description["prefix"] == sys.prefix
        assert standby.description["pid"] == standby.pid != os.getpid()
        assert standby.alive
        await standby.discard()
        assert not standby.alive
        await standby.discard()
        assert is_gone(standby.pid)

    asyncio.run(main())


def test_it_becomes_a_worker_and_ends_when_told(code: str, worker: Callable[..., bytes]) -> None:
    async def main() -> None:
        standby = await Standby.start(THIS, StartRequest(code, None, worker()), TIMEOUT_S)
        assert await standby.run() == ("tcp://quiet", "/nowhere")
        standby.stop(1.0, executor_wait=False, reason="test")
        assert await asyncio.wait_for(standby.wait(), TIMEOUT_S) == 0
        standby.stop(1.0, executor_wait=False, reason="once more, in vain")
        standby.signal(signal.SIGKILL)

    asyncio.run(main())


def test_what_it_is_told_last_wins(code: str, worker: Callable[..., bytes]) -> None:
    async def main() -> None:
        options = worker(kwargs={"address": "tcp://given"})
        standby = await Standby.start(THIS, StartRequest(code, None, options), TIMEOUT_S)
        assert (await standby.run({"address": "tcp://over"}))[0] == "tcp://over"
        await standby.discard()

    asyncio.run(main())


def test_it_holds_its_environment(code: str, store: Store) -> None:
    """From before it is ready until it has ended, however it ends."""
    path = store.layout.lease(NAME)

    async def main() -> None:
        standby = await Standby.start(THIS, StartRequest(code, str(path)), TIMEOUT_S)
        assert not Lease(path).is_free()
        standby.signal(signal.SIGKILL)
        assert await standby.wait() == -signal.SIGKILL
        assert Lease(path).is_free()

    asyncio.run(main())


# -- it does not get ready


def test_an_interpreter_that_ends_is_reported_with_its_output(code: str, tmp_path: Path) -> None:
    error = refused(program(tmp_path, "#!/bin/sh\necho 'libm.so.9: not found' >&2\nexit 3\n"), StartRequest(code, None))
    assert error.reason == "it ended with exit code 3"
    assert "libm.so.9: not found" in str(error)
    assert error.environment_id == NAME


def test_an_interpreter_that_crashes_is_reported_with_its_signal(code: str, tmp_path: Path) -> None:
    error = refused(program(tmp_path, "#!/bin/sh\nkill -SEGV $$\n"), StartRequest(code, None))
    assert error.reason == "it ended with signal SIGSEGV"


def test_of_much_output_the_end_is_shown(code: str, tmp_path: Path) -> None:
    """More than a pipe holds, too: nobody reads it meanwhile."""
    noisy = '#!/bin/sh\ni=0\nwhile [ $i -lt 5000 ]; do echo "line $i of a long complaint" >&2; i=$((i+1)); done\n'
    error = refused(program(tmp_path, noisy + "exit 1\n"), StartRequest(code, None))
    assert "line 4999 of" in str(error)
    assert len(error.output) <= 4096


def test_an_interpreter_that_hangs_is_ended_after_the_timeout(code: str, tmp_path: Path) -> None:
    error = refused(program(tmp_path, "#!/bin/sh\nexec sleep 3600\n"), StartRequest(code, None), timeout_s=0.3)
    assert "not ready after" in error.reason


@pytest.mark.parametrize(
    ("text", "mode"), [("no program at all", 0o755), ("#!/bin/sh\n", 0o644), ("#!/no/such/shell\n", 0o755)]
)
def test_what_is_no_program_is_refused(code: str, tmp_path: Path, text: str, mode: int) -> None:
    error = refused(program(tmp_path, text, mode), StartRequest(code, None))
    assert error.output == ""
    assert "python" in error.reason


def test_a_prefix_that_is_not_there_is_refused(code: str, tmp_path: Path) -> None:
    missing = Interpreter(NAME, str(tmp_path), str(tmp_path / "bin/python"), {})
    assert "No such file" in refused(missing, StartRequest(code, None)).reason


def test_cancelling_ends_the_process(code: str, tmp_path: Path) -> None:
    hanging = program(tmp_path, "#!/bin/sh\necho $$ > $0.pid\nexec sleep 3600\n")
    pid_file = tmp_path / "python.pid"

    async def main() -> None:
        starting = asyncio.ensure_future(Standby.start(hanging, StartRequest(code, None), TIMEOUT_S))
        await asyncio.to_thread(eventually, lambda: pid_file.exists() and pid_file.read_text(), "it runs")
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(main())
    assert is_gone(int(pid_file.read_text()))


# -- the environment lacks what the worker needs


def test_a_module_that_is_not_there(code: str) -> None:
    error = refused(THIS, StartRequest(code, None, modules=["distributed.cli.dask_worker", "no_such_module"]))
    assert error.reason == "ModuleNotFoundError: No module named 'no_such_module'"
    assert "Traceback" in error.output


def test_a_worker_class_that_does_not_unpickle(code: str, worker: Callable[..., bytes], tmp_path: Path) -> None:
    options = worker()
    (tmp_path / "some_workers.py").write_text("")
    assert "Quiet" in refused(THIS, StartRequest(code, None, options)).reason


def test_a_preload_that_is_not_there(code: str, worker: Callable[..., bytes]) -> None:
    error = refused(THIS, StartRequest(code, None, worker(kwargs={"preload": ["json", "no_such_preload"]})))
    assert "'no_such_preload'" in error.reason


def test_an_option_that_its_dask_does_not_know(code: str, worker: Callable[..., bytes]) -> None:
    given = {"class": Worker, "kwargs": {"nthreads": 1, "option_of_tomorrow": 1}}
    error = refused(THIS, StartRequest(code, None, worker(**given)))
    assert error.reason == "TypeError: the Worker of this environment's Dask does not know option_of_tomorrow"


def test_a_scheduler_plugin_that_does_not_load(code: str) -> None:
    plugin = b"cno_such_module\nPlugin\n)R."
    error = refused(THIS, StartRequest(code, None, plugins=[("the user's", plugin)]))
    assert 'the plugin "the user\'s" does not load' in error.reason
    assert "no_such_module" in error.reason


def test_a_worker_that_does_not_start(code: str, worker: Callable[..., bytes]) -> None:
    async def main() -> None:
        for kind, named in (("Broken", "no scheduler in sight"), ("Crashing", "exit code 7 while it started")):
            standby = await Standby.start(THIS, StartRequest(code, None, worker(kind)), TIMEOUT_S)
            with pytest.raises(StartError, match=named):
                await standby.run()
            await standby.discard()

    asyncio.run(main())


# -- the parent dies

PARENT = """
import asyncio, os, sys
from pathlib import Path
from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.standby import Standby, StartRequest

async def main(code, options, run):
    interpreter = Interpreter(None, sys.prefix, sys.executable, dict(os.environ))
    request = StartRequest(code, None, Path(options).read_bytes())
    standby = await Standby.start(interpreter, request, 60)
    if run == "running":
        await standby.run()
    print(standby.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_it_ends_with_its_parent(state: str, code: str, worker: Callable[..., bytes], tmp_path: Path) -> None:
    """However the parent ends: nobody is left to tell it."""
    (tmp_path / "options").write_bytes(worker("Stubborn"))
    command = [sys.executable, "-c", textwrap.dedent(PARENT), code, str(tmp_path / "options"), state]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([code, str(tmp_path)])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
    eventually(lambda: is_gone(pid), "the child ends")


def test_exits_in_words() -> None:
    assert exit_text(0) == "exit code 0"
    assert exit_text(-9) == "signal SIGKILL"
    assert exit_text(-250) == "exit code -250"


# -- byte code of ours


def started(code: str, **variables: str) -> None:
    """Start a standby, and end it."""

    async def main() -> None:
        interpreter = THIS._replace(environ={**THIS.environ, **variables})
        await (await Standby.start(interpreter, StartRequest(code, None), TIMEOUT_S)).discard()

    asyncio.run(main())


def test_our_code_is_compiled_once_and_for_all(code: str) -> None:
    started(code, PYTHONDONTWRITEBYTECODE="1")
    sources = {path.stem for path in Path(code).rglob("*.py")}
    compiled = list(Path(code).rglob("*.pyc"))
    assert {path.name.split(".")[0] for path in compiled} == sources
    at = {path: path.stat().st_mtime_ns for path in compiled}
    started(code)
    assert {path: path.stat().st_mtime_ns for path in Path(code).rglob("*.pyc")} == at


def test_regular_expressions_are_kept_beside_our_code(code: str) -> None:
    started(code)
    (kept,) = Path(code).glob("compiled-*")
    written = kept.stat().st_mtime_ns
    started(code)
    assert [path.stat().st_mtime_ns for path in Path(code).glob("compiled-*")] == [written]


def test_byte_code_that_is_cut_short_is_not_kept(code: str) -> None:
    program = (
        "import resource, sys; sys.dont_write_bytecode = True; sys.path[:0] = [sys.argv[1]]\n"
        "from worker_bootstrap.quick_import import compile_ours\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "compile_ours(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", program, code], check=True)
    compiled = [path.name for path in Path(code).rglob("__pycache__/*")]
    assert len(compiled) < len(list(Path(code).rglob("*.py")))
    assert all(name.endswith(".pyc") for name in compiled)
    started(code)


def test_a_stub_on_a_full_disk_leaves_no_byte_code_cut_short(code: str) -> None:
    """Whoever starts it may let Python write byte code; Python itself does not look whether that was written whole."""
    program = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    allowed = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    here, there = socket.socketpair()
    with here, there:
        command = [sys.executable, "-c", program, sys.executable, "-c", STUB, str(there.fileno()), code]
        with subprocess.Popen(command, env=allowed, pass_fds=(there.fileno(),)) as process:
            request = {
                "lease": None,
                "modules": [],
                "checks_command": False,
                "argv": ["x"],
                "sys_path": [],
                "plugins": [],
                "worker": None,
            }
            data = pickle.dumps({**request, "stderr": 2})
            here.sendall(HEADER.pack(len(data)) + data)
            assert b"ready" in here.recv(4096)
            process.kill()
    whole = len(list(Path(code).rglob("*.pyc")))
    assert whole < len(list(Path(code).rglob("*.py")))
    started(code)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_code_in_a_store_of_somebody_else_is_left_as_it_is(code: str) -> None:
    package = Path(code, "worker_bootstrap")
    package.chmod(0o555)
    try:
        started(code)
        assert not list(package.rglob("*.pyc"))
    finally:
        package.chmod(0o755)
