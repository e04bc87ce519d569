"""The folder of a run's checkpoints."""

import pytest

from amfm.pretrain.checkpoint.commit import SavedCheckpoint, is_marked, make_checkpoints_folder, mark, release


def test_a_place_that_takes_no_checkpoints_is_known_before_training(tmp_path):
    make_checkpoints_folder(tmp_path / "run" / "checkpoints")
    make_checkpoints_folder(tmp_path / "run" / "checkpoints")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/proc/self")  # a folder in which nothing can be made, not even by root
    for name in ("file", "link"):
        with pytest.raises(OSError, match=name):
            make_checkpoints_folder(tmp_path / name)


def test_what_is_not_marked_can_be_released(tmp_path):
    release(tmp_path)
    mark(tmp_path)
    assert is_marked(tmp_path)
    release(tmp_path)
    assert not is_marked(tmp_path)


def test_the_event_of_a_save_says_what_went_wrong_around_it(tmp_path):
    path = tmp_path / "step-00000001"
    assert SavedCheckpoint(path).facts() == {"path": path.name}
    assert SavedCheckpoint(path, ("old one stays",)).facts() == {"path": path.name, "remarks": ["old one stays"]}
