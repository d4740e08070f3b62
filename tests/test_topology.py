"""Where hosts stand: their own word, the user's patterns, and the machine that containers share."""

from __future__ import annotations

from pathlib import Path

import dask
import pytest

from envship import config
from worker_bootstrap import topology
from worker_bootstrap.errors import SettingInvalid
from worker_bootstrap.topology import machine, own_place, place_of


def test_a_machine_says_where_it_stands() -> None:
    with dask.config.set({"envship.topology": "zurich/rack-3"}):
        assert own_place() == ["zurich", "rack-3"]
        assert config.topology() == {}, "which says nothing of others"


def test_what_nobody_places_is_at_one_unnamed_site() -> None:
    assert place_of([], "m1", [], {})[0] == place_of([], "m2", [], {})[0]
    assert place_of([], "m1", [], {}) != place_of([], "m2", [], {})


@pytest.mark.parametrize("name", ["node17", "10.0.1.9", "gpu-worker", "rack-b"])
def test_patterns_find_hosts_addresses_workers_and_resources(name: str) -> None:
    patterns = {"zurich/a": ["other*"], "zurich/b": ["node1*", "10.0.1.*", "gpu-*", "rack-b"]}
    assert place_of(["own"], "m", ["something", name], patterns) == ("zurich", "b", "m")
    assert place_of(["own"], "m", ["something"], patterns) == ("own", "m")


def test_containers_of_one_machine_agree_on_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot_id").write_text("1234\n")
    monkeypatch.setattr(topology, "BOOT_ID", tmp_path / "boot_id")
    assert machine("container-a") == machine("container-b") == "1234"
    monkeypatch.setattr(topology, "BOOT_ID", tmp_path / "absent")
    assert machine("container-a") == "container-a"


@pytest.mark.parametrize("value", [7, ["zurich"], {"zurich": "node*"}, {7: ["node*"]}])
def test_what_is_no_topology_is_refused(value: object) -> None:
    with dask.config.set({"envship.topology": value}), pytest.raises(SettingInvalid, match="topology"):
        config.topology()
        own_place()
