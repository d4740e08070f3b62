"""Paths and targets by themselves; what becomes of the hostile ones in a store is in `test_hostile_content`."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_bootstrap.errors import ManifestInvalid
from worker_bootstrap.paths import check_link, check_path

HOSTILE_PATHS = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../b",
    "a/./b",
    "a//b",
    "a/",
    ".",
    "a\0b",
    None,
    3,
    b"a",
    "a" * 4096,
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_path_that_leaves_the_prefix(path: object) -> None:
    with pytest.raises(ManifestInvalid):
        check_path(path)


HOSTILE_TARGETS = ["", "/etc", "..", "../../x", "a/../../..", "x\0", None]
"""Of a link at the top of the prefix."""


@pytest.mark.parametrize("target", HOSTILE_TARGETS)
def test_a_link_that_leaves_the_prefix(target: object) -> None:
    with pytest.raises(ManifestInvalid):
        check_link("link", target)


@pytest.mark.parametrize("target", ["a", "a/b/..", "./a", "..x"])
def test_a_link_that_stays(target: str) -> None:
    assert check_link("link", target) == target
    assert check_link("bin/link", "../" + target) == "../" + target


NO_FILE_NAMES = ["\ud800", "a/\udc00", "\udcc3\udca9"]
"""Surrogates that no byte gives, and two bytes that Python spells as one letter."""


@pytest.mark.parametrize("name", NO_FILE_NAMES)
def test_what_no_file_can_be_named(name: str) -> None:
    with pytest.raises(ManifestInvalid, match="no file can"):
        check_path(name)
    with pytest.raises(ManifestInvalid, match="no file can"):
        check_link("link", name)


@given(st.binary(min_size=1, max_size=20))
def test_every_name_that_a_file_can_have_is_kept(raw: bytes) -> None:
    name = os.fsdecode(raw.replace(b"/", b"_").replace(b"\0", b"_"))
    if name not in (".", ".."):
        assert check_path("folder/" + name) == "folder/" + name
        assert check_link("link", name) == name


def test_a_message_does_not_repeat_megabytes() -> None:
    for call in (check_path, lambda text: check_link("link", text)):
        with pytest.raises(ManifestInvalid) as caught:
            call("../" * 1_000_000)
        assert len(str(caught.value)) < 1000
