"""What a run is called with services of plots."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from amfm.pretrain.monitor.tracking import GROUPED, Tracking, group_name, open_tracking, read_commit


def test_numbers_are_in_groups_and_sort_by_block() -> None:
    names = [
        "loss",
        "expert_load/3",
        "expert_load/11",
        "inspect/blocks/weight/2",
        "validation_by_source/web",
        "my_number",
    ]
    found = [group_name(name) for name in names]
    assert found[:2] == ["loss/train", "moe/load/003"] and found[3:] == [
        "inspect/blocks/weight/002",
        "loss/validation_by_source/web",
        "my_number",
    ]
    assert found[1] < found[2], "3 sorts before 11"
    assert {name.partition("/")[0] for name in GROUPED.values()} == {"loss", "moe", "speed", "health", "progress"}


def test_a_run_has_its_own_id_and_keeps_it_and_one_of_a_release_before_its_name(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "old")]
    for folder in folders:
        folder.mkdir()
    one, two = (open_tracking(folder, resumed_at_step=0) for folder in folders[:2])
    assert one.is_grouped and one.run_id != two.run_id
    assert open_tracking(folders[0], resumed_at_step=7) == one
    (folders[1] / "tracking.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"tracking\.json is damaged: it has no run_id; remove it"):
        open_tracking(folders[1], resumed_at_step=7)
    (folders[2] / "tensorboard").mkdir()
    assert open_tracking(folders[2], resumed_at_step=7) == Tracking(None, is_grouped=False)
    assert [path.name for path in folders[2].iterdir()] == ["tensorboard"]


def test_a_commit_is_named_with_what_differs_and_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "run.yaml").write_text("a: 1\n")
    for command in (["init", "-q"], ["add", "run.yaml"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = read_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "run.yaml").write_text("a: 2\n")
    assert read_commit(tmp_path) == f"{commit}-dirty"
