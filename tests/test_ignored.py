"""What git ignores, as git says it and as it is read here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from envship.sources import ignored as module
from envship.sources.ignored import ignored
from envship.sources.tree import Trees

from .projects import git

RULES = r"""
# a comment
*.csv
!kept.csv
/top.txt
notes/
docs/*.html
**/deep.dat
logs/**
a/**/z.txt
tmp[0-9].bin
?.one
\#odd
build
"""
FILES = (
    *("x.csv", "kept.csv", "sub/x.csv", "top.txt", "sub/top.txt", "notes/n.md", "sub/notes/n.md", "sub/notes.md"),
    *("docs/i.html", "docs/sub/i.html", "deep.dat", "sub/sub/deep.dat", "logs/1", "logs/sub/2", "a/z.txt", "a/b/z.txt"),
    *("tmp1.bin", "tmpx.bin", "q.one", "qq.one", "#odd", "module.py", "notes/module.py", "build/lib/module.py"),
    *("sub/inner/x.tsv", "sub/inner/x.csv", "sub/inner/y.one", "node_modules/x.csv"),
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in FILES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (root / ".gitignore").write_text(RULES)
    (root / "sub" / "inner" / ".gitignore").write_text("*.tsv\n!x.csv\n")
    return root


def left_out(root: Path) -> set[str]:
    """Files that stay behind, one by one."""
    found = ignored(str(root))
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {
        file
        for file in files
        for name, (_, modules) in found.items()
        if (file == name or file.startswith(name + "/")) and not (modules is not None and file.endswith(".py"))
    }


def test_what_is_read_here_is_what_git_says(tree: Path) -> None:
    by_hand = left_out(tree)
    git(tree, "init")
    assert left_out(tree) == by_hand
    assert {
        "x.csv",
        "notes/n.md",
        "logs/sub/2",
        "a/b/z.txt",
        "#odd",
        "sub/inner/x.tsv",
        "build/lib/module.py",
    } <= by_hand
    # Both the folder and a file in it are named by git: each counts once.
    assert "a" in ignored(str(tree)) and "a/z.txt" not in ignored(str(tree))
    assert by_hand.isdisjoint(
        {"kept.csv", "sub/top.txt", "docs/sub/i.html", "tmpx.bin", "qq.one", "notes/module.py", "sub/inner/x.csv"}
    )


def test_rules_above_the_tree_count_up_to_the_top_of_its_repository(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree.parent / ".gitignore").write_text("*\n")
    git(tree, "init")
    by_git = left_out(tree / "sub")
    monkeypatch.setenv("PATH", "/nowhere")
    assert left_out(tree / "sub") == by_git == {"x.csv", "notes/n.md", "sub/deep.dat", "inner/x.tsv", "inner/y.one"}


def test_a_git_that_takes_too_long_is_not_waited_for(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tree, "init")
    expected = left_out(tree)
    (tree.parent / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tree.parent / "git").chmod(0o755)
    monkeypatch.setattr(module, "_GIT", (str(tree.parent / "git"),))
    monkeypatch.setattr(module, "_GIT_TIMEOUT_S", 0.1)
    assert left_out(tree) == expected


@pytest.fixture
def nest(tmp_path: Path) -> Path:
    """A repository with a submodule and with another clone, which holds one itself; each ignores its own data."""
    library = tmp_path / "library"
    (library / "sub").mkdir(parents=True)
    (library / ".gitignore").write_text("data/\n/build/\n")
    (library / "sub" / "module.py").write_text("VALUE = 1\n")
    git(library, "init")
    git(library, "add", "-A")
    git(library, "commit", "-m", "first")
    root = tmp_path / "nest"
    (root / "src" / "data").mkdir(parents=True)
    (root / "src" / "data" / "kept.txt").write_text("x")
    (root / ".gitignore").write_text("*.csv\n")
    git(root, "init")
    git(root, "-c", "protocol.file.allow=always", "submodule", "add", str(library), "src/vendored")
    for place in ("src/cloned", "src/cloned/deep/inner", "far"):
        git(root, "clone", str(library), place)
    for place in ("src/vendored", "src/cloned", "src/cloned/deep/inner", "far"):
        for name in ("data/big.bin", "build/copy.py", "sub/data/generated.py", "sub/table.csv"):
            (root / place / name).parent.mkdir(exist_ok=True)
            (root / place / name).write_text("x")
    return root


@pytest.mark.parametrize("how", ["git", "by hand"])
def test_repositories_in_a_tree_say_themselves_what_they_ignore(
    nest: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "by hand":
        monkeypatch.setenv("PATH", "/nowhere")
    places = ("src/vendored", "src/cloned", "src/cloned/deep/inner", "far")
    # What a repository around one ignores is nothing to that one.
    assert left_out(nest) == {f"{place}/{name}" for place in places for name in ("data/big.bin", "build/copy.py")}
    only = ignored(str(nest), [str(nest / "src" / "cloned" / "sub")])
    assert set(only) == {"src/cloned/build", "src/cloned/data", "src/cloned/sub/data"}


def test_a_tree_that_a_repository_around_it_ignores_is_one_of_its_own(tree: Path) -> None:
    expected = ignored(str(tree))
    git(tree.parent, "init")
    (tree.parent / ".gitignore").write_text("*\n")
    assert ignored(str(tree)) == expected


def test_an_ignored_folder_that_cannot_be_read_is_not_missed(tree: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root reads everything")
    (tree / "notes").chmod(0)
    try:
        modules = ignored(str(tree))["notes"].modules
        assert modules is not None
        trees = Trees()
        assert not trees.walk(modules)
        assert trees.unreadable == []
    finally:
        (tree / "notes").chmod(0o755)
