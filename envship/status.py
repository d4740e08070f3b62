"""The coordinator's account of the cluster as an `EnvironmentStatus`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from envship.result import EnvironmentStatus, HostStatus, ProcessStatus


def status_of(raw: Mapping[str, Any]) -> EnvironmentStatus:
    """The status in *raw*, which is `Coordinator.status`'s answer."""
    agents: Mapping[str, Any] = raw["agents"]
    own = agents[raw["scheduler_address"]]
    return EnvironmentStatus(
        target_id=raw["target"],
        environments=raw["environments"],
        scheduler=ProcessStatus(
            address=raw["scheduler_address"],
            name="scheduler",
            host_id=own["host_id"],
            pid=own["pid"],
            environment_id=own["environment_id"],
            prefix=own["prefix"],
            python=own["python"],
            nanny=False,
        ),
        workers={address: _worker(address, worker, agents) for address, worker in raw["workers"].items()},
        hosts={identity["host_id"]: _host(identity["host_id"], raw) for identity in agents.values()},
    )


def _worker(address: str, worker: Mapping[str, Any], agents: Mapping[str, Any]) -> ProcessStatus:
    agent = agents.get(worker.get("nanny") or address, {})
    return ProcessStatus(
        address=address,
        name=worker["name"],
        host_id=agent.get("host_id", ""),
        pid=worker.get("pid", 0),
        environment_id=worker.get("environment_id"),
        prefix=worker.get("prefix", ""),
        python=worker.get("python", ""),
        nanny=bool(worker.get("nanny")),
    )


def _host(host_id: str, raw: Mapping[str, Any]) -> HostStatus:
    members = [identity for identity in raw["agents"].values() if identity["host_id"] == host_id]
    account = raw["transfers"].get(host_id, {})
    warm = dict.fromkeys(name for member in members for name in member["warm"])
    return HostStatus(
        host_id=host_id,
        hostname=members[0]["hostname"],
        store=members[0]["store"],
        built=tuple(raw["built"].get(host_id, ())),
        warm=tuple(warm),
        warm_bytes=sum(member["warm_bytes"] for member in members),
        free_bytes=members[0]["free_bytes"],
        received=account.get("received", {}),
        served_bytes=account.get("served_bytes", 0),
        rate=account.get("rate", 0.0),
        left_out=account.get("blamed", {}),
    )
