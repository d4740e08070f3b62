"""Regular expressions and generated source that are kept, compiled, from one interpreter to the next."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from .interpreters import other_minors

ROOT = Path(__file__).parents[1]
PATTERNS = [
    ["a(?P<name>b+)?c", 0],
    ["(?i:straße|[À-ž]{2,5}?)(?=x)", 2],
    [r"^\s*(?P<key>\w+)\s*=\s*(['\"])(?P<value>.*?)\2\s*$", 8],
    ["(?:[^\\x00-\\u1234]|(?<!q)z)*", 64],
    [r"\d+ # digits", 64],
    ["", 0],
]
TEXTS = ["abbbc", "STRASSE STRAßEx", "key = 'value'\nk='v'", "z" * 9, "12 34", ""]
PROGRAM = """
import dataclasses, json, os, re, resource, sys
sys.path[:0] = [sys.argv[1]]
from worker_bootstrap import compiled

compiler = sys.modules.get("re._compiler") or sys.modules["sre_compile"]
parser = compiler._parser if hasattr(compiler, "_parser") else compiler.sre_parse
parsed, parse = [], parser.parse
def counting(text, *more):
    parsed.append(text)
    return parse(text, *more)
parser.parse = counting

asked, texts, limit = json.loads(sys.argv[3])
if limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
re.purge()
with compiled.kept(sys.argv[2]):
    made = [re.compile(text, flags) for text, flags in asked]
    bytes_too = re.compile(b"a(b)")
count = len(parsed)
re.purge()
for (text, flags), pattern in zip(asked, made):
    fresh = re.compile(text, flags)
    assert fresh == pattern and fresh.groupindex == pattern.groupindex and fresh.groups == pattern.groups, text
    for line in texts:
        assert [m.groups() for m in fresh.finditer(line)] == [m.groups() for m in pattern.finditer(line)], text
assert bytes_too.fullmatch(b"ab")[1] == b"b"
assert len(parsed) == count + len(asked), "they are compiled as always after the block"
print(count)
"""


def compiles(
    folder: Path, python: str = sys.executable, patterns: Sequence[Any] = PATTERNS, limit: int | None = None
) -> int:
    """How many patterns an interpreter compiles that has *folder*; it compares them with what it compiles afresh."""
    asked = json.dumps([patterns, TEXTS, limit])
    command = [python, "-c", PROGRAM, str(ROOT), str(folder), asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


ALL = len(PATTERNS) + 1
"""With the one of bytes, which are not kept."""


@pytest.mark.parametrize("python", [sys.executable, *other_minors().values()])
def test_what_was_compiled_once_is_not_compiled_again_and_is_the_same(tmp_path: Path, python: str) -> None:
    assert compiles(tmp_path, python) == ALL
    (kept,) = tmp_path.iterdir()
    assert compiles(tmp_path, python) == 1
    more = [*PATTERNS, ["another", 0], ["a(?P<name>b+)?c", 2]]
    assert compiles(tmp_path, python, more) == 3
    assert list(tmp_path.iterdir()) == [kept]


def test_each_build_of_python_has_a_file_of_its_own(tmp_path: Path) -> None:
    pythons = list(dict.fromkeys([sys.executable, *other_minors().values()]))
    assert [compiles(tmp_path, python) for python in pythons] == [ALL] * len(pythons)
    assert len(list(tmp_path.iterdir())) == len(pythons)


@pytest.mark.parametrize("damage", ["empty", "cut short", "one bit", "rubbish"])
def test_a_damaged_file_is_not_used_and_is_written_anew(tmp_path: Path, damage: str) -> None:
    compiles(tmp_path)
    (kept,) = tmp_path.iterdir()
    good = kept.read_bytes()
    middle = len(good) // 2
    kept.write_bytes(
        {
            "empty": b"",
            "cut short": good[:middle],
            "one bit": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "rubbish": b"\0" * len(good),
        }[damage]
    )
    assert compiles(tmp_path) == ALL
    assert kept.read_bytes() == good
    assert compiles(tmp_path) == 1


def test_code_that_this_python_does_not_take_is_compiled(tmp_path: Path) -> None:
    """Whole as it is, the file may still be another's: the function in C refuses code that it would fall over."""
    import marshal
    import zlib

    compiles(tmp_path)
    (kept,) = tmp_path.iterdir()
    known = marshal.loads(kept.read_bytes()[4:])
    patterns = {key: (flags, [9999], *more) for key, (flags, _, *more) in known["patterns"].items()}
    wrong = marshal.dumps({**known, "patterns": patterns})
    kept.write_bytes(zlib.crc32(wrong).to_bytes(4, "big") + wrong)
    assert compiles(tmp_path) == ALL


def test_nothing_half_written_is_left_on_a_full_disk(tmp_path: Path) -> None:
    assert compiles(tmp_path, limit=100) == ALL
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    assert compiles(tmp_path / "nowhere") == ALL
    assert not (tmp_path / "nowhere").exists()


def test_many_at_once_leave_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(tmp_path), json.dumps([PATTERNS, TEXTS, None])]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(6)]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert len(list(tmp_path.iterdir())) == 1
    assert compiles(tmp_path) == 1


CLASSES = """
import collections, dataclasses, sys, typing
sys.path[:0] = [sys.argv[1]]
from worker_bootstrap import compiled

texts = []
sys.addaudithook(lambda event, given: texts.append(given) if event == "compile" else None)

def classes(extra):
    @dataclasses.dataclass(order=True)
    class Point:
        x: int
        y: float = 2.5
        names: list = dataclasses.field(default_factory=list, compare=False)

    @dataclasses.dataclass(frozen=True)
    class Frozen:
        x: int
        y: float
        z: "int | None" = None

    if extra:
        dataclasses.dataclass(type("Another", (), {"__annotations__": {"other": int}}))
    return Point, Frozen, collections.namedtuple("Pair", ["left", "right"], defaults=[7])

def seen(made):
    point, frozen, pair = made
    one, other = point(1), point(1, 3.5, ["a"])
    still = frozen(1, 2.0, z=4)
    try:
        still.z = 5
    except dataclasses.FrozenInstanceError as error:
        refused = str(error)
    return [one, other, one < other, one == point(1, 2.5, ["b"]), still,
        hash(still) == hash(frozen(1, 2.0, z=4)), refused, pair(1), pair(left=3, right=4)._asdict(), point.__doc__,
        pair.__new__.__doc__, point.__init__.__code__.co_filename, point.__init__.__module__]

with compiled.kept(sys.argv[2]):
    made = classes(extra=len(sys.argv) > 3)
count = len(texts)
fresh = classes(False)
assert len(texts) > count, "what is generated is compiled as always after the block"
assert "exec" not in vars(dataclasses) and "eval" not in vars(collections)
assert list(map(repr, seen(made))) == list(map(repr, seen(fresh))), (seen(made), seen(fresh))
print(count)
"""


@pytest.mark.parametrize("python", [sys.executable, *other_minors().values()])
def test_methods_of_data_classes_are_not_compiled_again_and_are_the_same(tmp_path: Path, python: str) -> None:
    def compiles(*more: str) -> int:
        command = [python, "-c", CLASSES, str(ROOT), str(tmp_path), *more]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert compiles() >= 3
    (kept,) = tmp_path.iterdir()
    data = kept.read_bytes()
    assert compiles() == 0
    assert compiles("another") >= 1
    assert kept.read_bytes() == data
    kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert compiles() >= 3
    assert kept.read_bytes() == data
