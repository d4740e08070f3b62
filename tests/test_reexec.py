"""What is written down before a process is replaced, and what if it is not."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from worker_bootstrap import carry, reexec
from worker_bootstrap.digest import EnvironmentId, digest_of
from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.launch import Launch
from worker_bootstrap.lock import Lease
from worker_bootstrap.reexec import ORDERS_VARIABLE, STATE_VARIABLE, Arrival, Orders, dialled, execute, pinned
from worker_bootstrap.store import Store

NAME = EnvironmentId(digest_of(b"environment"))
BASE = Interpreter(None, sys.prefix, sys.executable, dict(os.environ))


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ([], ["--port", "4000"]),
        (["--port", "0"], ["--port", "4000"]),
        (["--port=0"], ["--port", "4000"]),
        (["--port", "4000"], []),
        (["--port=4000"], []),
        (["--port", "0", "--port", "4000"], []),
        (["--port", "0,8786", "--protocol", "tcp,ws"], []),
        (["--host", "10.0.0.1"], ["--port", "4000"]),
        (["--host", "10.0.0.1:4000"], []),
        (["--host", "tcp://10.0.0.1:0"], ["--port", "4000"]),
    ],
)
def test_a_scheduler_comes_back_at_its_port(arguments: Sequence[str], extra: list[str]) -> None:
    assert pinned(Launch("scheduler", "dask", tuple(arguments)), 4000, None) == extra


def test_the_port_that_dask_takes_by_itself_need_not_be_named() -> None:
    assert pinned(Launch("scheduler", "dask", ()), 8786, None) == []


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ([], ":5000"),
        (["--dashboard-address", ":0"], ":5000"),
        (["--dashboard-address", "127.0.0.1:0"], "127.0.0.1:5000"),
        (["--dashboard-address=127.0.0.1:8787"], "127.0.0.1:5000"),
    ],
)
def test_a_scheduler_comes_back_with_its_dashboard(arguments: Sequence[str], address: str) -> None:
    launch = Launch("scheduler", "dask", (*arguments, "--port", "4000"))
    assert pinned(launch, 4000, 5000) == ["--dashboard-address", address]


def test_orders_survive_the_file() -> None:
    back = ("/python", {"A": "b"}, "/old")
    orders = Orders("/code", ["--port", "1"], ("10.0.0.1", 8786), 5.0, 6.0, "/lease", back, [7])
    again = Orders(**json.loads(json.dumps(orders._asdict())))
    assert again._replace(wait_for=("10.0.0.1", 8786), fallback=back) == orders


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://10.0.0.1:8786", ("10.0.0.1", 8786)),
        ("tls://[::1]:8786", ("::1", 8786)),
        ("10.0.0.1:8786", ("10.0.0.1", 8786)),
    ],
)
def test_where_to_dial(address: str, expected: tuple[str, int]) -> None:
    assert dialled(address) == expected


def test_a_process_that_cannot_be_replaced_goes_on(tmp_path: Path) -> None:
    """And leaves no orders behind."""
    missing = Interpreter(NAME, "/e", str(tmp_path / "no-python"), {})
    with pytest.raises(FileNotFoundError):
        execute(missing, BASE, Launch("worker", "dask", ()), Orders("/code"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert ORDERS_VARIABLE not in os.environ


def test_what_is_left_for_the_stub_is_private_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def look(python: str, argv: list[str], environ: dict[str, str]) -> None:
        path = Path(environ[ORDERS_VARIABLE])
        seen.update(python=python, argv=argv, environ=environ, mode=stat.S_IMODE(path.stat().st_mode))
        seen["orders"] = json.loads(path.read_text())
        raise OSError("seen enough")

    monkeypatch.setattr(os, "execve", look)
    monkeypatch.setenv(STATE_VARIABLE, "/state")
    monkeypatch.setenv("OF_THE_OLD_ENVIRONMENT", "1")
    launch = Launch("worker", "/base/bin/dask", ("tcp://s:1",))
    with pytest.raises(OSError, match="seen enough"):
        execute(Interpreter(NAME, "/e", "/e/bin/python", {"A": "b"}), BASE, launch, Orders("/code", ["--x"]), tmp_path)
    assert seen["mode"] == 0o600
    assert seen["argv"][:2] == ["/e/bin/python", "-c"]
    assert seen["argv"][3:] == ["/code", "/base/bin/dask", "worker", "tcp://s:1"]
    assert seen["orders"]["extra"] == ["--x"]
    assert seen["environ"]["A"] == "b"
    assert seen["environ"][STATE_VARIABLE] == "/state"
    assert "OF_THE_OLD_ENVIRONMENT" not in seen["environ"]


def test_leases_go_along_and_end_on_arrival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a process that goes from A to B would keep A from being evicted for as long as it lives."""
    seen: dict[str, Any] = {}

    def look(python: str, argv: list[str], environ: dict[str, str]) -> None:
        seen.update(json.loads(Path(environ[ORDERS_VARIABLE]).read_text()))
        seen["inheritable"] = [os.get_inheritable(handle) for handle in seen["inherited"]]
        raise OSError("seen enough")

    monkeypatch.setattr(os, "execve", look)
    lease = Lease(tmp_path / "lease")
    lease.hold()
    with pytest.raises(OSError, match="seen enough"):
        execute(
            Interpreter(NAME, "/e", "/e/bin/python", {}), BASE, Launch("worker", "dask", ()), Orders("/c"), tmp_path
        )
    assert seen["inheritable"] == [True]
    monkeypatch.setattr(Arrival, "done", False)
    monkeypatch.setattr(Arrival, "inherited", [os.dup(handle) for handle in seen["inherited"]])
    lease.release()
    assert not Lease(lease.path).is_free(), "the successor still holds it"
    Arrival.arrive()
    assert Lease(lease.path).is_free()
    assert Arrival.done


