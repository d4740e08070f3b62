"""The recipes of ``docs/admin.md``, run as they stand there: other paths are put in, and nothing else is changed.

What this machine has no part for (a Slurm controller, an image builder, a kubelet, a server of NFS) is left out: its
commands are read, and what they call is run.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from envship.environment import Environment
from worker_bootstrap.layout import WRITTEN_AT_NS
from worker_bootstrap.location import open_store
from worker_bootstrap.materialise import materialise
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files

from .environments import tiny_environment
from .filesystems import needs_mount

PAGE = Path(__file__).parents[1] / "docs" / "admin.md"
BIN = Path(sys.executable).parent
TOOL = {"bin/tool*": b"#!/bin/sh\necho it runs\n", "lib/data": b"data" * 100}


def recipe(heading: str, language: str = "") -> str:
    """The first block of code in *language* below *heading*."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"### {heading}\n")
    return rest.partition("\n### ")[0].partition(f"```{language}\n")[2].partition("```")[0]


def at(places: Mapping[str, Path], text: str) -> str:
    """*text* with other paths; each of them has to be there."""
    for path, other in places.items():
        assert path in text, path
        text = text.replace(path, str(other))
    return text


def run(command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    """With our commands on the PATH, and nothing configured."""
    variables = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": "/nonexistent", **environ}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd="/")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    packed = Store(tmp_path / "packed")
    manifest = packed.read_manifest(tiny_environment(packed, TOOL))
    return Environment(manifest, packed).save(tmp_path / "analysis.envship")


@pytest.fixture
def opt() -> Iterator[Path]:
    """A place like ``/opt``, which everybody can get to."""
    with tempfile.TemporaryDirectory(prefix="envship-opt-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def assert_runs(store: Path, own: Path) -> Path:
    """The one environment that is built in *store* runs from there, for whoever has a store of her own; its prefix."""
    opened = open_store(own, read_only=[store])
    (environment_id,) = opened.environments()
    prefix = materialise(opened, environment_id)
    assert prefix.is_relative_to(store)
    assert subprocess.run([prefix / "bin/tool"], capture_output=True, check=True).stdout == b"it runs\n"
    return prefix


def test_slurm_prolog(bundle: Path, opt: Path, tmp_path: Path) -> None:
    """Jobs that begin at the same time wait for one another; a job does not fail for a bundle that is not there."""
    places = slurm_places(opt, tmp_path)
    prolog = script_of(recipe("Slurm prolog", "bash"), {**places, "/net/apps/analysis.envship": bundle}, tmp_path)
    jobs = [subprocess.Popen([prolog], env={}, stderr=subprocess.PIPE, cwd="/") for _ in range(2)]
    assert [job.communicate()[1] for job in jobs] == [b""] * 2
    assert [job.returncode for job in jobs] == [0] * 2
    prefix = assert_runs(opt / "envship", tmp_path / "own")
    bundle.unlink()
    done = subprocess.run([prolog], env={}, capture_output=True, text=True, check=True, cwd="/")
    assert "analysis.envship" in done.stderr
    assert prefix.exists()


def test_slurm_epilog(bundle: Path, opt: Path, tmp_path: Path) -> None:
    """What was used lately stays, and all of it while a job is being prepared."""
    places = slurm_places(opt, tmp_path)
    epilog = script_of(recipe("Slurm epilog", "bash"), places, tmp_path)
    assert run(["envship", "stage", str(bundle), "--store", str(opt / "envship")]).returncode == 0
    prefix = assert_runs(opt / "envship", tmp_path / "own")
    assert_silent(epilog)
    assert prefix.exists()
    for folder in ("manifests", "ready", "leases", "chunks"):
        for path in (opt / "envship" / folder).rglob("*"):
            os.utime(path, (time.time() - 31 * 86400,) * 2)
    with open(places["/run/envship-stage.lock"], "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen([epilog], env={}, cwd="/")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        assert prefix.exists()
    assert waiting.wait(60) == 0
    assert not prefix.exists()


def slurm_places(opt: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "/usr/local/bin": BIN,
        "/opt/envship": opt / "envship",
        "/run/envship-stage.lock": tmp_path / "stage.lock",
    }


def script_of(text: str, places: Mapping[str, Path], folder: Path) -> Path:
    script = folder / "envship.sh"
    script.write_text(at(places, text))
    script.chmod(0o755)
    return script


def assert_silent(script: Path) -> None:
    """As Slurm runs it: with no environment at all."""
    done = subprocess.run([script], env={}, capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_container_image(bundle: Path, opt: Path, tmp_path: Path) -> None:
    """Its last layers, without what installs Python; and the store as a later stage copies it, without chunks."""
    lines = [line for line in recipe("Container image", "dockerfile").splitlines() if line]
    assert [line.split()[0] for line in lines] == ["FROM", "RUN", "COPY", "RUN", "ENV"]
    copied = tmp_path / "tmp"
    copied.mkdir()
    shutil.copy(bundle, copied)
    _, stage = lines[3].split(" ", 1)
    assert run(["sh", "-c", at({"/tmp": copied, "/opt/envship": opt / "envship"}, stage)]).returncode == 0
    assert list(copied.iterdir()) == []

    name, _, value = lines[4].removeprefix("ENV ").partition("=")
    (value,) = shlex.split(at({"/opt/envship": opt / "envship"}, value))
    program = "from worker_bootstrap.location import open_store; print(*open_store(store_path).layouts, sep='\\n')"
    program = f"store_path = {str(tmp_path / 'own')!r}; " + program
    told = run([sys.executable, "-c", program], **{name: value})
    assert str(opt / "envship") in told.stdout.splitlines()[0], told.stderr

    prefix = assert_runs(opt / "envship", tmp_path / "own")
    shutil.rmtree(opt / "envship" / "chunks")
    assert assert_runs(opt / "envship", tmp_path / "own") == prefix


@needs_mount
def test_kubernetes_init_container(bundle: Path, opt: Path, tmp_path: Path) -> None:
    """In an ``emptyDir``, which is writable for everybody; the worker sees it read-only, at the same path."""
    spec: dict[str, Any] = yaml.safe_load(recipe("Kubernetes init container", "yaml"))["spec"]
    volumes = {"envship": opt / "emptyDir", "bundles": opt / "bundles"}
    assert [volume["name"] for volume in spec["volumes"]] == [*volumes]
    for path in volumes.values():
        path.mkdir()
    volumes["envship"].chmod(0o777)
    shutil.copy(bundle, volumes["bundles"])
    (init,), (worker,) = spec["initContainers"], spec["containers"]
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in init["volumeMounts"]}
    *shell, command = init["command"]
    done = run([*shell, at(mounts, command)])
    assert done.returncode == 0, done.stderr

    (mount,) = worker["volumeMounts"]
    assert mount["readOnly"]
    (variable,) = worker["env"]
    assert variable["name"] == "DASK_ENVSHIP__STORES"
    (store,) = map(Path, json.loads(at({mount["mountPath"]: volumes[mount["name"]]}, variable["value"])))
    subprocess.run(["mount", "--bind", "-o", "ro", volumes["envship"], volumes["envship"]], check=True)
    try:
        assert_runs(store, tmp_path / "own")
        with pytest.raises(OSError, match="Read-only"):
            (store / "new").touch()
    finally:
        subprocess.run(["umount", volumes["envship"]], check=True)


@needs_mount
def test_nfs_export(bundle: Path, opt: Path, tmp_path: Path) -> None:
    """The server's part, with the mount that gives it the path that clients see. What a client has of it is in
    `tests.test_odd_file_systems`.
    """
    text = recipe("NFS export", "console")
    (stage,) = re.findall(r"^server# (envship stage .*?)  ", text, re.MULTILINE)
    section = PAGE.read_text(encoding="utf-8").partition("### NFS export")[2]
    bind, path = re.findall(r"`(mount --bind \S+ \S+)`, then `--store (\S+)`", section)[0]
    places = {"/export/apps": opt / "export", "/net/apps": opt / "net"}
    for folder in places.values():
        folder.mkdir()
    subprocess.run(shlex.split(at(places, bind)), check=True)
    try:
        command = stage.replace("/export/apps/envship", path).replace("analysis.envship", str(bundle))
        done = run(shlex.split(at({"/net/apps": opt / "net"}, command)))
        assert done.returncode == 0, done.stderr
        prefix = assert_runs(opt / "net" / "envship", tmp_path / "own")
    finally:
        subprocess.run(["umount", opt / "net"], check=True)
    assert (opt / "export" / prefix.relative_to(opt / "net")).is_dir()
    for path in (opt / "export" / "envship").rglob("*"):  # ``root_squash``: clients are nobody there
        if path.parent.name not in ("locks", "tmp") and not path.is_symlink():
            assert path.stat().st_mode & stat.S_IROTH, path


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="needs systemd-tmpfiles")
@pytest.mark.skipif(os.getuid() != 0, reason="only root may")
def test_systemd_tmpfiles(tmp_path: Path) -> None:
    """The folder is made, and what ages the folders around a store leaves the store alone."""
    root, conf = tmp_path / "root", tmp_path / "conf"
    (root / "var/tmp").mkdir(parents=True)
    (root / "opt").mkdir()
    rules = recipe("systemd-tmpfiles")
    conf.write_text(rules)
    tool = ["systemd-tmpfiles", f"--root={root}"]
    done = run([*tool, "--create", str(conf)])
    assert (done.returncode, done.stderr) == (0, "")
    assert stat.S_IMODE((root / "opt/envship").stat().st_mode) == 0o755

    store = Store(root / "var/tmp/envship-1000")
    environment_id = tiny_environment(store, TOOL)
    materialise(store, environment_id)
    forgotten = root / "var/tmp/forgotten"
    forgotten.touch()
    os.utime(forgotten, ns=(WRITTEN_AT_NS, WRITTEN_AT_NS))
    aging = "d /var/tmp 1777 root root m:30d\n"  # by the time of modification alone, as many cleaners do
    conf.write_text(rules + aging)
    assert run([*tool, "--clean", str(conf)]).returncode == 0
    assert not forgotten.exists()
    assert sound_prefix(store, environment_id) is not None
    assert list(damaged_files(store, environment_id)) == []
    conf.write_text(aging)
    assert run([*tool, "--clean", str(conf)]).returncode == 0
    assert list(damaged_files(store, environment_id)), "without the rule, it is taken for forgotten"
