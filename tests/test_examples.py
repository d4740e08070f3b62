"""The examples do what they say, from an environment into which envship was installed as users install it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from envship.cli.machines import bare_environ, make_venv

CHECKOUT = Path(__file__).parent.parent
EXAMPLES = CHECKOUT / "examples"
RUN_NOTEBOOK = """
import sys
import nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=240, kernel_name="python3").execute()
nbformat.write(book, sys.argv[2])
"""

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def users_venv(lab: Path) -> Path:
    """Not editable, with all that a notebook needs."""
    return make_venv(lab / "user", [CHECKOUT, "ipykernel", "nbclient"])


def run(prefix: Path, store: Path, *arguments: object) -> str:
    environ = {**bare_environ(), "ENVSHIP_STORE": str(store), "IPYTHONDIR": str(store.parent / "ipython")}
    command = [str(prefix / "bin" / "python"), *map(str, arguments)]
    done = subprocess.run(command, env=environ, cwd=store.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart_moves_there_and_back(users_venv: Path, lab: Path) -> None:
    prefixes = [
        line.removeprefix("tasks run in ")
        for line in run(users_venv, lab / "user-store", EXAMPLES / "quickstart.py").splitlines()
        if line.startswith("tasks run in ")
    ]
    assert prefixes[0] == prefixes[2] == str(users_venv)
    assert prefixes[1].startswith(str(lab / "user-store" / "envs"))


def test_notebook_shows_results_as_tables(users_venv: Path, lab: Path, tmp_path: Path) -> None:
    run(users_venv, lab / "user-store", "-c", RUN_NOTEBOOK, EXAMPLES / "quickstart.ipynb", tmp_path / "run.ipynb")
    outputs = [
        output
        for cell in json.loads((tmp_path / "run.ipynb").read_text())["cells"]
        for output in cell.get("outputs", ())
    ]
    assert not [output for output in outputs if output["output_type"] == "error"]
    tables = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    assert sum("The cluster moved from" in table for table in tables) == 2
    assert sum("already" in table for table in tables) == 1
