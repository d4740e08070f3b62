"""Which files of a source tree go along."""

from __future__ import annotations

from pathlib import Path

import pytest

from envship.sources.source_tree import files_below
from envship.sources.tree import Trees


@pytest.mark.parametrize("rules", ["", "opt/\n"])
def test_the_packed_prefix_is_no_part_of_a_project_whatever_it_looks_like(tmp_path: Path, rules: str) -> None:
    """A plain interpreter has no mark of an environment; modules in ignored folders would go along."""
    for name in ("module.py", "opt/python/lib/module.py", "opt/python2/module.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".gitignore").write_text(rules)
    root = str(tmp_path)
    found = files_below(root, [root], Trees(), ["/usr", f"{root}/opt/python", str(tmp_path.parent)])
    assert {path for path, _ in found} == {".gitignore", "module.py", "opt/python2/module.py"}
