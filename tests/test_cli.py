"""The command line on real environments and a real cluster."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from envship.cli import main
from envship.environment import Environment
from worker_bootstrap.store import Store

from .cluster import SWAP_MARKS, TLS_FOLDER, Cluster, Prefixes, eventually, variant
from .environments import tiny_environment
from .guard import marked

pytestmark = SWAP_MARKS


@pytest.fixture(autouse=True)
def users_machine(client_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVSHIP_STORE", str(client_store.layout.root))
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)


def envship(*arguments: object, code: int = 0) -> Result:
    """Run a command; it must end with *code*, and never with a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def envship_json(*arguments: object) -> Any:
    return json.loads(envship(*arguments, "--json").stdout)


# -- environments


def test_pack_saves_a_bundle_that_show_reads(prefixes: Prefixes, packed: Environment, tmp_path: Path) -> None:
    """The same environment, however it is named: prefix, bundle, id, start of the id."""
    bundle = tmp_path / "mine.envship"
    told = envship_json("pack", prefixes.mine, "-o", bundle)
    assert told["id"] == packed.id
    assert told["size_bytes"] == packed.nbytes
    assert told["bundle_bytes"] == bundle.stat().st_size > 0
    fresh = tmp_path / "store"
    assert envship_json("show", bundle, "--store", fresh)["id"] == packed.id
    assert envship_json("show", packed.id, "--store", fresh)["id"] == packed.id
    assert envship_json("show", packed.id[:12])["id"] == packed.id


