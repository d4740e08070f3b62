"""What files become: recorded originals, text with one placeholder, binary files as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from envship import elf
from envship.canonical import PLACEHOLDER, Own, Recorded, Rewritten, Undigested, names_prefix
from worker_bootstrap.digest import digest_of
from worker_bootstrap.manifest import Relocation
from worker_bootstrap.relocate import relocate

from .elf_files import elf_file

LONG = "/placeholder/" + "p" * 200
HERE = "/home/me/env"


def test_text_that_names_its_prefix_is_the_same_from_every_prefix() -> None:
    texts = [
        f"#!{prefix}/bin/python\nhome = {prefix}/share\n".encode() for prefix in (HERE, "/opt/a/much/longer/place")
    ]
    one, other = (
        Own((prefix,), "bin/x")(text) for prefix, text in zip((HERE, "/opt/a/much/longer/place"), texts, strict=True)
    )
    assert one == other
    assert one.relocation == Relocation("text", PLACEHOLDER)
    assert relocate(one.data, one.relocation, HERE) == texts[0]


@pytest.mark.parametrize("text", ["/home/me/env2/lib", "/home/me/env-old", "/home/me/env.bak/x", "/home/me/envé"])
def test_longer_names_do_not_name_the_prefix(text: str) -> None:
    assert Own((HERE,))(text.encode()).relocation is None
    assert not names_prefix(text.encode(), (HERE,))


@pytest.mark.parametrize("text", ["/home/me/env", "in /home/me/env.", "-L/home/me/env/lib", "a:/home/me/env:b"])
def test_the_prefix_itself_does(text: str) -> None:
    assert Own((HERE,))(text.encode()).relocation is not None
    assert names_prefix(text.encode(), (HERE,))


@pytest.mark.parametrize(
    "text",
    [
        "#!/usr/bin/env sh",
        "~/env/x",
        "${HOME}/env",
        "$(pwd)/env",
        "http://env/",
        "../env",
        "x-/env",
        "*/env",
        "ab-I/env",
    ],
)
def test_what_only_ends_like_a_short_prefix_does_not_name_it(text: str) -> None:
    assert Own(("/env",), "bin/x")(text.encode()).relocation is None
    assert not names_prefix(text.encode(), ("/env",))


@pytest.mark.parametrize(
    "text",
    [
        *("/env", "'/env'", "#!/env/bin/tool", "file:///env/x", "cc -I/env/include", "-L/env/lib", '["-L/env/lib"]'),
        *(
            "PATH=/env/bin",
            "/bin:/env/bin",
            "-isystem/env/i",
            r'"\n/env"',
            "-Wl,-rpath,/env/lib",
            "(/env)",
            "x\n/env/x",
        ),
        "#!/usr/bin/env /env/bin/tool",
    ],
)
def test_a_short_prefix_is_found_where_a_path_begins(text: str) -> None:
    content = Own(("/env",), "bin/x")(text.encode())
    assert content.relocation is not None
    assert (
        relocate(content.data, content.relocation, "/some/where")
        == text.replace("/env", "/some/where").replace("bin/some/where", "bin/env").encode()
    )
    assert names_prefix(text.encode(), ("/env",))


def test_a_recorded_text_may_hold_what_ends_like_a_short_prefix() -> None:
    original = f"#!/usr/bin/env sh\nexec {LONG}/bin/tool\n".encode()
    relocation = Relocation("text", LONG)
    recorded = Recorded(digest_of(original), relocation, Own(("/env",)))
    assert recorded(relocate(original, relocation, "/env"))[:2] == (original, relocation)


def test_a_text_that_holds_the_placeholder_itself_still_comes_back() -> None:
    text = f"{PLACEHOLDER} is not {HERE}\n".encode()
    content = Own((HERE,))(text)
    assert content.relocation is not None
    assert relocate(content.data, content.relocation, HERE) == text
    assert relocate(content.data, content.relocation, "/new") == f"{PLACEHOLDER} is not /new\n".encode()


def test_of_the_systems_prefix_only_the_interpreter_of_a_script_moves() -> None:
    script = b"#!/usr/bin/python3.11\nopen('/usr/share/zoneinfo')\n"
    content = Own(("/usr",), "bin/x")(script)
    assert content.relocation is not None
    assert relocate(content.data, content.relocation, "/new") == script.replace(b"#!/usr", b"#!/new")
    assert Own(("/usr",), "bin/x")(b"#!/usr/bin/env python\n").relocation is None
    assert Own(("/usr",), "lib/x.py")(script).relocation is None


def test_a_script_whose_path_was_too_long_for_a_shebang_gets_its_plain_form_back() -> None:
    long = "/" + "x" * 150
    body = b"import sys\n"
    wrapped = f"#!/bin/sh\n'''exec' {long}/bin/python \"$0\" \"$@\"\n' '''\n".encode() + body
    assert Own((long,), "bin/x")(wrapped) == Own((HERE,), "bin/x")(f"#!{HERE}/bin/python\n".encode() + body)


def test_binary_files_that_nobody_recorded_keep_their_bytes() -> None:
    data = b"\0pickle\0" + HERE.encode() + b"\0"
    assert Own((HERE,))(data)[:2] == (data, None)


@pytest.mark.parametrize("mode", ["text", "binary"])
def test_a_recorded_file_turns_back_into_its_original(mode: str) -> None:
    ending = b"\0\0tail" if mode == "binary" else b"\n"
    original = b"a " + LONG.encode() + b"/lib:" + LONG.encode() + b"/bin" + ending
    relocation = Relocation(mode, LONG)
    installed = relocate(original, relocation, HERE)
    assert installed != original
    assert Recorded(digest_of(original), relocation, Own((HERE,)))(installed)[:2] == (original, relocation)


@pytest.mark.parametrize("mode", ["text", "binary"])
def test_without_a_digest_the_same_comes_from_an_installed_file_and_from_the_original(mode: str) -> None:
    original = b"\0a " + LONG.encode() + b"/lib:" + LONG.encode() + b"/bin\0\0tail"
    if mode == "text":
        original = original.replace(b"\0", b"\n")
    relocation = Relocation(mode, LONG)
    treatment = Undigested(relocation, Own((HERE,), "lib/x"))
    content = treatment(relocate(original, relocation, HERE))
    assert content == treatment(original)
    assert content.relocation == (relocation if mode == "binary" else Relocation("text", PLACEHOLDER))
    assert relocate(content.data, content.relocation, "/new") == relocate(original, relocation, "/new")


def test_a_binary_file_without_room_for_the_placeholder_is_content_of_its_own() -> None:
    packed_tight = b"\0" + HERE.encode() + b"/lib\0tail"
    assert Undigested(Relocation("binary", LONG), Own((HERE,)))(packed_tight)[:2] == (packed_tight, None)


def test_a_recorded_text_that_was_edited_is_content_of_its_own() -> None:
    relocation = Relocation("text", LONG)
    content = Recorded(digest_of(b"prefix=" + LONG.encode()), relocation, Own((HERE,)))(b"edited prefix=/home/me/env\n")
    assert content[:2] == (f"edited prefix={PLACEHOLDER}\n".encode(), Relocation("text", PLACEHOLDER))


def test_a_recorded_binary_that_was_edited_keeps_its_room() -> None:
    relocation = Relocation("binary", LONG)
    original = b"\0" + LONG.encode() + b"/lib\0code"
    edited = relocate(original, relocation, HERE).replace(b"code", b"sign")
    content = Recorded(digest_of(original), relocation, Own((HERE,)))(edited)
    assert content[:2] == (original.replace(b"code", b"sign"), relocation)


def test_a_file_without_prefix_that_was_edited_is_packed_as_it_is() -> None:
    assert Recorded(digest_of(b"original"), None, Own((HERE,)))(b"edited")[:2] == (b"edited", None)


def test_rewritten_content_is_relocated_where_asked() -> None:
    treatment = Rewritten("upper", bytes.swapcase, Own((HERE,)))
    assert treatment(HERE.swapcase().encode())[:2] == (PLACEHOLDER.encode(), Relocation("text", PLACEHOLDER))
    assert "upper" in treatment.key


def test_the_search_path_of_a_library_becomes_relative(tmp_path: Path) -> None:
    data = elf_file("/home/me/env/lib:/usr/lib")
    changed = elf.with_relative_rpath(data, "bin/python3", [HERE])
    assert elf.rpath(changed) == "$ORIGIN/../lib:/usr/lib"
    assert len(changed) == len(data)
    assert Own((HERE,), "bin/python3")(data)[:2] == (changed, None)


def test_a_search_path_that_is_too_short_to_take_a_relative_one_stays() -> None:
    data = elf_file("/e/lib")
    assert elf.with_relative_rpath(data, "lib/python3.11/lib-dynload/x.so", ["/e"]) == data
    content = Own(("/e",), "lib/python3.11/lib-dynload/x.so")(data)
    assert content[:2] == (data, None)
    assert "/e/lib (RPATH)" in content.doubt
    assert Own((HERE,), "x.so")(elf_file(f"{HERE}/lib:{HERE}/else")).doubt == ""


def test_libraries_in_the_folders_of_the_system_stay_there() -> None:
    """They do not come along with an interpreter of the system."""
    content = Own((HERE, "/usr"), "lib/x.so")(elf_file("/usr/lib/blas:/home/me/env/lib"))
    assert (elf.rpath(content.data), content.doubt) == ("/usr/lib/blas:$ORIGIN/.", "")


@pytest.mark.parametrize("length", [0, 4, 63, 70, 130, 200])
def test_a_broken_elf_file_is_left_as_it_is(length: int) -> None:
    data = elf_file("/home/me/env/lib")[:length]
    assert elf.rpath(data) is None
    assert elf.with_relative_rpath(data, "bin/x", [HERE]) == data


def test_the_name_that_a_library_is_asked_for_by() -> None:
    assert elf.soname(elf_file("libz.so.1", tag=14)) == "libz.so.1"
    assert elf.soname(elf_file("/lib")) is elf.soname(b"text") is None


@pytest.mark.parametrize(
    "first",
    [
        "#!/usr/bin/env python3.11 -I",
        "#!/usr/bin/env -S python3.11 -I",
        "#!/bin/sh\n'''exec' \"/at/a/path\" -I \"$0\" \"$@\" #'''",
        "#!/bin/sh\n'''exec' /at/a/path -I \"$0\" \"$@\"\n' '''",
    ],
    ids=["conda", "env -S", "rattler", "pip"],
)
def test_a_recorded_script_at_a_path_too_long_for_the_kernel_is_the_original(first: str) -> None:
    """Whichever installer wrote the first line in its own way."""
    original = f"#!{LONG}/bin/python3.11 -I\nprint('hello')\n".encode()
    relocation = Relocation("text", LONG)
    installed = first.replace("/at/a/path", f"{HERE}/bin/python3.11").encode() + b"\nprint('hello')\n"
    assert Recorded(digest_of(original), relocation, Own((HERE,)))(installed)[:2] == (original, relocation)


def test_a_script_that_always_left_its_interpreter_to_path_stays_so() -> None:
    script = b"#!/usr/bin/env python\nprint('hello')\n"
    assert Recorded(digest_of(script), None, Own((HERE,)))(script)[:2] == (script, None)
    edited = Recorded(digest_of(b"other"), Relocation("text", LONG), Own((HERE,)))(script)
    assert edited[:2] == (script, None)
