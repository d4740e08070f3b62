"""Results: what the user reads, in a terminal and in a notebook."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from envship.result import (
    EnvironmentStatus,
    EnvironmentSummary,
    HostStatus,
    ProcessStatus,
    StagedResult,
    SwapResult,
    format_seconds,
)
from worker_bootstrap.digest import EnvironmentId

A = EnvironmentId("a" * 64)
B = EnvironmentId("b" * 64)

SWAP = SwapResult(
    environment_id=A,
    previous_id=None,
    scheduler_swapped=True,
    hosts=1,
    workers=2,
    uploaded_bytes=3 << 20,
    uploaded_chunks=12,
    seconds={"commit": 0.5, "pack": 0.2},
    total_s=1.25,
    downtime_s=0.31,
    lost_futures=2,
)


def status() -> EnvironmentStatus:
    scheduler = ProcessStatus("tcp://h:1", "scheduler", "host1", 10, None, "/opt/base", "3.11.7", False)
    moved = ProcessStatus("tcp://h:2", "alice", "host1", 11, A, "/s/envs/aaaa", "3.12.1", True)
    left = ProcessStatus("tcp://h:3", "<bob>", "host2", 12, None, "/opt/base", "3.11.7", True)
    host = HostStatus("host1", "node-1", "/s", (A, B), (B,), 30 << 20, 5 << 30)
    known = {A: EnvironmentSummary(packages=3, size_bytes=1)}
    return EnvironmentStatus(A, known, scheduler, {"w1": moved, "w2": left}, {"host1": host})


def test_swap_says_from_where_to_where_how_long_and_what_it_cost() -> None:
    text = repr(SWAP)
    assert (
        text.splitlines()[0] == "The cluster moved from the base environment to environment aaaaaaaaaaaaaaaa in 1.25 s"
    )
    assert "2 workers on 1 host, and the scheduler" in text
    assert "3.00 MiB in 12 chunks" in text
    assert "pack 0.20 s, commit 0.50 s" in text  # in the order of the phases, not of the mapping
    assert "downtime  0.31 s" in text
    assert "2 futures cancelled" in text


def test_swap_that_changed_nothing_says_so() -> None:
    text = repr(SwapResult(A, A, False, 1, 2, 0, 0, {}, 0.02, 0.0, changed=False))
    assert "already" in text
    assert "uploaded  nothing" in text
    assert "downtime" not in text


def test_staged_says_where_it_is_ready() -> None:
    text = repr(StagedResult(A, 3, 0, 0, {"build": 100.0}, 125.0))
    assert "Environment aaaaaaaaaaaaaaaa is ready on 3 hosts after 2 min 5 s" in text


def test_status_shows_each_process_with_its_environment() -> None:
    """A worker that is not where it should be can be seen at a glance."""
    lines = repr(status()).splitlines()
    assert lines[0] == "1 of 2 workers in the environment aaaaaaaaaaaaaaaa"
    rows = {line.split("  ")[0]: line for line in lines}
    assert "base" in rows["scheduler"]
    assert "aaaaaaaaaaaaaaaa" in rows["worker alice"]
    assert "node-1" in rows["worker alice"]
    assert "base" in rows["worker <bob>"]
    assert "bbbbbbbbbbbbbbbb (30.00 MiB)" in rows["node-1"]
    assert not status().in_target


def test_notebook_form_escapes_what_users_named() -> None:
    for shown in (SWAP, status(), StagedResult(A, 1, 0, 0)):
        assert "<table>" in shown._repr_html_()
    assert "worker &lt;bob&gt;" in status()._repr_html_()


@pytest.mark.parametrize("value", [SWAP, status(), StagedResult(A, 1, 2, 3)])
def test_results_are_frozen_values_that_pickle(value: SwapResult | EnvironmentStatus | StagedResult) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.344, "0.34 s"),
        (9.996, "10.0 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (3600, "60 min 0 s"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
