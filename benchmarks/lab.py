"""A laboratory of network namespaces: hosts on one machine, each behind a link of a known rate.

One namespace holds the switch (a bridge); every host is a namespace of its own, joined to it by a pair of virtual
devices with ``tc tbf`` on both ends, so that each direction of each link carries *rate* and no more. Nothing outside of
the namespaces is touched: no address, route or rule of this machine. Needs Linux, root, and ``ip`` and ``tc``
(iproute2); `obstacle` says what is missing. All that is made is removed when the block ends, also by Ctrl-C or SIGTERM,
and what an earlier laboratory left behind that was killed outright is removed by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

PREFIX = "envship-lab"
SWITCH = "switch"
BURST_BYTES = 64 << 10
"""What may pass at once at full speed: one packet as the kernel hands it over, before it is cut for the wire."""
QUEUE_BYTES = 256 << 10
"""So much may wait for its turn; more is dropped, as by a switch whose buffer is full. A few milliseconds' worth of a
slow link holds too few packets for several connections: with 20 ms at 12 Mbit/s, one byte in twelve was sent twice."""
IPERF_SECONDS = 4
STOP_TIMEOUT_S = 10.0
POLL_S = 0.02


class LabError(RuntimeError):
    """A command or a process of the laboratory failed; the message holds what it printed."""


def obstacle(programs: Sequence[str] = ("ip", "tc", "iperf3")) -> str | None:
    """Why no laboratory can be made here, or None."""
    if os.uname().sysname != "Linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (packages iproute2 and iperf3)"
    tried = subprocess.run(["ip", "netns", "add", f"{PREFIX}-{os.getpid()}-try"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", f"{PREFIX}-{os.getpid()}-try"], check=True)
    return None


class LabTimeout(LabError):
    """A process of the laboratory took too long, and was ended."""


class Lab:
    """Hosts behind links of equal rate.

    Parameters
    ----------
    names
        Of the hosts; each gets an address (`address`) and a namespace.
    rate_mbit
        Of every link, in each direction, in Mbit/s.
    folder
        Where the logs of processes go.
    """

    def __init__(self, names: Sequence[str], rate_mbit: float, folder: Path) -> None:
        self.names = tuple(names)
        self.rate_mbit = rate_mbit
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._id = f"{PREFIX}-{os.getpid()}"
        self._previous: Any = None

    def __enter__(self) -> Lab:
        self._previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            _sweep()
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, remove all namespaces. Idempotent."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self.stop(*self.processes)
            _remove(f"{self._id}-")
        finally:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def address(self, name: str) -> str:
        """The IPv4 address of a host."""
        number = self.names.index(name) + 1
        return f"10.99.{number // 250}.{number % 250 + 1}"

    def start(
        self, label: str, host: str, command: Sequence[str | Path], environ: Mapping[str, str], cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process on *host*, in the background; what it prints goes to ``<folder>/<label>.log``."""
        with open(self.folder / f"{label}.log", "wb") as log:
            process = subprocess.Popen(
                [*self._inside(host), *map(str, command)],
                env=dict(environ),
                cwd=cwd or self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[label] = process
        return process

    def run(
        self, label: str, host: str, command: Sequence[str | Path], environ: Mapping[str, str], timeout_s: float = 600
    ) -> str:
        """Run a command on *host* to its end; returns what it printed.

        Raises
        ------
        LabError
            If it fails.
        LabTimeout
            If it takes longer than *timeout_s*.
        """
        process = self.start(label, host, command, environ)
        self.wait(label, process, timeout_s)
        return self.log(label)

    def wait(self, label: str, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        """Wait for the end of a process that was started here, and check that it was a good one."""
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LabTimeout(f"{label} is not done after {timeout_s:.0f} s:\n{self.log(label)[-2000:]}") from None
        finally:
            self.stop(label)
        if code:
            raise LabError(f"{label} failed:\n{self.log(label)[-3000:]}")

    def log(self, label: str) -> str:
        """What a process has printed so far."""
        return (self.folder / f"{label}.log").read_text(errors="replace")

    def stop(self, *labels: str) -> None:
        """End these processes, and whatever they have started."""
        processes = [self.processes.pop(label) for label in labels if label in self.processes]
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for process in processes:
            # The group outlives its leader as long as anything of it runs.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def measure_rate(self, source: str, target: str) -> float:
        """Bytes per second that one TCP connection brings from *source* to *target*, as iperf3 measures it."""
        self.start("iperf-server", target, ["iperf3", "--server"], os.environ)
        command = ["iperf3", "--client", self.address(target), "--json", "--time", str(IPERF_SECONDS), "--omit", "1"]
        deadline = time.monotonic() + 6 * STOP_TIMEOUT_S
        while True:
            with suppress(LabError, ValueError, KeyError):
                report = json.loads(self.run("iperf", source, command, os.environ, timeout_s=60))
                rate = float(report["end"]["sum_received"]["bits_per_second"]) / 8
                break
            if time.monotonic() > deadline:
                raise LabError(f"iperf3 from {source} to {target} failed:\n{self.log('iperf')[-2000:]}")
        self.stop("iperf-server")
        return rate

    def carried_bytes(self, host: str) -> tuple[int, int]:
        """(sent, received) on the link of *host* so far, headers included."""
        listing = json.loads(_ip("-n", self._namespace(host), "-j", "-s", "link", "show", "dev", "eth0"))
        counters = listing[0]["stats64"]
        return int(counters["tx"]["bytes"]), int(counters["rx"]["bytes"])

    def cut(self, host: str, down: bool) -> None:
        """Pull the plug of a host, or put it back."""
        _ip("-n", self._namespace(SWITCH), "link", "set", self._port(host), "down" if down else "up")

    def set_rate(self, host: str, rate_mbit: float) -> None:
        """Give the link of one host another rate, in both directions."""
        self._shape(self._namespace(host), "eth0", rate_mbit, "replace")
        self._shape(self._namespace(SWITCH), self._port(host), rate_mbit, "replace")

    def _make(self) -> None:
        switch = self._namespace(SWITCH)
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for name in self.names:
            host, port = self._namespace(name), self._port(name)
            _ip("netns", "add", host)
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", host, "address", "add", f"{self.address(name)}/16", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
            _ip("-n", host, "link", "set", "lo", "up")
            self._shape(host, "eth0", self.rate_mbit, "add")
            self._shape(switch, port, self.rate_mbit, "add")

    def _shape(self, namespace: str, device: str, rate_mbit: float, verb: str) -> None:
        limits = ["rate", f"{rate_mbit:g}mbit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)]
        _command("tc", "-n", namespace, "qdisc", verb, "dev", device, "root", "tbf", *limits)

    def _namespace(self, name: str) -> str:
        return f"{self._id}-{name}"

    def _port(self, name: str) -> str:
        return f"port{self.names.index(name)}"

    def _inside(self, host: str) -> list[str]:
        return ["ip", "netns", "exec", self._namespace(host)]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _sweep() -> None:
    """Remove the namespaces of laboratories whose process is gone."""
    for name in _namespaces():
        owner = name[len(PREFIX) + 1 :].partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _remove(f"{PREFIX}-{owner}-")


def _remove(prefix: str) -> None:
    for name in _namespaces():
        if not name.startswith(prefix):
            continue
        # A process that is left in a namespace keeps it, and its devices, alive.
        for pid in _ip("netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", name)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def _ip(*arguments: str) -> str:
    return _command("ip", *arguments)


def _command(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout
