"""Command lines of Dask's, and others."""

from __future__ import annotations

import importlib

import pytest

from worker_bootstrap.launch import Launch, recognise

ADDRESS = "tcp://10.0.0.1:8786"


@pytest.mark.parametrize(
    ("argv", "kind", "arguments"),
    [
        (["/env/bin/dask", "worker", ADDRESS, "--no-nanny"], "worker", (ADDRESS, "--no-nanny")),
        (["dask", "scheduler"], "scheduler", ()),
        (["/env/bin/dask", "spec", "--spec", "{}"], "spec", ("--spec", "{}")),
        (["/env/site-packages/dask/__main__.py", "worker", ADDRESS], "worker", (ADDRESS,)),
        (["/env/bin/dask-worker", ADDRESS], "worker", (ADDRESS,)),
        (["/env/bin/dask-scheduler", "--port", "0"], "scheduler", ("--port", "0")),
        (["/env/site-packages/distributed/cli/dask_worker.py", ADDRESS], "worker", (ADDRESS,)),
        (["/env/site-packages/distributed/cli/dask_spec.py"], "spec", ()),
        (["/env/bin/dask-scheduler", "worker"], "scheduler", ("worker",)),
    ],
)
def test_command_lines_of_dask_are_recognised(argv: list[str], kind: str, arguments: tuple[str, ...]) -> None:
    launch = recognise(argv)
    assert launch == Launch(kind, argv[0], arguments)
    assert launch.argv == argv
    assert hasattr(importlib.import_module(launch.module), "main")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        [""],
        ["-c", "worker"],
        ["dask"],
        ["/env/bin/dask", "config", "list"],
        ["/env/bin/dask", "--help"],
        ["/home/me/analysis.py", "worker"],
        ["/env/site-packages/ipykernel_launcher.py", "-f", "kernel.json"],
        ["/env/bin/dask-cuda-worker", ADDRESS],
        ["/env/site-packages/mine/__main__.py", "worker"],
        ["/env/bin/dask.py", "worker"],
    ],
)
def test_others_are_not(argv: list[str]) -> None:
    assert recognise(argv) is None
