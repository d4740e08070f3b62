"""Where the bytes of an environment are."""

from __future__ import annotations

from envship.options import PackOptions
from envship.sources.draft import Draft, MadeItem
from envship.usage import Part, usage_of

SIZES = {
    "lib/python3.11/site-packages/big/core.so": 600,
    "lib/python3.11/site-packages/big/tests/test_a.py": 200,
    "lib/python3.11/site-packages/big/tests/data/x.csv": 100,
    "lib/python3.11/site-packages/small/__init__.py": 5,
    "lib/libz.so.1.2.3": 50,
    "include/z.h": 40,
    "readme": 5,
}


def test_every_byte_is_counted_once_by_kind_and_by_folder() -> None:
    used = usage_of(SIZES)
    for parts in (used.kinds, used.folders):
        assert sum(part.size_bytes for part in parts) == sum(SIZES.values())
        assert sum(part.files for part in parts) == len(SIZES)
        assert [part.size_bytes for part in parts] == sorted((part.size_bytes for part in parts), reverse=True)
    assert used.kinds[0] == Part("compiled libraries", 2, 650)
    assert Part("sources and headers", 1, 40) in used.kinds
    assert Part("lib/python3.11/site-packages/big/", 1, 600) in used.folders
    assert Part("lib/python3.11/site-packages/big/tests/data/", 1, 100) in used.folders
    # Too small to be a line of its own: counted with what is around it.
    assert Part("lib/python3.11/site-packages/", 1, 5) in used.folders
    assert Part("", 1, 5) in used.folders


def test_what_could_be_left_out_is_what_its_patterns_leave_out() -> None:
    for part in usage_of(SIZES).unneeded:
        draft = Draft("x", "", "", "files", [MadeItem(path, b"") for path in SIZES])
        (left,) = PackOptions(tuple(("exclude", pattern) for pattern in part.patterns)).chosen([draft])
        gone = SIZES.keys() - {item.path for item in left.items}
        assert part.files == len(gone) > 0
        assert part.size_bytes == sum(SIZES[path] for path in gone)
    assert {part.name for part in usage_of(SIZES).unneeded} == {"tests of packages", "headers"}
