"""Root stages, another user runs: with two real users where the tests run as root."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from click.testing import CliRunner

from envship.bundle import read_bundle
from envship.cli import main
from worker_bootstrap import evict, ready_mark, staging, verify
from worker_bootstrap.digest import EnvironmentId
from worker_bootstrap.errors import StoreError
from worker_bootstrap.layout import Layout
from worker_bootstrap.location import open_store
from worker_bootstrap.lock import Lease
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.materialise import materialise
from worker_bootstrap.soundness import sound_prefix
from worker_bootstrap.stock import survey
from worker_bootstrap.store import Store
from worker_bootstrap.verify import damaged_files

from .environments import PLACEHOLDER, package_of, tiny_environment
from .filesystems import needs_mount, remount, tmpfs
from .overtaken import Overtaken

NOBODY = 65534
CODE = Path(evict.__file__).parents[1]
TOOL = {"bin/tool*": b"#!/bin/sh\necho it runs\n", "lib/data": b"data" * 100}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    from envship.environment import Environment

    store = Store(tmp_path / "packed")
    environment_id = tiny_environment(store, TOOL)
    return Environment(store.read_manifest(environment_id), store).save(tmp_path / "it.envship")


@pytest.fixture
def opt() -> Iterator[Path]:
    """A place like ``/opt``: everybody can get there, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp(prefix="envship-opt-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def envship(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_bundle_is_staged_whole_and_for_good(bundle: Path, opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = envship("stage", bundle, "--store", opt / "envship")
    store = Store(opt / "envship")
    environment_id = EnvironmentId(told["id"])
    assert told["prefix"] == str(store.built(environment_id))
    assert store.missing(store.read_manifest(environment_id).chunks) == []
    assert list(damaged_files(store, environment_id)) == []
    monkeypatch.setattr(ready_mark, "boot_id", lambda: "another boot")
    assert store.built(environment_id) is not None
    assert envship("stage", bundle, "--store", opt / "envship") == told


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_whatever_the_umask_everybody_can_read_and_nobody_else_can_write(bundle: Path, opt: Path, umask: int) -> None:
    """The folders above that had to be made as well."""
    before = os.umask(umask)
    try:
        envship("stage", bundle, "--store", opt / "srv/apps/envship")
    finally:
        os.umask(before)
    for path in (opt / "srv").rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink() or path.parent.name == "tmp":
            continue
        if path.parent.name == "locks":
            assert mode == 0o600, path
            continue
        assert mode & 0o022 == 0, path
        assert mode & (0o555 if path.is_dir() else 0o444) == (0o555 if path.is_dir() else 0o444), path


def test_what_is_evicted_while_a_store_is_opened_is_passed_over(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    kept, gone = read_bundle(bundle, store).id, tiny_environment(store, {"gone": b"gone"})
    for environment_id in (kept, gone):
        materialise(store, environment_id)
        assert Lease(store.layout.lease(environment_id)).is_free()
    look, evicted = os.lstat, []

    def evict_first(path: Any) -> os.stat_result:
        if not evicted and str(path).startswith(str(store.layout.manifests)):
            evicted.append(gone)
            evicted.append(evict.collect(store, 0, keep=[kept], grace_s=0).evicted == (gone,))
        return look(path)

    monkeypatch.setattr(staging.os, "lstat", evict_first)
    staging.open_to_everybody(store, kept)
    assert evicted == [gone, True]
    assert stat.S_IMODE(store.layout.root.stat().st_mode) == 0o755


def test_a_store_that_was_opened_is_open_on_disk(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    environment_id = read_bundle(bundle, store).id
    materialise(store, environment_id)

    def modes() -> list[int]:
        paths = (store.layout.root, *sorted(store.layout.root.iterdir()))
        return [stat.S_IMODE(path.lstat().st_mode) for path in paths]

    synced: list[list[int]] = []
    monkeypatch.setattr(staging, "sync_file_system", lambda path: synced.append(modes()))
    closed = modes()
    staging.open_to_everybody(store, environment_id)
    assert synced == [modes()]
    assert closed != modes()
    staging.open_to_everybody(store, environment_id)
    assert len(synced) == 1  # nothing was to be done


@pytest.mark.parametrize(
    ("command", "spoilt"),
    [("gc", "locks/collect.lock"), ("verify --repair", "locks/????????????????.lock"), ("stage it", "leases/*")],
)
def test_what_the_file_system_refuses_is_a_message(bundle: Path, tmp_path: Path, command: str, spoilt: str) -> None:
    """It names the file, and there is no traceback."""
    envship("stage", bundle, "--store", tmp_path / "store")
    (path,) = (tmp_path / "store").glob(spoilt)
    path.unlink()
    path.mkdir()
    words = [str(bundle) if word == "it" else word for word in command.split()]
    result = CliRunner().invoke(main, [*words, "--store", str(tmp_path / "store")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert f"{path}: Is a directory" in result.stderr


def test_stage_needs_one_place(bundle: Path, tmp_path: Path) -> None:
    for more in ([], ["--store", str(tmp_path / "s"), "--scheduler", "tcp://127.0.0.1:1"]):
        result = CliRunner().invoke(main, ["stage", str(bundle), *more])
        assert result.exit_code == 2
        assert "either --store" in result.output


def test_several_stores_are_looked_in_in_order(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    environment_id = tiny_environment(second, TOOL)
    tiny_environment(first, TOOL)
    materialise(second, environment_id)
    own = Store(tmp_path / "own", [first.layout.root, second.layout.root])
    assert sound_prefix(own, environment_id) == second.layout.prefix(environment_id)
    materialise(first, environment_id)
    assert sound_prefix(own, environment_id) == first.layout.prefix(environment_id)
    assert own.lease(environment_id) == own.layout.lease(environment_id)  # nobody has made one in the first


@needs_mount
def test_a_store_on_a_read_only_mount_is_used_in_place(bundle: Path, tmp_path: Path) -> None:
    """The lease, too, lies there: on a mount of this machine a lock needs nothing to be written."""
    with tmpfs(tmp_path / "mounted", "size=64m,mode=755") as mounted:
        told = envship("stage", bundle, "--store", mounted / "store")
        remount(mounted, "ro")
        store = open_store(tmp_path / "own", read_only=[mounted / "store"])
        environment_id = EnvironmentId(told["id"])
        prefix = materialise(store, environment_id)
        assert str(prefix) == told["prefix"]
        assert subprocess.run([prefix / "bin/tool"], capture_output=True, check=True).stdout == b"it runs\n"
        lease = Lease(store.lease(environment_id))
        assert lease.path.is_relative_to(mounted)
        lease.hold()
        try:
            assert not Lease(lease.path).is_free()
        finally:
            lease.release()
        assert store.missing(store.read_manifest(environment_id).chunks) == []
        assert not list(store.layout.envs.iterdir())
        # And another one is built beside it, as if nothing were there.
        other = tiny_environment(store, {"lib/own": b"own"})
        assert materialise(store, other).is_relative_to(tmp_path / "own")


@needs_mount
def test_a_store_on_a_read_only_mount_says_that_it_cannot_be_written_to(bundle: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "mounted", "size=64m,mode=755") as mounted:
        told = envship("stage", bundle, "--store", mounted / "store")
        other = mounted / "other"
        other_id = read_bundle(bundle, Store(other)).id
        damaged = sorted((mounted / "store/chunks").glob("*/*"))[0]
        damaged.write_bytes(b"x")
        remount(mounted, "ro")
        for arguments in (["gc", "--limit", "0", "--grace", "0s"], ["gc"]):
            result = CliRunner().invoke(main, [*arguments, "--store", str(mounted / "store")])
            assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.exception
            assert f"the store {mounted / 'store'} cannot be written to" in result.output
            assert "ENVSHIP_STORE" in result.output
        with pytest.raises(StoreError, match=f"the store {mounted / 'store'} cannot be written to"):
            evict.collect(Store(mounted / "store"), 0, grace_s=0)
        with pytest.raises(StoreError, match=f"the store {other} cannot be written to"):
            materialise(Store(other), other_id)
        for more in ([], ["--repair"]):
            (found,) = envship("verify", *more, "--store", mounted / "store", code=1)["environments"]
            assert damaged.name.partition(".")[0] in " ".join(found["problems"])
        assert found["prefix"] == told["prefix"] and damaged.exists()


@needs_mount
def test_a_store_from_which_nothing_can_be_executed_is_not_used_in_place(bundle: Path, tmp_path: Path) -> None:
    """Its chunks are, and the environment is built in the user's own."""
    with tmpfs(tmp_path / "mounted", "size=64m,mode=755") as mounted:
        told = envship("stage", bundle, "--store", mounted / "store")
        environment_id = EnvironmentId(told["id"])
        remount(mounted, "ro,noexec")
        store = open_store(tmp_path / "own", read_only=[mounted / "store"])
        assert sound_prefix(store, environment_id) is None
        assert store.lease(environment_id).is_relative_to(tmp_path / "own")
        prefix = materialise(store, environment_id)
        assert prefix.is_relative_to(tmp_path / "own")
        assert subprocess.run([prefix / "bin/tool"], capture_output=True, check=True).stdout == b"it runs\n"
        remount(mounted, "exec")
        assert (
            str(sound_prefix(open_store(tmp_path / "other", read_only=[mounted / "store"]), environment_id))
            == (told["prefix"])
        )


AS_USER = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from worker_bootstrap.errors import StoreUntrusted
from worker_bootstrap.layout import Layout
from worker_bootstrap.location import open_store
from worker_bootstrap.lock import Lease
from worker_bootstrap.materialise import materialise
staged, own, environment_id = sys.argv[2:]
store = open_store(own, read_only=[staged])
prefix = materialise(store, environment_id)
assert prefix == Path(staged, "envs", environment_id[:16]), prefix
lease = Lease(store.lease(environment_id))
assert str(lease.path).startswith(staged), lease.path
lease.hold()
for path in (prefix / "new", prefix / "bin/tool", Path(staged, "chunks/x"), lease.path):
    try:
        open(path, "ab")
    except PermissionError:
        continue
    raise AssertionError(f"{path} can be written to")
print(subprocess.run([prefix / "bin/tool"], capture_output=True, text=True, check=True).stdout, end="", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as two users")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_root_stages_and_another_user_runs_in_place(bundle: Path, opt: Path) -> None:
    """And while she does, root's own gc does not take it away."""
    told = envship("stage", bundle, "--store", opt / "envship")
    code = opt / "code"
    shutil.copytree(CODE / "worker_bootstrap", code / "worker_bootstrap", ignore=shutil.ignore_patterns("__pycache__"))
    own = opt / "own"
    own.mkdir()
    os.chown(own, NOBODY, NOBODY)
    python = getattr(sys, "_base_executable", sys.executable)
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if subprocess.run([*user, python, "-c", ""], capture_output=True, cwd="/", check=False).returncode:
        python = "/usr/bin/python3"  # a Python below /root is root's alone
        if subprocess.run([*user, python, "-c", ""], capture_output=True, cwd="/", check=False).returncode:
            pytest.skip("another user has no Python here")
    arguments = [python, "-B", "-c", AS_USER, code, opt / "envship", own / "store", told["id"]]
    process = subprocess.Popen(
        [*user, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": str(own)},
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "it runs\n", process.stderr.read()
        kept = envship("gc", "--store", opt / "envship", "--limit", "0", "--grace", "0s")["kept"]
        assert kept[told["id"]].startswith("a process runs from it")
    finally:
        process.communicate()
    assert process.returncode == 0
    assert envship("gc", "--store", opt / "envship", "--limit", "0", "--grace", "0s")["evicted"] == [told["id"]]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as two users")
@pytest.mark.skipif(os.getuid() != 0, reason="only root builds for others")
@pytest.mark.parametrize("python", [f"{sys.version_info.major}.{sys.version_info.minor}.7", "3.1.0"])
def test_root_starts_nothing_that_comes_with_a_bundle(opt: Path, tmp_path: Path, python: str) -> None:
    """Modules that name the prefix are compiled by the interpreter that envship runs in, or not at all."""
    from envship.environment import Environment

    module = f"lib/python{python.rpartition('.')[0]}/mine"
    store = Store(tmp_path / "packed")
    program = f'#!/bin/sh\ntouch {tmp_path}/started\nexec {sys.executable} "$@"\n'.encode()
    text = (f"HERE = '{PLACEHOLDER}'\n".encode(), "text")
    manifest = Manifest("linux-64", python, [package_of(store, {"bin/python*": program, f"{module}.py": text})])
    store.write_manifest(manifest)
    bundle = Environment(manifest, store).save(tmp_path / "it.envship")
    told = envship("stage", bundle, "--store", opt / "envship")
    assert not (tmp_path / "started").exists()
    assert Path(told["prefix"], f"{module}.py").exists()
    compiled = list(Path(told["prefix"], module).parent.glob("__pycache__/mine.*.pyc"))
    assert bool(compiled) == (python != "3.1.0")
    materialise(store, manifest.id)
    assert (tmp_path / "started").exists(), "who builds it for himself starts it"


def test_a_store_that_another_user_staged_is_refused(bundle: Path, opt: Path) -> None:
    told = envship("stage", bundle, "--store", opt / "envship")
    os.chown(opt / "envship", 12345, 12345)
    result = CliRunner().invoke(main, ["gc", "--store", str(opt / "envship")])
    assert result.exit_code == 1
    assert "belongs to user 12345" in result.output
    assert told["id"]


# -- verify and gc, as commands


def test_verify_names_what_is_wrong_and_repairs_it(bundle: Path, tmp_path: Path) -> None:
    told = envship("stage", bundle, "--store", tmp_path / "store")
    assert envship("verify", "--store", tmp_path / "store")["environments"][0]["sound"]
    prefix = Path(told["prefix"])
    (prefix / "lib/data").write_bytes(b"edited")
    (prefix / "lib/added").touch()
    found = envship("verify", told["id"][:8], "--store", tmp_path / "store", code=1)["environments"][0]
    assert found["problems"] == ["lib/data has other content", "lib/added was added"]
    found = envship("verify", "--store", tmp_path / "store", "--repair")["environments"][0]
    assert found["sound"] and len(found["mended"]) == 2
    assert (prefix / "lib/data").read_bytes() == b"data" * 100
    assert not (prefix / "lib/added").exists()
    assert envship("verify", "--store", tmp_path / "store")["environments"][0]["sound"]


def test_a_name_that_cannot_be_printed_is_printed_all_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    prefix = materialise(store, tiny_environment(store, {"lib/caf\udce9": b"text"}))
    (prefix / "lib/caf\udce9").unlink()
    command = [sys.executable, "-m", "envship.cli", "verify", "--store", str(tmp_path / "store")]
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CODE, env=environ)
    assert (done.returncode, done.stderr) == (1, "")
    assert r"lib/caf\udce9 cannot be read: No such file" in done.stdout


def test_verify_looks_at_what_was_built_before_the_machine_was_started(bundle: Path, tmp_path: Path) -> None:
    """Nobody has looked at it since; a repair marks it ready."""
    store = Store(tmp_path / "store")
    environment_id = read_bundle(bundle, store).id
    prefix = materialise(store, environment_id)
    store.layout.ready(environment_id).write_text(json.dumps({"boot_id": "of yesterday"}))
    assert store.built(environment_id) is None
    victim = next(path for path in sorted(prefix.rglob("*")) if path.is_file() and not path.is_symlink())
    victim.chmod(0o644)
    victim.write_bytes(b"edited")
    found = envship("verify", "--store", tmp_path / "store", code=1)["environments"][0]
    assert str(victim.relative_to(prefix)) in found["problems"][0]
    assert envship("verify", "--store", tmp_path / "store", "--repair")["environments"][0]["mended"]
    assert store.built(environment_id) == prefix
    assert envship("verify", "--store", tmp_path / "store")["environments"][0]["prefix"] == str(prefix)


def test_verify_looks_at_chunks_that_no_environment_needs(bundle: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digest = store.write_chunk(b"left over from something that was evicted")
    assert envship("verify", "--store", tmp_path / "store")["other_chunks"] == 1
    path, _ = next(iter(store._candidates(digest)))
    path.write_bytes(b"damaged")
    told = envship("verify", "--store", tmp_path / "store", code=1)
    assert digest in told["problems"][0]
    assert not store.has_chunk(digest)


def test_verify_names_damaged_chunks(bundle: Path, tmp_path: Path) -> None:
    told = envship("stage", bundle, "--store", tmp_path / "store")
    path = sorted((tmp_path / "store" / "chunks").glob("*/*"))[0]
    path.write_bytes(b"x")
    (problem, *_) = envship("verify", "--store", tmp_path / "store", code=1)["environments"][0]["problems"]
    assert path.name.partition(".")[0] in problem
    assert told["id"]


def test_a_repair_does_what_it_can_without_a_missing_chunk(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    environment_id = tiny_environment(store, {name: name.encode() * 100 for name in "abz"}, chunk_bytes=100)
    prefix = materialise(store, environment_id)
    lost = store.read_manifest(environment_id).packages[0].chunks[0].digest
    next(store.layout.chunks.glob(f"*/{lost}.*")).unlink()
    for name in "abz":
        (prefix / name).write_bytes(b"edited")
    (found,) = envship("verify", "--store", tmp_path / "store", "--repair", code=1)["environments"]
    assert found["mended"] == ["b has other content", "z has other content"]
    assert found["problems"] == ["a has other content", f"chunk {lost} is not in {tmp_path / 'store'}"]


@pytest.mark.parametrize("more", [[], ["--repair"]], ids=["", "repair"])
@pytest.mark.parametrize("moment", ["read_manifest", "built", "missing", "read_chunk", "digest_of_file", "draw"])
def test_what_is_evicted_while_verify_looks_at_it_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, more: list[str]
) -> None:
    environment_id = tiny_environment(Store(tmp_path / "store"))
    materialise(Store(tmp_path / "store"), environment_id)
    if hasattr(verify, moment):
        store = Overtaken(tmp_path / "store", "adding")
        right = getattr(verify, moment)
        monkeypatch.setattr(verify, moment, lambda *arguments: (store.adding(), right(*arguments))[1])
    else:
        store = Overtaken(tmp_path / "store", moment)
    monkeypatch.setattr("worker_bootstrap.location.open_store", lambda _: store)
    told = envship("verify", *more)
    (freed,) = store.freed
    (found,) = told["environments"]
    assert found["sound"]
    assert told["problems"] == []
    # Whoever mends an environment keeps it from being evicted.
    is_evicted = not more or moment not in ("digest_of_file", "draw")
    assert freed.evicted == ((environment_id,) if is_evicted else ())
    # Before anything was looked at, it is seen as one that is not built, of which no chunk is here.
    assert found["evicted"] == (is_evicted and moment != "built")


def test_what_was_evicted_and_built_again_while_verify_looked_at_it_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    environment_id = tiny_environment(store)
    materialise(store, environment_id)
    right = verify.digest_of_file
    freed: list[evict.Freed] = []

    def overtaken(path: Path) -> object:
        if not freed:
            freed.append(evict.collect(store, 0, grace_s=0))
            with pytest.raises(FileNotFoundError):
                right(path)
            materialise(store, tiny_environment(store))
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return right(path)

    monkeypatch.setattr(verify, "digest_of_file", overtaken)
    (found,) = envship("verify", "--store", tmp_path / "store")["environments"]
    assert freed[0].evicted == (environment_id,)
    assert (found["sound"], found["evicted"], found["prefix"]) == (True, False, str(store.built(environment_id)))


def test_chunks_of_no_environment_that_are_evicted_while_verify_looks_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    store.write_chunk(b"left over")
    right = verify.chunk_files

    def overtaken(layout: Layout) -> Iterator[object]:
        yield from right(layout)
        assert evict.collect(store, 0, grace_s=0).chunks == 1

    monkeypatch.setattr(verify, "chunk_files", overtaken)
    assert envship("verify", "--store", tmp_path / "store")["problems"] == []


def test_a_manifest_that_is_damaged_is_damage(tmp_path: Path) -> None:
    """And not an environment that has been evicted, although it is dropped."""
    store = Store(tmp_path / "store")
    environment_id = tiny_environment(store)
    store.layout.manifest(environment_id).write_bytes(b"{}")
    (found,) = envship("verify", "--store", tmp_path / "store", code=1)["environments"]
    assert (found["sound"], found["evicted"]) == (False, False)
    assert environment_id in found["problems"][0]


def test_a_chunk_that_never_was_here_is_no_damage(bundle: Path, tmp_path: Path) -> None:
    """A scheduler's store holds manifests only, and an image may leave the chunks out."""
    told = envship("stage", bundle, "--store", tmp_path / "store")
    shutil.rmtree(tmp_path / "store/chunks")
    found = envship("verify", "--store", tmp_path / "store", code=1)["environments"][0]
    assert found["absent_chunks"] > 0
    assert "is not in" in found["problems"][0]  # a listing is needed to know what should be built
    envship("stage", bundle, "--store", tmp_path / "store")
    Path(told["prefix"]).rename(tmp_path / "away")
    for path in (tmp_path / "store/chunks").glob("*/*"):
        path.unlink()
    found = envship("verify", "--store", tmp_path / "store")["environments"][0]
    assert found["sound"] and found["absent_chunks"] > 0


def test_a_dry_run_takes_nothing(bundle: Path, tmp_path: Path) -> None:
    told = envship("stage", bundle, "--store", tmp_path / "store")
    said = envship("gc", "--store", tmp_path / "store", "--limit", "0", "--grace", "0s", "--dry-run")
    assert said["evicted"] == [told["id"]]
    assert said["bytes_after"] == 0 < said["bytes_before"]
    assert Store(tmp_path / "store").built(EnvironmentId(told["id"])) is not None
    done = envship("gc", "--store", tmp_path / "store", "--limit", "0", "--grace", "0s")
    assert {**done, "dry_run": True} == said
    assert Store(tmp_path / "store").environments() == []


@pytest.mark.parametrize("others", [[], ["empty"], ["other"], ["store"]], ids=str)
def test_a_dry_run_is_right_whatever_other_stores_there_are(tmp_path: Path, others: list[str]) -> None:
    """And no more goes than alone, but for chunks that one of them needs; the store itself may be one of them."""
    store, other = Store(tmp_path / "store"), Store(tmp_path / "other")
    Store(tmp_path / "empty")
    content = [os.urandom(100_000) for _ in range(4)]
    for data in content:
        environment_id = tiny_environment(store, {"data": data}, chunk_bytes=50_000)
        materialise(store, environment_id)
        for path in store.layout.root.rglob("*"):
            if path.is_file() and store.layout.envs not in path.parents:
                os.utime(path, (0, path.stat().st_mtime - 1000))
    tiny_environment(other, {"data": content[0]}, chunk_bytes=50_000)
    size_bytes = survey(store).size_bytes
    arguments = ["gc", "--store", tmp_path / "store", "--limit", size_bytes - size_bytes * 3 // 8]
    with dask.config.set({"envship.stores": [str(tmp_path / name) for name in others]}):
        said, done = envship(*arguments, "--dry-run"), envship(*arguments)
    assert {**done, "dry_run": True} == said
    assert done["bytes_after"] == survey(store).size_bytes
    # The first one's chunks stay where another store names them: then a third one has to go.
    assert (len(done["evicted"]), done["chunks"]) == ((3, 6) if others == ["other"] else (2, 6))


HOLD = "import sys; from pathlib import Path; from worker_bootstrap.lock import Lock\n"
HOLD += "with Lock(Path(sys.argv[1]), shared=len(sys.argv) > 2): print('held', flush=True); sys.stdin.read()"


@contextlib.contextmanager
def held(path: Path, *shared: str) -> Iterator[int]:
    """A process (its id) that holds a lock."""
    command = [sys.executable, "-c", HOLD, path, *shared]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize("meanwhile", ["a build", "a pack", "new chunks"])
def test_a_dry_run_says_what_may_not_go_and_is_right(bundle: Path, tmp_path: Path, meanwhile: str) -> None:
    told = envship("stage", bundle, "--store", tmp_path / "store")
    store = Store(tmp_path / "store")
    layout = store.layout
    for path in layout.root.rglob("*"):
        if path.is_file() and layout.envs not in path.parents:
            os.utime(path, (0, 0))
    left_over = store.write_chunk(os.urandom(100_000))
    arguments = ["gc", "--store", tmp_path / "store", "--limit", "0"]
    if meanwhile == "new chunks":
        said, done = envship(*arguments, "--dry-run"), envship(*arguments)
        assert said["kept_chunks"].startswith("1 chunks: they are so new")
        assert said["evicted"] == [told["id"]]
    else:
        lock = [layout.lock(told["id"])] if meanwhile == "a build" else [layout.collect_lock, "shared"]
        with held(*lock) as pid:  # type: ignore[arg-type]
            said = envship(*arguments, "--grace", "0s", "--dry-run")
            done = envship(*arguments, "--grace", "0s")
        if meanwhile == "a build":
            assert said["kept"] == {told["id"]: f"it is being built (process {pid})"}
        else:
            assert f"process {pid} packs" in said["kept_chunks"]
    assert {**done, "dry_run": True} == said
    assert store.has_chunk(left_over) == (meanwhile != "a build")
    assert survey(store).size_bytes == done["bytes_after"] > 0


def test_gc_says_why_it_keeps_what_is_new(bundle: Path, tmp_path: Path) -> None:
    told = envship("stage", bundle, "--store", tmp_path / "store")
    said = envship("gc", "--store", tmp_path / "store", "--limit", "0")
    assert said["kept"] == {told["id"]: "it was used in the last 15 minutes"}
    text = CliRunner().invoke(main, ["gc", "--store", str(tmp_path / "store"), "--limit", "0"]).output
    assert f"kept  {told['id']}: it was used in the last 15 minutes" in text


def test_a_store_over_its_limit_is_collected_after_a_pack(tmp_path: Path) -> None:
    """What was packed stays, however small the limit; what nobody used for long goes."""
    import dask

    from envship.pack import pack

    store = Store(tmp_path / "store")
    old = tiny_environment(store, TOOL)
    for path in (store.layout.manifest(old), *store.layout.chunks.glob("*/*")):
        os.utime(path, (0, 0))
    prefix = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    with dask.config.set({"envship.store-limit": "1 kB"}):
        made = pack(prefix, store=store)
    assert store.environments() == [made.id]
    assert store.missing(made.chunks) == []
