from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_bootstrap.manifest import Relocation
from worker_bootstrap.relocate import SHEBANG_LIMIT_BYTES, RelocationError, fits, relocate, restore

OLD = "/old/placeholder" + "_plac" * 10
TEXT, BINARY = Relocation("text", OLD), Relocation("binary", OLD)
O = OLD.encode()  # noqa: E741

# Neither part can hold a prefix, or make one with its neighbour.
fragments = st.binary(max_size=12).filter(lambda data: b"/" not in data)
new_prefixes = st.text("abcxyz0189-. é", min_size=1, max_size=30).map(lambda name: "/n/" + name.strip("/ ") + "x")


@given(st.lists(fragments, max_size=6), new_prefixes)
def test_text_there_and_back(parts: list[bytes], prefix: str) -> None:
    data = O.join(parts)
    moved = relocate(data, TEXT, prefix)
    assert O not in moved
    assert restore(moved, TEXT, prefix) == data


@given(st.lists(fragments, max_size=6), st.binary(max_size=3), new_prefixes)
def test_binary_there_and_back(parts: list[bytes], tail: bytes, prefix: str) -> None:
    data = O.join(parts) + b"\0" + tail
    moved = relocate(data, BINARY, prefix)
    assert len(moved) == len(data)
    assert O not in moved
    assert restore(moved, BINARY, prefix) == data


@given(st.sampled_from(["python3.11", "python", "perl"]), st.sampled_from(["", " -E", " -s -u"]), fragments)
def test_a_long_python_shebang_there_and_back(name: str, arguments: str, rest: bytes) -> None:
    prefix = "/p" * 50
    data = b"#!" + O + f"/bin/{name}{arguments}\n".encode() + rest
    assert restore(relocate(data, TEXT, prefix), TEXT, prefix) == data


def test_several_occurrences_in_one_string_are_padded_at_its_end() -> None:
    data = b"\x7fELF\0" + O + b"/lib:" + O + b"/share\0next\0"
    moved = relocate(data, BINARY, "/new")
    room = 2 * (len(OLD) - 4)
    assert moved == b"\x7fELF\0/new/lib:/new/share" + b"\0" * room + b"\0next\0"
    assert restore(moved, BINARY, "/new") == data


def test_a_string_that_ends_with_the_file() -> None:
    data = b"\0" + O + b"/lib"
    moved = relocate(data, BINARY, "/new")
    assert moved == b"\0/new/lib" + b"\0" * (len(OLD) - 4)
    assert restore(moved, BINARY, "/new") == data


def test_a_prefix_of_equal_length_needs_no_padding() -> None:
    prefix = "/" + "x" * (len(OLD) - 1)
    assert relocate(O + b"/lib\0rest", BINARY, prefix) == prefix.encode() + b"/lib\0rest"


def test_a_prefix_too_long_for_a_binary_file() -> None:
    prefix = OLD + "x"
    assert fits(TEXT, prefix) and not fits(BINARY, prefix)
    with pytest.raises(RelocationError) as caught:
        relocate(O + b"\0", BINARY, prefix)
    assert caught.value.room_bytes == len(OLD)


def test_lengths_are_those_of_the_encoded_path() -> None:
    assert not fits(Relocation("binary", "/abcd"), "/éé" + "a")


def test_a_path_that_is_no_utf8() -> None:
    assert relocate(O + b"/x", TEXT, os.fsdecode(b"/caf\xe9")) == b"/caf\xe9/x"


def test_a_string_without_padding_is_left_alone_when_restored() -> None:
    assert restore(b"/new/lib\0next", BINARY, "/new") == b"/new/lib\0next"


def test_the_nul_that_ends_a_string_is_no_padding() -> None:
    data = b"/new/lib" + b"\0" * (len(OLD) - 4) + b"next"
    assert restore(data, BINARY, "/new") == data


