"""The folder of a run's checkpoints."""

import pytest

from amfm.pretrain.checkpoint.commit import make_checkpoints_folder


def test_a_place_that_takes_no_checkpoints_is_known_before_training(tmp_path):
    make_checkpoints_folder(tmp_path / "run" / "checkpoints")
    make_checkpoints_folder(tmp_path / "run" / "checkpoints")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/proc/self")  # a folder in which nothing can be made, not even by root
    for name in ("file", "link"):
        with pytest.raises(OSError, match=name):
            make_checkpoints_folder(tmp_path / name)