def test_waiting_ends_when_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        reexec._wait_for(host, port, timeout_s=60)


# -- the stub

REPLACE = """
import os, sys
from pathlib import Path
from worker_bootstrap.interpreter import Interpreter
from worker_bootstrap.launch import recognise
from worker_bootstrap.reexec import Orders, execute

here = Interpreter(None, sys.prefix, sys.executable, dict(os.environ))
there = Interpreter("ab" * 32, sys.prefix, sys.executable, {**os.environ, "ENVSHIP_ENVIRONMENT": "ab" * 32, **BROKEN})
orders = Orders(CODE, EXTRA, fallback=(here.python, dict(here.environ), None))
execute(there, here, recognise(["dask", "worker", *ARGUMENTS]), orders, Path(FOLDER))
"""


def run_replaced(
    code: str, folder: Path, arguments: list[str], extra: list[str], broken: dict[str, str], path: str = ""
) -> str:
    """What ``dask worker`` prints in a process that replaced itself; *broken* are variables of the new one."""
    values = {"CODE": code, "FOLDER": str(folder), "ARGUMENTS": arguments, "EXTRA": extra, "BROKEN": broken}
    header = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([path, code])}
    script = header + textwrap.dedent(REPLACE)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environ, timeout=100, check=False
    )
    assert list(folder.glob("*.orders")) == [], "the orders are read once"
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def test_the_command_runs_in_the_new_process(store: Store) -> None:
    code = str(carry.publish(store.layout))
    shown = run_replaced(code, store.layout.tmp, [], ["--help"], {})
    assert shown.startswith("0\n")
    assert "Usage: dask worker" in shown


SABOTAGE = """
import os, sys
if "SABOTAGE" in os.environ:
    sys.modules["distributed"] = None
elif "ENVSHIP_FAILED" in os.environ:
    print("back from", os.environ["ENVSHIP_FAILED"], flush=True)
"""


def test_a_process_whose_environment_does_not_work_goes_back(store: Store, tmp_path: Path) -> None:
    """With the same arguments, and remembering where it failed."""
    code = str(carry.publish(store.layout))
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    shown = run_replaced(code, store.layout.tmp, [], ["--help"], {"SABOTAGE": "1"}, path=str(tmp_path))
    assert shown.startswith("0\n")
    assert "does not work for `dask worker`" in shown
    assert "back from abab" in shown
    assert "Usage: dask worker" in shown
