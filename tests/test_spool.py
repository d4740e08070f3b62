"""Environments with very many files: what is planned of them lies in a file, and memory stays small."""

from __future__ import annotations

import os
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from envship import spool
from envship.canonical import Own
from envship.options import NO_OPTIONS
from envship.pack import pack
from envship.packer import Packer
from envship.scan_index import ScanIndex
from envship.sources.draft import Draft, Item, MadeItem
from envship.sources.tree import Root, Trees
from worker_bootstrap.store import Store

from .contents import all_entries
from .prefixes import onlyhere_wheel, small_venv

MANY = 300_000


def test_items_come_back_in_order_whoever_reads_them(tmp_path: Path) -> None:
    items: list[Item] = [MadeItem(f"{number:05}", b"x") for number in reversed(range(2500))]
    drafts = [Draft("one", "1", "", "files", items), Draft("none", "1", "", "files", [])]
    with spool.Spool(tmp_path) as file:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spool, "HELD_ITEMS", 2499)
            assert file.take_over(drafts)
        one, none = (draft.items for draft in drafts)
        assert (len(one), len(none), list(none)) == (2500, 0, [])
        with ThreadPoolExecutor(3) as readers:
            assert list(readers.map(list, [one] * 3)) == [items[::-1]] * 3
        assert items[7] in one and MadeItem("else", b"") not in one
    assert os.listdir(tmp_path) == []


def test_few_items_are_left_where_they_are(tmp_path: Path) -> None:
    items = [MadeItem("a", b"")]
    drafts = [Draft("one", "1", "", "files", items)]
    with spool.Spool(tmp_path) as file:
        assert not file.take_over(drafts)
    assert drafts[0].items is items


def test_an_environment_with_very_many_files_is_the_same_environment(
    conda_pair: tuple[Path, Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kinds of items there are; also when it is packed again, with some packages known."""
    prefix = conda_pair[0]
    expected = pack(prefix, store=store).id
    for index in (ScanIndex.none(store), ScanIndex.load(store, str(prefix), NO_OPTIONS)):
        monkeypatch.setattr(spool, "HELD_ITEMS", 0)
        assert Packer(store, NO_OPTIONS, None).pack(prefix, Trees(), index) == expected


def test_a_walk_that_is_kept_takes_half_the_memory_and_finds_the_same() -> None:
    root = Root(os.path.dirname(os.__file__), ("site-packages", "test"))
    taken, walks, fingerprints = [], [], []
    for slim in (False, True):
        trees = Trees(slim=slim)
        tracemalloc.start()
        try:
            walks.append(trees.walk(root))
            taken.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        fingerprints.append(trees.fingerprint())
    assert walks[0].keys() == walks[1].keys()
    assert fingerprints[0] == fingerprints[1]
    assert taken[1] < 0.6 * taken[0]
    assert not hasattr(Own(()), "__dict__"), "there is one for each file"


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="what forks share is told by Linux only")
def test_an_environment_with_very_many_files_takes_no_more_than_400_mb(store: Store, tmp_path: Path) -> None:
    """Of all processes together."""
    prefix = small_venv(tmp_path / "env", [onlyhere_wheel(tmp_path)])
    for number in range(MANY // 1000):
        folder = prefix / "share" / "a-folder-of-data" / f"and-a-folder-in-it-{number:03}"
        folder.mkdir(parents=True)
        for inner in range(1000):
            (folder / f"a-small-file-{inner:03}.txt").write_text(f"{number} {inner}")
    with peak_of_children() as peak:
        environment = pack(prefix, store=store)
    assert len(all_entries(environment)) > MANY
    assert 50e6 < peak[0] < 400e6


@contextmanager
def peak_of_children() -> Iterator[list[float]]:
    """The most memory in bytes that the processes held together that were started meanwhile."""
    peak, ended = [0.0], threading.Event()

    def held(process: psutil.Process) -> float:
        try:
            return float(process.memory_full_info().pss)
        except psutil.Error:
            return 0.0

    def sample() -> None:
        while not ended.wait(0.05):
            peak[0] = max(peak[0], sum(map(held, psutil.Process().children(recursive=True))))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
