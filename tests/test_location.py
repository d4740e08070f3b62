from __future__ import annotations

import os
import pwd
import struct
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest

from worker_bootstrap import location
from worker_bootstrap.errors import SettingInvalid, StoreError, StoreUntrusted
from worker_bootstrap.location import default_root, open_store, trusted

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
STRANGER = 12345


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ENVSHIP_STORE", raising=False)
    with dask.config.set({"envship.store": None, "envship.stores": []}):
        yield


# -- where


def test_the_variable_comes_before_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dask.config.set({"envship.store": str(tmp_path / "setting")}):
        assert default_root() == tmp_path / "setting"
        monkeypatch.setenv("ENVSHIP_STORE", str(tmp_path / "variable"))
        assert default_root() == tmp_path / "variable"


def test_a_relative_path_and_a_home_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ENVSHIP_STORE", "here")
    assert default_root() == tmp_path / "here"
    monkeypatch.setenv("ENVSHIP_STORE", "~/there")
    assert default_root() == tmp_path / "home/there"


def test_the_cache_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == tmp_path / ".cache/envship"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_root() == tmp_path / "cache/envship"


def test_a_cache_folder_on_a_network_file_system_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "file_system_of", lambda path: "nfs4")
    assert default_root() == Path(f"/var/tmp/envship-{os.getuid()}")


def test_a_user_without_a_home_gets_one_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run as some number, or in services."""
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert default_root() == Path(f"/var/tmp/envship-{os.getuid()}")
    monkeypatch.setenv("ENVSHIP_STORE", "~/store")
    with pytest.raises(StoreUntrusted, match="home"):
        default_root()


# -- opening


def test_open_store_makes_it_and_takes_the_settings(tmp_path: Path) -> None:
    with dask.config.set({"envship.store": str(tmp_path / "own"), "envship.stores": [str(tmp_path / "staged")]}):
        store = open_store()
    assert [layout.root for layout in store.layouts] == [tmp_path / "staged", tmp_path / "own"]
    assert store.layout.host_id.exists()
    assert not (tmp_path / "staged").exists()
    assert len(open_store(tmp_path / "own", read_only=[]).layouts) == 1


@pytest.mark.parametrize("path", ["~nobody-of-that-name/store", "/proc/store", "/tmp/" + "x" * 256])
def test_a_place_where_no_store_can_be_is_said_to_be_none(path: str) -> None:
    with pytest.raises(StoreError, match=f"the store {path[:60]}"):
        open_store(path)


@pytest.mark.parametrize("value", [3, "one", [1], {"a": "b"}])
def test_stores_that_are_no_list_of_paths(tmp_path: Path, value: object) -> None:
    with dask.config.set({"envship.stores": value}), pytest.raises(SettingInvalid):
        open_store(tmp_path / "own")


def test_a_store_that_is_no_path(tmp_path: Path) -> None:
    with dask.config.set({"envship.store": 3}), pytest.raises(SettingInvalid):
        open_store()


# -- whether it can be trusted


def test_symbolic_links_of_our_own_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    assert trusted(tmp_path / "chain" / "store") == tmp_path.resolve() / "real/store"
    assert trusted(tmp_path / "real" / ".." / "link") == tmp_path.resolve() / "real"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
def test_a_store_that_everybody_can_write_to(tmp_path: Path, mode: int) -> None:
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(mode)
    with pytest.raises(StoreUntrusted, match="everybody can write"):
        open_store(store)


@pytest.mark.parametrize("name", ["carried", "index", "locks"])
def test_a_folder_in_it_that_everybody_can_write_to(tmp_path: Path, name: str) -> None:
    """What lies in ``carried`` is run, like the environments."""
    store = tmp_path / "store"
    open_store(store)
    (store / name).mkdir(exist_ok=True)
    open_store(store)
    (store / name).chmod(0o777)
    with pytest.raises(StoreUntrusted, match=f"everybody can write to .*/{name}"):
        open_store(store)


def test_a_folder_above_that_everybody_can_write_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StoreUntrusted, match="open"):
        open_store(tmp_path / "open" / "store")
    (tmp_path / "open").chmod(0o1777)
    open_store(tmp_path / "open" / "store")


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUntrusted, match="not a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(StoreUntrusted, match="not a folder"):
        open_store(tmp_path / "file" / "store")


def test_links_that_go_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StoreUntrusted):
        trusted(tmp_path / "a")


@as_root
def test_a_store_of_somebody_else(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    os.chown(store, STRANGER, 0)
    for stores in ({"root": store}, {"root": tmp_path / "own", "read_only": [store]}):
        with pytest.raises(StoreUntrusted, match=f"belongs to user {STRANGER}"):
            open_store(**stores)  # type: ignore[arg-type]


@as_root
def test_a_store_below_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", STRANGER, STRANGER)
    with pytest.raises(StoreUntrusted, match="theirs"):
        open_store(tmp_path / "theirs" / "store")


@as_root
def test_a_symbolic_link_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    os.chown(tmp_path / "link", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(StoreUntrusted, match="symbolic link"):
        open_store(tmp_path / "link" / "store")


@as_root
def test_a_group_of_others_may_not_write(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    os.chown(store, -1, STRANGER)
    store.chmod(0o775)
    with pytest.raises(StoreUntrusted, match=f"group {STRANGER}"):
        open_store(store)


@pytest.mark.parametrize("name", ["envs", "chunks", "locks", "tmp"])
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_folder_of_the_store_that_everybody_can_write_to(tmp_path: Path, name: str, mode: int) -> None:
    open_store(tmp_path / "store")
    (tmp_path / "store" / name).chmod(mode)
    for stores in ({"root": tmp_path / "store"}, {"root": tmp_path / "own", "read_only": [tmp_path / "store"]}):
        with pytest.raises(StoreUntrusted, match=f"everybody can write to .*/{name}"):
            open_store(**stores)  # type: ignore[arg-type]


@as_root
def test_a_folder_of_the_store_that_somebody_else_made_first(tmp_path: Path) -> None:
    (tmp_path / "store/envs").mkdir(parents=True)
    os.chown(tmp_path / "store/envs", STRANGER, STRANGER)
    with pytest.raises(StoreUntrusted, match=f"envs belongs to user {STRANGER}"):
        open_store(tmp_path / "store")


def test_a_folder_of_the_store_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store/envs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreUntrusted, match="envs is not a folder"):
        open_store(tmp_path / "store")


@as_root
def test_a_place_below_tmp_that_somebody_took_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default store of a user whose home is on a network is in ``/var/tmp``, where anybody can make it first."""
    tmp_path.chmod(0o1777)
    store = tmp_path / f"envship-{os.getuid()}"
    store.mkdir(mode=0o700)
    os.chown(store, STRANGER, STRANGER)
    with pytest.raises(StoreUntrusted, match=f"belongs to user {STRANGER}.*ENVSHIP_STORE"):
        open_store(store)


