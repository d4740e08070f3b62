"""What users hold: sizes, versions, how it prints, and everything that names an environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from envship.environment import Environment, guess, resolve
from envship.errors import SourceNotFound
from envship.options import NO_OPTIONS, PackOptions
from envship.pack import pack
from worker_bootstrap.errors import EnvironmentMissing
from worker_bootstrap.manifest import Manifest
from worker_bootstrap.store import Store

from .environments import environment_of, package_of


@pytest.fixture
def little(store: Store) -> Environment:
    packages = [
        package_of(store, {"a.py": b"x = 1\n"}, name="dask", version="2026.8.0"),
        package_of(store, {"<b>": b"y" * 5000}, name="<script>", version="1"),
    ]
    packages = [package._replace(kind="pypi") for package in packages]
    return Environment(environment_of(store, packages), store)


def test_it_says_what_it_is(little: Environment) -> None:
    assert little.id == little.manifest.id
    assert little.nbytes == 5006
    assert little.versions == {"python": "3.11.7", "dask": "2026.8.0", "distributed": None}
    assert [package.name for package in little.packages] == ["<script>", "dask"]
    assert little.chunks == little.manifest.chunks
    assert little.id[:16] in repr(little)
    assert "dask 2026.8.0" in repr(little)
    assert "2 packages" in repr(little)


def test_dask_may_be_there_without_the_package_of_that_name(store: Store) -> None:
    """conda-forge has its code in ``dask-core``; its ``dask`` only asks for that and for all that is optional."""
    packages = [
        package_of(store, {f"{name}.py": b"x = 1\n"}, name=name, version=version)._replace(kind="conda")
        for name, version in (("dask-core", "2026.8.0"), ("dask", "2026.8.1"))
    ]
    assert Environment(environment_of(store, packages[:1]), store).versions["dask"] == "2026.8.0"
    assert Environment(environment_of(store, packages), store).versions["dask"] == "2026.8.1"


def test_its_html_escapes_what_packages_call_themselves(little: Environment) -> None:
    text = little._repr_html_()
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


def test_equal_means_the_same_id(little: Environment, store: Store) -> None:
    assert Environment.open(little.id, store) == little
    assert hash(Environment.open(little.id, store)) == hash(little)
    assert little != Environment(Manifest("linux-64", "3.11.7", ()), store)


def test_everything_that_names_an_environment_is_resolved(
    little: Environment, store: Store, tmp_path: Path, venv: Path, shared_store: Store
) -> None:
    bundle = little.save(tmp_path / "little.envship")
    for source in (little, little.id, little.id[:8], little.id[:20], bundle, str(bundle)):
        assert resolve(source, store=store) == little
    assert resolve(venv, store=shared_store) == resolve(str(venv), store=shared_store) == pack(venv, store=shared_store)


def test_what_names_none_is_an_error(little: Environment, store: Store, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMissing):
        resolve("0" * 64, store=store)
    with pytest.raises(EnvironmentMissing):
        Environment.open(little.id[:10], store)
    for source in ("0" * 12, tmp_path / "none.envship", "no-such-name"):
        with pytest.raises(SourceNotFound):
            resolve(source, store=store)


def test_what_will_be_found_is_guessed(
    little: Environment, venv: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVSHIP_STORE", str(store.layout.root))
    assert guess(little, NO_OPTIONS) == little.id
    assert guess(little.id, NO_OPTIONS) == little.id
    assert guess(venv, NO_OPTIONS) is None, "it was never packed"
    packed = pack(venv, store=store)
    assert guess(venv, NO_OPTIONS) == packed.id
    assert guess(venv, PackOptions(ignore_missing=True)) is None, "nor with these options"
    for wrong in (venv / "missing", "nothing-of-that-name", "a\0b", 7):
        assert guess(wrong, NO_OPTIONS) is None, wrong  # type: ignore[arg-type]


def test_a_prefix_of_two_ids_is_ambiguous(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "environments", lambda: ["ab" * 32, "ab" * 31 + "cd"])
    with pytest.raises(SourceNotFound, match="2 ids"):
        resolve("abababab", store=store)
