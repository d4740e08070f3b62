"""What is shown while a real cluster moves: phases, bytes and chunks of every host, and at the end that it is done."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import dask
import pytest
from distributed import Client

import envship  # noqa: F401  adds the methods to the client
from envship.progress import Display, HostProgress, LinesFace

from .cluster import SWAP_MARKS, Cluster

if TYPE_CHECKING:
    from envship.environment import Environment

pytestmark = SWAP_MARKS


@pytest.fixture
def client(base_venv: Path, lab: Path, onlyhere: ModuleType) -> Iterator[Client]:
    """A client of a cluster on two hosts that hold nothing yet."""
    with Cluster(base_venv, lab / "progress") as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", host="b")
        with cluster.client(workers=2) as client:
            yield client


class Recorder(Display):
    """Shows nothing, and keeps what it was to show."""

    def __init__(self) -> None:
        super().__init__(None)
        self.updates: list[tuple[str, Mapping[str, HostProgress]]] = []

    def update(self, phase: str, hosts: Mapping[str, HostProgress], note: str = "") -> None:
        self.updates.append((phase, dict(hosts)))


def test_every_phase_and_host_is_shown(client: Client, packed: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr("envship.client.open_display", lambda enabled: recorder)
    with dask.config.set({"envship.rate-limit": "60 MB"}):  # so that there is something to be seen
        client.use_environment(packed, scheduler=False)
    phases = list(dict.fromkeys(phase for phase, _ in recorder.updates))
    assert phases[-3:] == ["prepare", "move", "done"]
    seen = {(host.label, host.state) for _, hosts in recorder.updates for host in hosts.values()}
    states = {state for label, state in seen if label != "this machine"}
    assert states >= {"fetching", "building", "starting", "ready"}
    details = [host.detail for _, hosts in recorder.updates for host in hosts.values()]
    assert any(re.fullmatch(r"[\d,]+ chunks to come, [\d.]+ MB/s from [12] sources?", detail) for detail in details)
    assert any(re.fullmatch(r"([\d,]+) of \1 chunks", detail) for detail in details), "the upload's end"
    fetching = [host for _, hosts in recorder.updates for host in hosts.values() if host.state == "fetching"]
    assert all(host.done_bytes <= host.total_bytes for host in fetching)
    last = recorder.updates[-1][1]
    assert [host.state for name, host in last.items() if name != "here"] == ["ready", "ready"]


@pytest.mark.heavy
def test_without_a_terminal_it_is_lines(
    base_venv: Path,
    tmp_path: Path,
    warm_stores: Path,
    packed: Environment,
    onlyhere: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("envship.client.open_display", lambda enabled: Display(LinesFace(), quiet_s=0.0))
    with Cluster(base_venv, tmp_path / "c", stores=warm_stores) as cluster:
        cluster.start_scheduler()
        cluster.start_worker("w1", host="a")
        cluster.start_worker("w2", host="b")
        with cluster.client(workers=2) as client:
            client.use_environment(packed, scheduler=False)
    said = capsys.readouterr().err
    assert re.search(r"^envship: (prepare|move): .* of 2 hosts ready", said, re.MULTILINE)