@as_root
def test_a_place_that_somebody_took_in_the_moment_before_we_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    make = os.mkdir

    def late(path: str, mode: int = 0o777, **more: int) -> None:
        make(path, mode, **more)
        if Path(path) == root:
            os.chown(path, STRANGER, STRANGER)
            raise FileExistsError(path)

    monkeypatch.setattr(os, "mkdir", late)
    with pytest.raises(StoreUntrusted, match=str(STRANGER)):
        open_store(root)


def test_a_folder_with_other_files_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter-1.tex").touch()
    with pytest.raises(StoreUntrusted, match=r"it is no store, and holds other files, such as 'chapter-1.tex'"):
        open_store(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter-1.tex"]


def test_a_store_whose_making_was_interrupted_is_finished(tmp_path: Path) -> None:
    (tmp_path / "store/chunks").mkdir(parents=True)
    (tmp_path / "store/tmp").mkdir()
    assert open_store(tmp_path / "store").layout.version.read_text() == "1"


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.mark.parametrize(
    ("entry", "mask", "said"),
    [
        ((0x02, 7, STRANGER), 7, f"user {STRANGER}"),
        ((0x08, 7, STRANGER), 7, f"group {STRANGER}"),
        ((0x02, 5, STRANGER), 7, None),
        ((0x02, 7, STRANGER), 5, None),
        ((0x02, 7, os.getuid()), 7, None),
    ],
)
def test_somebody_whom_an_access_control_list_lets_write(
    tmp_path: Path, entry: tuple[int, int, int], mask: int, said: str | None
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    nobody = 0xFFFFFFFF
    entries = [(0x01, 7, nobody), (0x04, 5, nobody), entry, (0x10, mask, nobody), (0x20, 5, nobody)]
    try:
        os.setxattr(store, "system.posix_acl_access", acl(*sorted(entries)))
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")
    os.chown(store, -1, 0 if os.getuid() == 0 else -1)
    if said is None:
        open_store(store)
    else:
        with pytest.raises(StoreUntrusted, match=rf"{said} can write to .* access control list|members of group"):
            open_store(store)


def test_the_users_own_group_may_write(tmp_path: Path) -> None:
    """Where the umask is 002, as with many distributions, every folder of a user is like that."""
    if not location._is_private(os.getgid()):
        pytest.skip("this user's group has other members")
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o775)
    open_store(store)
