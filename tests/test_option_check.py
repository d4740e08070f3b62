"""Command lines that a Dask understands, and others."""

from __future__ import annotations

from pathlib import Path

import dask
import pytest

from worker_bootstrap.launch import recognise
from worker_bootstrap.option_check import check_command

ADDRESS = "tcp://10.0.0.1:8786"


@pytest.mark.parametrize(
    "argv",
    [
        ["dask", "worker", ADDRESS, "--nthreads", "2", "--resources", "GPU=1", "--no-nanny"],
        ["dask", "worker", ADDRESS, "--preload", "json", "--preload", "pickle", "--option", "of-a-preload"],
        ["dask", "worker", "--scheduler-file", "/nowhere/at-all.json"],
        ["dask", "scheduler", "--port", "0", "--no-dashboard"],
        ["dask", "spec", ADDRESS, "--spec", "{}"],
    ],
)
def test_what_dask_understands(argv: list[str]) -> None:
    launch = recognise(argv)
    assert launch is not None
    check_command(launch)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["dask", "worker", ADDRESS, "--option-of-tomorrow", "3"], "does not know --option-of-tomorrow 3"),
        (["dask", "scheduler", "--option-of-tomorrow"], "does not know --option-of-tomorrow"),
        (["dask", "worker", ADDRESS, "--nthreads"], "requires an argument"),
        (["dask", "worker", ADDRESS, "--preload", "no_such_module"], "'no_such_module' is to be preloaded"),
        (["dask", "scheduler", "--preload", "/no/such/file.py"], "'/no/such/file.py' is to be preloaded"),
    ],
)
def test_what_dask_would_refuse(argv: list[str], complaint: str) -> None:
    launch = recognise(argv)
    assert launch is not None
    with pytest.raises(Exception, match=complaint):
        check_command(launch)


def test_preloads_of_the_configuration_count() -> None:
    launch = recognise(["dask", "worker", ADDRESS])
    assert launch is not None
    with (
        dask.config.set({"distributed.worker.preload": ["no_such_module"]}),
        pytest.raises(ModuleNotFoundError, match="no_such_module"),
    ):
        check_command(launch)


def test_what_is_preloaded_is_not_run(tmp_path: Path) -> None:
    program = tmp_path / "preloaded.py"
    program.write_text("raise SystemExit('it was run')")
    launch = recognise(["dask", "worker", ADDRESS, "--preload", str(program)])
    assert launch is not None
    check_command(launch)
