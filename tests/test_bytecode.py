"""Byte code: valid for the interpreter that will import it, the same whatever the compiling process did before."""

from __future__ import annotations

import importlib.util
import marshal
import os
import py_compile
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from envship import _bytecode_worker
from envship.bytecode import Compiler
from envship.canonical import Verbatim
from envship.code_ahead import CodeAhead
from envship.errors import NotAnEnvironment
from envship.reading import Reader
from envship.sources.draft import CodeItem, FileItem, Plan

SOURCE = '''"""A docstring with a word."""
import os.path


class Outer:
    class Inner:
        """With a qualified name."""

    def method(self, argument, *, keyword="a b"):
        def nested():
            class Local:
                pass
            return Local, argument, "Outer.Inner", "a b", 1000000, 2.5, ("a b", "c d")
        return nested if argument in {"x", "y", "a b", "Outer"} else os.path.sep
'''


def item(path: Path, **changes: object) -> CodeItem:
    cached = str(path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc")
    made = CodeItem("lib/x.pyc", str(path), path.stat(), cached, "lib/python3/module.py")
    return made._replace(**changes)  # type: ignore[arg-type]


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    return path


def made(folder: Path, module: Path, before: str = "", **changes: object) -> bytes:
    """Byte code of *module* by a new process, which has compiled *before* first."""
    folder.mkdir(exist_ok=True)
    with Compiler(sys.executable, folder / "kept", folder) as compiler:
        if before:
            other = folder / "other.py"
            other.write_text(before)
            compiler.make(item(other), before.encode())
        data = compiler.make(item(module, **changes), module.read_bytes())
    assert data is not None
    return data


def test_compiled_and_reused_byte_code_are_equal(module: Path, tmp_path: Path) -> None:
    compiled = made(tmp_path / "a", module)
    py_compile.compile(str(module), doraise=True)
    assert made(tmp_path / "b", module) == compiled


def test_what_the_process_compiled_before_makes_no_difference(module: Path, tmp_path: Path) -> None:
    plain = made(tmp_path / "a", module)
    assert made(tmp_path / "b", module, before=SOURCE + "\n\nmore = 'a b', 'Outer.method.<locals>.nested'\n") == plain


def test_modules_have_the_same_byte_code_whatever_was_compiled_before_them(tmp_path: Path) -> None:
    """References, and interned strings, once came out differently for a module in a thousand: ftplib's were one."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = [folder / "ftplib.py", *sorted(folder.glob("[a-f]*.py"))]
    outputs = []
    for order in (modules, modules[::-1]):
        with Compiler(sys.executable, tmp_path / f"kept {len(outputs)}", tmp_path) as compiler:
            each = {path: compiler.make(item(path, cached=""), path.read_bytes()) for path in order}
        outputs.append({path: data for path, data in each.items() if data})
    assert len(outputs[0]) > 40
    assert outputs[0] == outputs[1]


def test_code_that_needs_references_is_written_with_them() -> None:
    """As in Python 3.14, whose constants may be slices: the values, and the name of the file, are the same."""
    code = compile(SOURCE, "/somewhere/module.py", "exec", dont_inherit=True)
    data = _bytecode_worker.canonical_with_references(code, "lib/module.py")
    assert marshal.loads(data) == marshal.loads(_bytecode_worker.canonical(code, "lib/module.py"))
    assert len(data) < len(marshal.dumps(code, _bytecode_worker.VALUES_ONLY))


def test_an_interpreter_takes_it_whatever_the_times_say(module: Path, tmp_path: Path) -> None:
    data = made(tmp_path / "a", module)
    cached = Path(importlib.util.cache_from_source(str(module)))
    cached.parent.mkdir()
    cached.write_bytes(data)
    os.utime(module, (1, 1))
    script = "import sys, module; print(module.Outer.method.__code__.co_filename, module.__cached__)"
    before = cached.stat().st_mtime_ns
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(module), str(cached)]
    assert cached.stat().st_mtime_ns == before
    assert data[4:8] == b"\1\0\0\0"
    assert data[8:16] == importlib.util.source_hash(module.read_bytes())


def test_stale_byte_code_is_not_reused(module: Path, tmp_path: Path) -> None:
    expected = made(tmp_path / "a", module)
    module.write_text(SOURCE.replace("1000000", "1000001"))
    py_compile.compile(str(module), doraise=True)
    stamp = module.stat()
    module.write_text(SOURCE)
    os.utime(module, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 5_000_000_000))
    assert made(tmp_path / "b", module) == expected


@pytest.mark.parametrize("damage", [b"", b"\0" * 30, b"garbage after the header"])
def test_damaged_byte_code_is_not_reused(module: Path, tmp_path: Path, damage: bytes) -> None:
    expected = made(tmp_path / "a", module)
    cached = Path(str(py_compile.compile(str(module), doraise=True)))
    cached.write_bytes(cached.read_bytes()[:16] + damage)
    assert made(tmp_path / "b", module) == expected


def test_recorded_digests_vouch_for_byte_code_whose_times_were_lost(module: Path, tmp_path: Path) -> None:
    from worker_bootstrap.digest import digest_of_file

    cached = Path(str(py_compile.compile(str(module), doraise=True)))
    digests = {"source_digest": digest_of_file(module), "cached_digest": digest_of_file(cached)}
    os.utime(module, (1, 1))
    made(tmp_path / "a", module, **digests)
    # Only what had to be compiled is kept.
    assert not list((tmp_path / "a" / "kept").rglob("*"))
    made(tmp_path / "b", module)
    assert len([path for path in (tmp_path / "b" / "kept").rglob("*") if path.is_file()]) == 1


def test_what_was_compiled_is_kept_and_checked(module: Path, tmp_path: Path) -> None:
    data = made(tmp_path, module)
    (kept,) = (path for path in (tmp_path / "kept").rglob("*") if path.is_file())
    assert made(tmp_path, module) == data
    kept.write_bytes(b"x" * 100)
    assert made(tmp_path, module) == data


@pytest.mark.parametrize("source", [b"print 'python 2'", b"def f(:\n", b"x = '\0'", b"\xff\xfe"])
def test_what_does_not_compile_has_no_byte_code(tmp_path: Path, source: bytes) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(source)
    with Compiler(sys.executable, tmp_path / "kept", tmp_path) as compiler:
        assert compiler.make(item(path), source) is None


def test_no_process_is_left(module: Path, tmp_path: Path) -> None:
    compiler = Compiler(sys.executable, tmp_path / "kept", tmp_path)
    process = compiler._process
    compiler.close()
    compiler.close()
    assert process.returncode is not None
    with pytest.raises(NotAnEnvironment):
        Compiler("/bin/false", tmp_path / "kept", tmp_path)


def test_byte_code_that_is_asked_for_ahead_is_that_of_each_module_in_turn(tmp_path: Path) -> None:
    """Also of more modules than are asked for at once, some of which do not compile; nobody waits for what is left."""
    paths = [tmp_path / f"module{number}.py" for number in range(100)]
    for number, path in enumerate(paths):
        path.write_text(f"number = {number}\n" if number % 7 else "def\n")
    items = [item(path) for path in paths]
    plan = Plan(str(tmp_path), (str(tmp_path),), sys.executable, "", "", {}, (), ())
    with Reader(plan, tmp_path / "kept", tmp_path) as reader:
        expected = [reader.byte_code(each) for each in items]
        assert expected.count(None) == 15
        with CodeAhead(reader, 2) as code:
            assert list(code.each(items)) == expected
            assert next(code.each(items)) is None
        assert list(CodeAhead(reader).each(items)) == expected
    assert reader.problems == []


@pytest.mark.parametrize("code_first", [True, False])
def test_the_text_of_a_module_is_read_once(code_first: bool, module: Path, tmp_path: Path) -> None:
    """Its file and its byte code are of one moment, then; of a third use, they would not be."""
    plan = Plan(str(tmp_path), (str(tmp_path),), sys.executable, "", "", {}, (), ())
    code, file = item(module), FileItem("module.py", str(module), module.stat(), Verbatim())
    with Reader(plan, tmp_path / "kept", tmp_path) as reader:
        first, second = (reader.byte_code, code), (reader.content, file)
        if not code_first:
            first, second = second, first
        assert first[0](first[1]) is not None  # type: ignore[operator]
        module.unlink()
        assert second[0](second[1]) is not None  # type: ignore[operator]
        assert reader.changed == []
        assert first[0](first[1]) is None  # type: ignore[operator]
        assert reader.changed == [str(module)]


def test_only_so_much_text_of_modules_is_held(tmp_path: Path) -> None:
    """However large the folder: what is not held any more is read again."""
    paths = [tmp_path / f"module{number}.py" for number in range(12)]
    for path in paths:
        path.write_text(f"# {'x' * (1 << 20)}\nname = {path.name!r}\n")
    plan = Plan(str(tmp_path), (str(tmp_path),), sys.executable, "", "", {}, (), ())
    with Reader(plan, tmp_path / "kept", tmp_path) as reader:
        assert all(reader.byte_code(item(path)) for path in paths)
        assert 0 < reader.held_bytes <= 4 << 20
        before = reader.held_bytes
        larger = tmp_path / "larger.py"
        larger.write_text(f"# {'x' * (5 << 20)}\n")
        assert reader.byte_code(item(larger))
        assert reader.held_bytes == before
        for path in (*paths, larger):
            content = reader.content(FileItem(path.name, str(path), path.stat(), Verbatim()))
            assert content is not None and content.data == path.read_bytes()