def test_a_shebang_that_fits_stays_a_shebang() -> None:
    assert relocate(b"#!" + O + b"/bin/python -E\nx\n", TEXT, "/new") == b"#!/new/bin/python -E\nx\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bin/Rscript", "Rscript"),
        ("bin/perl -w", "-S perl -w"),
        ("bin/bash  -eu ", "-S bash -eu"),
        ("bin/awk -f", "-S awk -f"),
        ("bin/perl -s$x 'y", "-S perl '-s$x \\'y'"),
    ],
)
def test_a_long_shebang_of_another_interpreter_goes_by_path_with_its_arguments(line: str, expected: str) -> None:
    moved = relocate(b"#!" + O + f"/{line}\nx\n".encode(), TEXT, "/n" * 90)
    assert moved == f"#!/usr/bin/env {expected}\nx\n".encode()


def test_an_interpreter_outside_of_the_prefix_stays_with_all_its_arguments() -> None:
    moved = relocate(b"#!/bin/bash --rcfile=" + O + b"/etc/rc\nx\n", TEXT, "/n" * 90)
    assert moved == b"#!/bin/bash --rcfile=" + b"/n" * 90 + b"/etc/rc\nx\n"


@pytest.mark.parametrize("folder", ["with a space", "x" * 150, "plain"])
def test_a_script_keeps_its_encoding(tmp_path: Path, folder: str) -> None:
    """Python looks for it in the first two lines only."""
    prefix = tmp_path / folder
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").symlink_to(sys.executable)
    data = b"#!" + O + b"/bin/python\n# -*- coding: latin-1 -*- of " + O + b"\nprint(ascii('\xe9'))\n"
    script = prefix / "bin" / "tool"
    script.write_bytes(relocate(data, TEXT, str(prefix)))
    script.chmod(0o755)
    assert subprocess.run([script], capture_output=True, text=True, check=True).stdout == "'\\xe9'\n"
    assert restore(script.read_bytes(), TEXT, str(prefix)) == data


def test_the_other_quotes_of_uv_are_undone() -> None:
    script = b"#!/bin/sh\n'''exec' '/a b/bin/python' \"$0\" \"$@\"\n' '''\nx\n"
    assert restore(script, TEXT, "/a b") == b"#!" + O + b"/bin/python\nx\n"


@pytest.mark.parametrize("folder", ["with a space", "x" * 150, "plain"])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("bash", "#!{}/bin/bash -e\necho before $1\nfalse\necho after\n", "before it\n"),
        ("perl", "#!{}/bin/perl -l\nprint 'no newline of its own';\n", "no newline of its own\n"),
        ("sed", "#!{}/bin/sed -nf\n$=\n", "2\n"),
    ],
)
def test_the_arguments_of_an_interpreter_have_their_effect(
    tmp_path: Path, folder: str, name: str, text: str, expected: str
) -> None:
    interpreter = shutil.which(name)
    if interpreter is None:
        pytest.skip(f"there is no {name} on this machine")
    prefix = tmp_path / folder
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / name).symlink_to(interpreter)
    script = prefix / "bin" / "tool"
    script.write_bytes(relocate(text.format(OLD).encode(), TEXT, str(prefix)))
    script.chmod(0o755)
    (tmp_path / "it").write_text("one\ntwo\n")
    environ = {"PATH": f"{prefix}/bin:/usr/bin:/bin"}
    done = subprocess.run([script, "it"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == expected, done.stderr


@pytest.mark.parametrize("folder", ["with a space", "x" * 150, "plain", "ünï"])
def test_a_relocated_script_runs(tmp_path: Path, folder: str) -> None:
    """Through the kernel and a shell, with its arguments, also where the first line would be too long or has spaces."""
    prefix = tmp_path / folder
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/python3").symlink_to(sys.executable)
    script = prefix / "bin/tool"
    source = (
        b"#!"
        + O
        + b"/bin/python3 -E\n# -*- coding: utf-8 -*-\nimport sys\nprint(sys.argv[1:], sys.flags.ignore_environment)\n"
    )
    script.write_bytes(relocate(source, TEXT, str(prefix)))
    script.chmod(0o755)
    done = subprocess.run([script, "one", "two words"], capture_output=True, text=True, check=True)
    assert done.stdout == "['one', 'two words'] 1\n"
    first = script.read_bytes().split(b"\n")[0]
    assert len(first) <= SHEBANG_LIMIT_BYTES
