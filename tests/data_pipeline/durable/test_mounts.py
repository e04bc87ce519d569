"""Which file system a folder is on."""

from __future__ import annotations

from pathlib import Path

from amfm.data_pipeline.durable.files import file_system_of, read_mounts


def test_a_folder_lies_on_its_deepest_and_latest_mount() -> None:
    table = "/dev/a / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\ntmpfs /home/me tmpfs rw 0 0\n/d /my\\040disk xfs rw 0 0\n"
    paths = ("/tmp", "/home/you/x", "/home/me/x", "/homes", "/my disk/x")
    assert [file_system_of(Path(path), table) for path in paths] == ["ext4", "nfs4", "tmpfs", "ext4", "xfs"]
    assert file_system_of(Path("/"), "") == "" and file_system_of(Path("/proc"), read_mounts()) in ("proc", "")