def test_show_lists_packages_by_size(packed: Environment) -> None:
    told = envship_json("show", packed.id)
    sizes = [package["size_bytes"] for package in told["packages"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == told["size_bytes"]
    assert {"numpy", "onlyhere"} <= {package["name"] for package in told["packages"]}
    text = envship("show", packed.id).stdout
    assert packed.id in text
    assert "numpy" in text
    assert "onlyhere" not in text  # far too small to be among the first
    assert "onlyhere" in envship("show", packed.id, "--all").stdout


def test_pack_says_what_it_made(prefixes: Prefixes, packed: Environment) -> None:
    text = envship("pack", prefixes.mine).stdout
    assert f"environment  {packed.id}" in text
    assert f"python {packed.python}" in text


@pytest.mark.parametrize("command", [["pack"], ["show"]])
def test_what_is_no_environment_is_refused_with_a_message(command: list[str], tmp_path: Path) -> None:
    result = envship(*command, tmp_path, code=1)
    assert result.stderr.startswith("Error: ")
    assert str(tmp_path) in result.stderr


def test_damaged_bundle_is_refused_with_a_message(packed: Environment, tmp_path: Path) -> None:
    bundle = packed.save(tmp_path / "mine.envship")
    with open(bundle, "r+b") as file:
        file.truncate(bundle.stat().st_size // 2)
    assert str(bundle) in envship("show", bundle, "--store", tmp_path / "store", code=1).stderr


# -- clusters


@pytest.fixture(scope="module")
def cluster(base_venv: Path, lab: Path, warm_stores: Path) -> Iterator[Cluster]:
    with Cluster(base_venv, lab / "cli", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("nanny")
        with cluster.client(workers=1):
            pass
        yield cluster


def test_use_status_and_reset_move_a_cluster(cluster: Cluster, packed: Environment, prefixes: Prefixes) -> None:
    """With a scheduler's address or its file; what status says before, in between and afterwards."""
    at = ("--scheduler", cluster.address)
    assert envship_json("status", *at)["target_id"] is None
    moved = envship("use", prefixes.mine, "--scheduler-file", cluster.folder / "scheduler.json")
    assert f"from the base environment to environment {packed.id[:16]}" in moved.stdout
    told = envship_json("status", *at)
    assert told["target_id"] == packed.id
    assert [worker["environment_id"] for worker in told["workers"].values()] == [packed.id]
    text = envship("status", *at).stdout
    assert "1 of 1 worker in the environment" in text
    assert str(cluster.store("a")) in text
    assert envship_json("reset", *at)["environment_id"] is None
    assert envship_json("status", *at)["scheduler"]["environment_id"] is None


def test_stage_brings_a_bundle_to_every_machine_and_moves_nobody(
    cluster: Cluster, client_store: Store, tmp_path: Path
) -> None:
    store = Store(tmp_path / "packed")
    environment_id = tiny_environment(store, {"lib/data": b"nobody else has this"})
    bundle = Environment(store.read_manifest(environment_id), store).save(tmp_path / "it.envship")
    at = ("--scheduler", cluster.address)
    before = envship_json("status", *at)
    told = envship_json("stage", bundle, *at)
    assert (told["environment_id"], told["hosts"]) == (environment_id, 1)
    assert Store(cluster.store("a")).built(environment_id) is not None
    after = envship_json("status", *at)
    assert after["target_id"] is None
    assert [worker["pid"] for worker in after["workers"].values()] == [
        worker["pid"] for worker in before["workers"].values()
    ]
    assert "is ready on 1 host" in envship("stage", bundle, *at).stdout


@pytest.mark.heavy
def test_use_goes_on_in_spite_of_versions_if_it_is_told_to(
    cluster: Cluster, packed: Environment, client_store: Store
) -> None:
    other = variant(client_store, packed.manifest, versions={"dask": "2000.1.0"})
    at = ("--scheduler", cluster.address)
    assert "2000.1.0" in envship("use", other, *at, code=1).stderr
    assert envship_json("status", *at)["target_id"] is None
    assert envship_json("use", other, *at, "--ignore-versions")["environment_id"] == other
    told = envship_json("status", *at)
    assert [worker["environment_id"] for worker in told["workers"].values()] == [other]
    envship("reset", *at)


@pytest.mark.parametrize("command", [["use"], ["reset"]])
@pytest.mark.parametrize("timeout", ["soon", "", "0s", "-5", "inf", "nan", "9999999999999h"])
def test_a_timeout_that_is_none_is_refused_before_anybody_is_asked(command: list[str], timeout: str) -> None:
    refused = envship(*command, "-s", "tcp://127.0.0.1:9", f"--timeout={timeout}", code=2).stderr
    assert "--timeout" in refused
    assert timeout.strip("-") in refused


def test_a_commit_that_takes_longer_than_it_may_is_taken_back(
    cluster: Cluster, packed: Environment, prefixes: Prefixes
) -> None:
    at = ("--scheduler", cluster.address)
    told = envship("use", prefixes.mine, *at, "--timeout", "1ms", code=1).stderr
    assert "moved back" in told
    assert envship_json("status", *at)["target_id"] is None
    assert envship_json("use", prefixes.mine, *at, "--timeout", "100s")["environment_id"] == packed.id
    assert envship_json("reset", *at, "--timeout", "1m")["environment_id"] is None


def test_failure_on_the_cluster_is_a_message(cluster: Cluster, tmp_path: Path) -> None:
    unknown = "0" * 64
    assert unknown[:16] in envship("use", unknown, "-s", cluster.address, code=1).stderr


def test_certificates_are_used(base_venv: Path, lab: Path, warm_stores: Path) -> None:
    with Cluster(base_venv, lab / "cli-tls", stores=warm_stores, tls=True) as cluster:
        cluster.start_scheduler()
        cert, key = TLS_FOLDER / "cert.pem", TLS_FOLDER / "key.pem"
        told = envship_json(
            "status", "-s", cluster.address, "--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", key
        )
        assert told["scheduler"]["address"].startswith("tls://")


def test_a_cluster_must_be_named() -> None:
    """And none is started by accident."""
    assert "--scheduler" in envship("status", code=2).stderr


def test_nobody_at_the_address_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from envship.cli import cluster

    monkeypatch.setattr(cluster, "CONNECT_TIMEOUT_S", 1)
    with socket.socket() as taken:  # bound and not listening, so that nobody else gets this port meanwhile
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert f"no scheduler answers at {address}" in envship("status", "-s", address, code=1).stderr


# -- processes


def test_interrupt_ends_with_130_and_no_traceback() -> None:
    """Ctrl-C while a scheduler keeps us waiting."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "envship.cli", "status", "-s", address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "Interrupted." in errors


@pytest.mark.heavy
def test_demo_moves_a_cluster_there_and_back_and_leaves_nothing() -> None:
    """No file, no process; and it says what it took."""
    mark = f"MARK_OF_A_TEST={uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="es-") as folder:
        command = ["env", mark, f"TMPDIR={folder}", sys.executable, "-m", "envship.cli", "demo"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
            # All that it starts inherit the mark.
            eventually(lambda: "dask worker" in " ".join(marked(mark).values()), "the demo's workers", timeout_s=180)
            output, errors = demo.communicate(timeout=240)
        assert demo.returncode == 0, output + errors
        assert errors == ""
        assert list(Path(folder).iterdir()) == []
    eventually(lambda: not marked(mark), "every process of the demo has ended", timeout_s=5)
    failure, success = "✗ ModuleNotFoundError: No module named 'teapot'", "✓ 3 cups of tea"
    assert re.findall(f"{failure}|{success}", output) == [failure, success, failure, success]
    assert re.search(r"moved from environment [0-9a-f]{16} to the base environment", output)
    seconds, size = r"(\d+ min )?[\d.]+ s", r"[\d.]+ MiB"
    for row in (
        rf"base → mine +{seconds} +{seconds} +{size} +moved too",
        rf"mine → base +{seconds} +{seconds} +nothing +moved too",
        rf"base → mine again +{seconds} +{seconds} +nothing +moved too",
        rf"mine → mine +{seconds} +none +nothing +stayed",
    ):
        assert re.search(row, output), row
