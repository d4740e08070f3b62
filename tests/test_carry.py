"""The package travels inside its plugins, to processes that have never heard of it."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import worker_bootstrap
from worker_bootstrap import carry
from worker_bootstrap.carry import Carried, package_digest, package_sources, publish
from worker_bootstrap.errors import StoreFull
from worker_bootstrap.store import Store

from .interpreters import other_minors


class Parcel(Carried):
    """Travels with its arguments; on the other side it is a class that the standard library is enough for."""

    def __init__(self, sent: type[Any], *values: Any) -> None:
        self.sent = sent
        self.values = values

    def arguments(self) -> tuple[Any, ...]:
        return self.values

    def pickled(self) -> bytes:
        function, (call, scope) = self.__reduce__()
        return pickle.dumps(_Reduced(function, (call, {**scope, **self._named()})), protocol=4)

    def _named(self) -> dict[str, str]:
        return {"module": self.sent.__module__, "name": self.sent.__qualname__}


class _Reduced:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def unpickle(data: bytes, then: str, folder: Path, python: str = sys.executable, before: str = "") -> str:
    """What a fresh interpreter prints that unpickles *data* with nothing but the standard library."""
    script = f"import pickle, sys\n{before}\nthing = pickle.loads(sys.stdin.buffer.read())\n{textwrap.dedent(then)}"
    done = subprocess.run([python, "-I", "-S", "-c", script], input=data, capture_output=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("python", [sys.executable, *other_minors().values()])
def test_the_standard_library_is_enough(python: str, tmp_path: Path) -> None:
    sent = Parcel(StoreFull, "/store", 2_000_000, 1_000_000)
    then = """
        import worker_bootstrap.tracker
        import worker_bootstrap as package
        print(thing.path, thing.needed_bytes, package.__spec__.origin, sep="|")
    """
    assert unpickle(sent.pickled(), then, tmp_path, python) == "/store|2000000|carried:worker_bootstrap/__init__.py\n"


def test_nothing_is_written_where_it_is_unpickled(tmp_path: Path) -> None:
    unpickle(Parcel(StoreFull, "/store").pickled(), "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_was_carried_can_be_carried_on(tmp_path: Path) -> None:
    """A coordinator that was unpickled sends plugins to the workers."""
    then = f"""
        from worker_bootstrap import carry
        assert carry.package_digest() == {package_digest()!r}
        carry.Carried.__reduce__(carry.Carried())
        from pathlib import Path
        from worker_bootstrap.layout import Layout
        Path("store/tmp").mkdir(parents=True)
        print(carry.publish(Layout(Path("store"))))
    """
    folder = tmp_path / unpickle(Parcel(StoreFull, "/store").pickled(), then, tmp_path).strip()
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.py")} == set(package_sources())


def test_tracebacks_show_lines_of_the_carried_code(tmp_path: Path) -> None:
    then = """
        import traceback
        from worker_bootstrap.layout import Layout
        try:
            Layout("/").chunk("../escape", "")
        except ValueError:
            print(traceback.format_exc())
    """
    shown = unpickle(Parcel(StoreFull).pickled(), then, tmp_path)
    assert "carried:worker_bootstrap/layout.py" in shown
    assert "name = _checked(digest)" in shown


OTHER_CODE = """
import types
for name in ("worker_bootstrap", "worker_bootstrap.errors", "worker_bootstrap.gone"):
    sys.modules[name] = types.ModuleType(name)
old = sys.modules["worker_bootstrap.errors"]
old.StoreFull = type("StoreFull", (), {"says": lambda self: "old"})
kept = old.StoreFull()
sys.modules["worker_bootstrap"].carried_digest = "0" * 64
"""


def test_a_process_with_other_code_of_that_name_gets_this_one(tmp_path: Path) -> None:
    """Objects of the older code go on working."""
    then = """
        assert "worker_bootstrap.gone" not in sys.modules
        print(thing.path, kept.says(), sum(getattr(f, "envship_carried", False) for f in sys.meta_path))
    """
    assert unpickle(Parcel(StoreFull, "/new").pickled(), then, tmp_path, before=OTHER_CODE) == "/new old 1\n"


def test_code_that_is_there_already_is_not_loaded_again(tmp_path: Path) -> None:
    then = "again = pickle.loads(data)\nprint(type(again) is type(thing))"
    before = "import io; data = sys.stdin.buffer.read(); sys.stdin = io.TextIOWrapper(io.BytesIO(data))"
    assert unpickle(Parcel(StoreFull, "/new").pickled(), then, tmp_path, before=before) == "True\n"


def test_a_process_that_has_the_package_installed_uses_that() -> None:
    again = pickle.loads(Parcel(StoreFull, "/here").pickled())
    assert type(again) is StoreFull


def test_the_plugins_travel_with_their_classes() -> None:
    from worker_bootstrap.plugins import NannyAgentPlugin, WorkerAgentPlugin

    for kind in (NannyAgentPlugin, WorkerAgentPlugin):
        assert type(pickle.loads(pickle.dumps(kind()))) is kind


def test_the_digest_names_the_sources_wherever_they_lie() -> None:
    root = Path(worker_bootstrap.__file__).parent
    assert set(package_sources()) == {f"worker_bootstrap/{path.name}" for path in root.glob("*.py")}
    text = package_sources()["worker_bootstrap/carry.py"]
    assert text == Path(carry.__file__).read_text(encoding="utf-8")


# -- in the store


def test_the_published_package_can_be_imported(store: Store) -> None:
    folder = publish(store.layout)
    script = f"import sys; sys.path.insert(0, {str(folder)!r}); import worker_bootstrap.store; print(sys.path[0])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder)


def test_it_is_published_once(store: Store) -> None:
    folder = publish(store.layout)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.py")}
    assert publish(store.layout) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.py")} == before
    assert list(store.layout.tmp.iterdir()) == []


def imported_from(folder: Path) -> str:
    """The store's class, as an interpreter finds it that imports from *folder*."""
    script = f"import sys; sys.path.insert(0, {str(folder)!r}); import worker_bootstrap.store as s; print(s.Store)"
    return subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True).stdout.strip()


