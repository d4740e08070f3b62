"""What a user may say about a pack: filters as conda-pack has them, editable projects left out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import conda_pack
import pytest
from click.testing import CliRunner

from envship.cli.packed_as import PackingCommand
from envship.errors import SourceProblems
from envship.options import Filter, PackOptions
from envship.pack import pack
from envship.sources.plan import plan
from envship.sources.tree import Trees
from worker_bootstrap.store import Store

from .contents import all_entries
from .prefixes import onlyhere_wheel, small_venv

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def paths(prefix: Path, store: Store, *filters: Filter, ignore_editable: bool = False) -> set[str]:
    """What of ``onlyhere`` a pack with these options holds, besides its metadata."""
    environment = pack(prefix, store=store, options=PackOptions(filters, ignore_editable=ignore_editable))
    return {
        path.rpartition("/")[2] for path in all_entries(environment) if "onlyhere" in path and ".dist-info" not in path
    }


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ([("exclude", "*/onlyhere.py")], set()),
        ([("exclude", "*.pyc")], {"onlyhere.py"}),
        ([("exclude", "lib/*"), ("include", "*/onlyhere.py")], {"onlyhere.py"}),
        ([("include", "*/onlyhere.py"), ("exclude", "lib/*")], set()),
        ([("exclude", "onlyhere.py")], {"onlyhere.py", f"onlyhere.{sys.implementation.cache_tag}.pyc"}),
    ],
)
def test_filters_work_in_their_order_and_byte_code_goes_with_its_module(
    venv: Path, shared_store: Store, filters: Sequence[Filter], left: set[str]
) -> None:
    assert paths(venv, shared_store, *filters) == left


@pytest.mark.parametrize(
    "filters",
    [
        [("exclude", "*.py")],
        [("exclude", "lib/*"), ("include", "lib/python*/site-packages/*"), ("exclude", "*/config.py")],
        [("include", "*"), ("exclude", "bin/mini-?so*"), ("exclude", "share")],
        [("exclude", "share/[!d]*"), ("include", "share/libmini/*.conf"), ("exclude", "*.CONF")],
        [("exclude", "*/deep/*"), ("exclude", "lib/libmini.so"), ("include", "*[so]"), ("exclude", "conda-meta/lib*")],
    ],
)
def test_filters_leave_what_those_of_conda_pack_leave(conda_pair: tuple[Path, Path], filters: Sequence[Filter]) -> None:
    theirs = conda_pack.CondaEnv.from_prefix(str(conda_pair[0]))
    before = len(theirs)
    for kind, pattern in filters:
        theirs = theirs.exclude(pattern) if kind == "exclude" else theirs.include(pattern)
    assert 0 < len(theirs) < before
    drafts = plan(conda_pair[0], Trees(), PackOptions(tuple(filters))).drafts
    ours = {item.path for draft in drafts for item in draft.items}
    unlike = {path for path in ours ^ {file.target for file in theirs} if not path.endswith(".pyc")}
    assert unlike <= {"conda-meta/history", "CACHEDIR.TAG"}


@pytest.mark.heavy
def test_options_do_not_mix_in_the_index(venv: Path, store: Store) -> None:
    filters: list[Filter] = [("exclude", "*/onlyhere.py")]
    assert paths(venv, store) != set()
    for _ in range(2):
        assert paths(venv, store, *filters) == set()
        assert paths(venv, store) != set()


def test_editable_projects_may_stay_away(tmp_path: Path, store: Store) -> None:
    prefix = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    info = prefix / SITE / "onlyhere-1.0.dist-info"
    (info / "direct_url.json").write_text('{"url": "file:///home/me/onlyhere", "dir_info": {"editable": true}}')
    (tmp_path / "elsewhere").mkdir()
    (prefix / SITE / "elsewhere.pth").write_text(f"{tmp_path}/elsewhere\n")
    (prefix / SITE / "inside.pth").write_text("vendored\n")
    (prefix / SITE / "vendored").mkdir()
    with pytest.raises(SourceProblems) as caught:
        pack(prefix, store=store)
    assert len(caught.value.problems) == 1
    assert paths(prefix, store, ignore_editable=True) == set()
    kept = all_entries(pack(prefix, store=store, options=PackOptions(ignore_editable=True)))
    assert [path.rpartition("/")[2] for path in kept if path.endswith(".pth")] == ["inside.pth"]


def test_the_command_line_keeps_the_order_of_filters() -> None:
    told: list[Any] = []

    @click.command(cls=PackingCommand)
    @click.argument("source", required=False)
    def command(source: str | None, packed_as: PackOptions) -> None:
        told.append((source, packed_as))

    line = ["--exclude", "a*", "here", "--include", "ab", "--ignore-editable", "--exclude=b"]
    result = CliRunner().invoke(command, line)
    assert result.exit_code == 0, result.output
    filters: tuple[Filter, ...] = (("exclude", "a*"), ("include", "ab"), ("exclude", "b"))
    assert told == [("here", PackOptions(filters, ignore_editable=True))]
    assert CliRunner().invoke(command, ["--include"]).exit_code == 2
