"""Prefixes that files still name, found by what packages recorded of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from envship.sources.former_prefixes import former_prefixes
from envship.sources.tree import Found
from worker_bootstrap.digest import digest_of

PLACEHOLDER = "/placehold/" + "p" * 240
HERE = "/where/it/lies"


class Installed:
    """A folder with files of packages, and what was recorded of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, Found] = {}
        self.records: list[dict[str, Any]] = []

    def add(self, path: str, text: str, prefix: str) -> Path:
        """A package whose one file names *prefix* where *text* has ``@``."""
        place = self._folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text.replace("@", prefix))
        self.files[path] = Found(str(place), os.stat(place))
        digest = digest_of(text.replace("@", PLACEHOLDER).encode())
        entry = {"_path": path, "file_mode": "text", "prefix_placeholder": PLACEHOLDER, "sha256": digest}
        self.records.append({"envship-paths": [entry]})
        return place

    def former(self) -> list[str]:
        return former_prefixes(self.records, self.files, [HERE, HERE])


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


@pytest.mark.parametrize("prefix", ["/opt/app/env", "/env", "/home/me/my envs/one", "/home/mé/env-1.0", "/a/b.c"])
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("bin/script", "#!@/bin/python3\nprint()\n"),
        ("lib/pkgconfig/one.pc", "prefix=@\nlibdir=${prefix}/lib\n"),
        ("lib/config.py", 'PREFIX = "@"\nARGUMENTS = ["-I@/include", "-L@/lib -Wl,-rpath,@/lib"]\n'),
        ("share/flags", "-I/usr/include -I@/include /opt/@/x\n"),
        ("share/sentence", "It lies in (@)."),
        ("share/list", "/usr/lib:@/lib:@/lib/more"),
        ("share/plain", "@"),
    ],
)
def test_what_stands_where_the_placeholder_stood_is_found(
    installed: Installed, path: str, text: str, prefix: str
) -> None:
    installed.add(path, text, prefix)
    assert installed.former() == [prefix]


def test_nothing_is_found_where_files_name_a_prefix_that_is_known(installed: Installed) -> None:
    installed.add("share/one", "in @/share\n", HERE)
    installed.add("share/two", "in @/share\n", PLACEHOLDER)  # as conda-pack leaves it
    assert installed.former() == []


def test_each_prefix_is_found_where_packages_came_before_and_after_a_move(installed: Installed) -> None:
    for number, prefix in enumerate(("/first/place", HERE, "/second/place", "/first/place")):
        installed.add(f"share/{number}", "in @/share\n", prefix)
    assert installed.former() == ["/first/place", "/second/place"]


def test_a_changed_file_says_nothing(installed: Installed) -> None:
    installed.add("share/one", "in @/share\n", "/first/place").write_text("now in /first/place/share\n")
    assert installed.former() == []


def test_a_file_that_is_gone_says_nothing(installed: Installed) -> None:
    installed.add("share/one", "in @/share\n", "/first/place").unlink()
    assert installed.former() == []


def test_the_system_is_no_environment_that_was_moved(installed: Installed) -> None:
    installed.add("share/one", "in @/share\n", "/usr")
    assert installed.former() == []
