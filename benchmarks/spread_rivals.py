"""What people would do instead of envship to bring one file to every host of a `benchmarks.lab`.

Each function returns the seconds until the last host has the file. Dask's own ways are in `benchmarks.spread_client`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab import Lab, LabError, LabTimeout

PIECE_BYTES = 1 << 20
TRACKER_PORT = 6969
RAY_PORT = 6379
TIMEOUT_S = 300.0
"""A rival that is not done by then is ended, and counts as if it were."""


def copy_to_each(lab: Lab, hosts: Sequence[str], file: Path) -> float:
    """``scp`` from the client's machine to each host, to all of them at the same time."""
    folder = lab.folder / "ssh"
    folder.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    lab.run("keygen", "client", ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], os.environ)
    shutil.copy(folder / "key.pub", folder / "authorized")
    for path in (folder / "key", folder / "authorized"):
        path.chmod(0o600)
    quiet = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    login = ["-i", str(folder / "key"), *quiet]
    for name in hosts:
        options = [
            "StrictModes=no",
            "UsePAM=no",
            "Subsystem=sftp internal-sftp",
            f"AuthorizedKeysFile={folder / 'authorized'}",
        ]
        settings = [part for option in options for part in ("-o", option)]
        keys = ["-h", str(folder / "key"), "-f", "/dev/null", *settings]
        lab.start(f"sshd-{name}", name, [shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", *keys], os.environ)
    for name in hosts:
        _until_listening(lab, ["ssh", *login, f"root@{lab.address(name)}", "true"])
    began = time.time()
    copies = {}
    for name in hosts:
        target = f"root@{lab.address(name)}:{lab.folder / name / 'copy'}"
        (lab.folder / name).mkdir(exist_ok=True)
        copies[name] = lab.start(f"scp-{name}", "client", ["scp", "-q", *login, file, target], os.environ)
    for name, process in copies.items():
        lab.wait(f"scp-{name}", process, TIMEOUT_S)
    seconds = time.time() - began
    lab.stop(*(f"sshd-{name}" for name in hosts))
    for name in hosts:
        (lab.folder / name / "copy").unlink()
    return seconds


def torrent(lab: Lab, hosts: Sequence[str], file: Path) -> float:
    """BitTorrent: ``aria2c`` on every host and on the client's machine, which `torrent_tracker` brings together."""
    description = lab.folder / "file.torrent"
    address = lab.address("client")
    description.write_bytes(_metainfo(file, f"http://{address}:{TRACKER_PORT}/announce"))
    program = Path(__file__).with_name("torrent_tracker.py")
    lab.start("tracker", "client", [sys.executable, program, address, str(TRACKER_PORT)], os.environ)
    hook = lab.folder / "done"
    hook.write_text('#!/bin/sh\ntouch "$(dirname "$3").complete"\n')
    hook.chmod(0o755)
    common = ["--enable-dht=false", "--bt-tracker-interval=2", "--file-allocation=none", "--seed-ratio=0.0"]
    common += ["--check-certificate=false"]
    seed = ["aria2c", *common, f"--dir={file.parent}", "--check-integrity=true", description]
    lab.start("seed", "client", seed, os.environ)
    time.sleep(5)  # it hashes the whole file before it serves
    began = time.time()
    for name in hosts:
        folder = lab.folder / name / "torrent"
        folder.mkdir(parents=True)
        lab.start(
            f"aria-{name}",
            name,
            ["aria2c", *common, f"--dir={folder}", f"--on-bt-download-complete={hook}", description],
            os.environ,
        )
    waiting = {lab.folder / name / "torrent.complete" for name in hosts}
    while waiting:
        waiting = {mark for mark in waiting if not mark.exists()}
        if time.time() - began > TIMEOUT_S:
            raise LabTimeout(f"BitTorrent is not done after {TIMEOUT_S:.0f} s")
        time.sleep(0.05)
    seconds = time.time() - began
    lab.stop("seed", "tracker", *(f"aria-{name}" for name in hosts))
    for name in hosts:
        shutil.rmtree(lab.folder / name / "torrent")
    return seconds


def ray_tree(lab: Lab, hosts: Sequence[str], file: Path, python: Path) -> float:
    """Ray's object store, asked for the file in stages that double: see `benchmarks.ray_tree`."""
    program = python.with_name("ray")
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # the paths of sockets may have 107 bytes
    environ = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    common = ["--object-store-memory=2000000000", "--num-cpus=1", "--disable-usage-stats", "--block"]
    client = lab.address("client")
    head = ["--head", f"--port={RAY_PORT}", f"--temp-dir={temporary}", "--include-dashboard=false"]
    try:
        lab.start("ray-client", "client", [program, "start", *head, f"--node-ip-address={client}", *common], environ)
        time.sleep(5)  # the others give up where there is no head
        joining = [program, "start", f"--address={client}:{RAY_PORT}", *common]
        for name in hosts:
            lab.start(f"ray-{name}", name, [*joining, f"--node-ip-address={lab.address(name)}"], environ)
        driver = Path(__file__).with_name("ray_tree.py")
        addresses = [lab.address(name) for name in hosts]
        command = [str(python), str(driver), f"{client}:{RAY_PORT}", str(file), *addresses]
        printed = lab.run("ray", "client", command, environ, TIMEOUT_S)
        lab.stop("ray-client", *(f"ray-{name}" for name in hosts))
        return float(json.loads(printed.strip().splitlines()[-1])["seconds"])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _until_listening(lab: Lab, command: Sequence[str]) -> None:
    deadline = time.time() + 30
    while True:
        try:
            lab.run("ssh", "client", command, os.environ)
            return
        except LabError:
            if time.time() > deadline:
                raise
            time.sleep(0.2)


def _metainfo(file: Path, tracker: str) -> bytes:
    """A torrent of one file. Source: BEP 3."""
    pieces = []
    with open(file, "rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            pieces.append(hashlib.sha1(piece, usedforsecurity=False).digest())
    fields = {"length": file.stat().st_size, "name": file.name, "piece length": PIECE_BYTES, "pieces": b"".join(pieces)}
    return b"d8:announce" + _bencoded(tracker) + b"4:info" + _bencoded(fields) + b"e"


def _bencoded(value: object) -> bytes:
    if isinstance(value, dict):
        return b"d" + b"".join(_bencoded(key) + _bencoded(value[key]) for key in sorted(value)) + b"e"
    if isinstance(value, int):
        return b"i%de" % value
    data = value if isinstance(value, bytes) else str(value).encode()
    return b"%d:%s" % (len(data), data)
