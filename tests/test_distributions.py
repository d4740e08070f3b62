"""pip's records, canonical: the same from every machine, prefix and installer."""

from __future__ import annotations

import json
from pathlib import Path

from envship.sources.distributions import (
    canonical_direct_url,
    canonical_name,
    canonical_record,
    read_distributions,
)

RECORD = """\
../../../bin/tool,sha256=abc,200
pkg/__init__.py,sha256=def,10
pkg/__pycache__/__init__.cpython-311.pyc,,
"pkg/with,comma.py",sha256=ghi,11
pkg-1.0.dist-info/INSTALLER,sha256=jkl,4
pkg-1.0.dist-info/REQUESTED,sha256=mno,0
pkg-1.0.dist-info/RECORD,,
pkg-1.0.dist-info/direct_url.json,sha256=pqr,90
"""


def test_a_record_keeps_what_is_content() -> None:
    assert canonical_record(RECORD.encode()).decode() == (
        "../../../bin/tool,,\npkg-1.0.dist-info/INSTALLER,,\npkg-1.0.dist-info/RECORD,,\n"
        'pkg-1.0.dist-info/direct_url.json,,\npkg/__init__.py,sha256=def,10\n"pkg/with,comma.py",sha256=ghi,11\n'
    )


def test_a_record_depends_on_no_order_and_stays_what_it_is() -> None:
    shuffled = "".join(reversed(RECORD.splitlines(keepends=True)))
    once = canonical_record(RECORD.encode())
    assert canonical_record(shuffled.replace("\n", "\r\n").encode()) == once == canonical_record(once)


def test_only_local_urls_are_rewritten() -> None:
    local = json.dumps({"url": "file:///home/me/x.whl", "archive_info": {"hash": "sha256=1"}}).encode()
    remote = json.dumps({"url": "https://host/x.whl", "archive_info": {}}).encode()
    assert json.loads(canonical_direct_url(local)) == {"url": "file:///", "archive_info": {}}
    assert json.loads(canonical_direct_url(remote)) == json.loads(remote)
    assert canonical_direct_url(b"not json") == b"not json"


def test_names_are_normalised() -> None:
    assert canonical_name("Zope.Interface__x") == "zope-interface-x"


def test_distributions_are_read_with_their_files(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    info = site / "Pkg-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Pkg\nVersion: 1.0\n\nName: not this\n")
    (info / "RECORD").write_text(f"{RECORD}{tmp_path}/share/data,,\n/outside/data,,\n")
    (info / "direct_url.json").write_text('{"url": "file:///src", "dir_info": {"editable": true}}')
    place = "lib/python3.11/site-packages"
    (found,) = read_distributions(str(site), place, [f"{place}/Pkg-1.0.dist-info/METADATA", "METADATA"])
    assert (found.name, found.version, found.editable) == ("pkg", "1.0", "file:///src")
    assert found.info == f"{place}/Pkg-1.0.dist-info"
    assert "bin/tool" in found.files
    assert "share/data" in found.files
    assert not any(path.endswith(".pyc") or "outside" in path for path in found.files)
