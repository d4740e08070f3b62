from __future__ import annotations

from pathlib import Path

import pytest

from worker_bootstrap.mounts import LOCAL_FILE_SYSTEMS, NETWORK_FILE_SYSTEMS, file_system_of, is_local

MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:30 / /home rw - nfs4 server:/home rw
31 30 0:31 / /home/local rw shared:1 - xfs /dev/vdb rw
32 22 0:32 / /with\\040space rw - lustre x rw
35 22 0:35 / /with\\011tab\\012line\\134and\x85more rw - fuse.sshfs x rw
33 22 0:33 / /home/again rw - ext4 x rw
34 22 0:34 / /home/again rw - nfs x rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/.cache", "nfs4"),
        ("/home", "nfs4"),
        ("/homes/me", "ext4"),
        ("/home/local/x", "xfs"),
        ("/with space/x", "lustre"),
        ("/with\ttab\nline\\and\x85more/x", "fuse.sshfs"),
        ("/home/again", "nfs"),
        ("/", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_innermost_mount(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind


def test_the_file_system_of_this_machine_is_known_or_nothing(tmp_path: Path) -> None:
    assert isinstance(file_system_of(tmp_path), str)


def test_no_file_system_is_both_local_and_on_a_network() -> None:
    assert not LOCAL_FILE_SYSTEMS & NETWORK_FILE_SYSTEMS


def test_what_lies_on_no_known_file_system_is_not_taken_to_be_local() -> None:
    assert not is_local(Path("/proc/self"))