def empty_all(folder: Path) -> None:
    for path in folder.rglob("*.py"):
        path.write_bytes(b"")


def edit_one(folder: Path) -> None:
    path = folder / "worker_bootstrap/store.py"
    path.write_text(path.read_text(encoding="utf-8").replace("class Store:", "class Another:"), encoding="utf-8")


def remove_one(folder: Path) -> None:
    (folder / "worker_bootstrap/store.py").unlink()


def put_a_package_before_a_module(folder: Path) -> None:
    (folder / "worker_bootstrap/store").mkdir()
    (folder / "worker_bootstrap/store/__init__.py").write_text("Store = 'another'")


def put_a_module_before_pythons(folder: Path) -> None:
    (folder / "uuid.py").write_text("raise SystemExit")


def put_a_folder_in_a_files_place(folder: Path) -> None:
    (folder / "worker_bootstrap/store.py").unlink()
    (folder / "worker_bootstrap/store.py").mkdir()


def put_a_link_in_its_place(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def let_everybody_write(folder: Path) -> None:
    (folder / "worker_bootstrap/store.py").chmod(0o666)


def let_everybody_add(folder: Path) -> None:
    (folder / "worker_bootstrap/__pycache__").chmod(0o777)


@pytest.mark.parametrize(
    "damage",
    [
        *(empty_all, edit_one, remove_one, put_a_package_before_a_module, put_a_module_before_pythons),
        *(put_a_folder_in_a_files_place, put_a_link_in_its_place, let_everybody_write, let_everybody_add),
    ],
)
def test_what_is_not_as_it_was_published_is_published_anew(store: Store, damage: Callable[[Path], None]) -> None:
    """As a power cut leaves it, or somebody who could write there."""
    folder = publish(store.layout)
    assert imported_from(folder) == "<class 'worker_bootstrap.store.Store'>"
    damage(folder)
    assert publish(store.layout) == folder
    assert imported_from(folder) == "<class 'worker_bootstrap.store.Store'>"
    for path in (folder, *folder.rglob("*")):
        assert not path.is_symlink() and path.stat().st_mode & 0o022 == 0, path
    before = folder.stat().st_ctime_ns
    assert publish(store.layout) == folder
    assert folder.stat().st_ctime_ns == before, "it is sound now"


def test_what_runs_from_there_goes_on_while_it_is_published_anew(store: Store) -> None:
    """Files are replaced, not the folder, and none is missing for a moment."""
    folder = publish(store.layout)
    script = "import sys; sys.path.insert(0, sys.argv[1]); import worker_bootstrap.digest; print(flush=True); input()"
    script += "; import worker_bootstrap.store as s; print(s.Store)"
    command = [sys.executable, "-I", "-S", "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        empty_all(folder)
        inode = folder.stat().st_ino
        publish(store.layout)
        assert folder.stat().st_ino == inode
        assert process.communicate("\n")[0].strip() == "<class 'worker_bootstrap.store.Store'>"


def test_byte_code_and_what_was_compiled_are_no_damage(store: Store) -> None:
    folder = publish(store.layout)
    assert imported_from(folder)
    (folder / "compiled-0123abcd").write_bytes(b"kept")
    assert list((folder / "worker_bootstrap/__pycache__").iterdir())
    assert publish(store.layout) == folder
    assert (folder / "compiled-0123abcd").exists()
    assert list((folder / "worker_bootstrap/__pycache__").iterdir())


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_it_has_its_modes_whatever_the_umask(store: Store, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = publish(store.layout)
        assert imported_from(folder)
    finally:
        os.umask(before)
    for path in (folder.parent, folder, *folder.rglob("*")):
        if path.parent.name != "__pycache__":
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
        assert path.stat().st_mode & 0o022 == 0, path


def test_it_is_on_disk_before_it_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    folder = store.layout.carried(package_digest())

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        assert path == folder.parent or not folder.exists(), path
        synced.append(path.name)

    monkeypatch.setattr(os, "fsync", fsync)
    publish(store.layout)
    names = {Path(name).name for name in package_sources()}
    assert names | {"worker_bootstrap"} <= set(synced) and synced[-1] == "carried"


def test_many_may_publish_at_once(store: Store) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from worker_bootstrap import carry
        from worker_bootstrap.layout import Layout
        sys.stdin.readline()
        print(carry.publish(Layout(Path(sys.argv[1]))))
    """)
    command = [sys.executable, "-c", script, str(store.layout.root)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda process: process.communicate("go\n"), processes))
    assert {out.strip() for out, _ in results} == {str(store.layout.carried(package_digest()))}, results
    assert list(store.layout.tmp.iterdir()) == []
    published = store.layout.carried(package_digest()) / "worker_bootstrap/carry.py"
    assert published.read_bytes() == Path(carry.__file__).read_bytes()


def test_a_store_that_cannot_be_written_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            publish(store.layout)
    assert list(store.layout.tmp.iterdir()) == []
    assert publish(store.layout).exists()
