"""What the path of a teacher means: the newest checkpoint of a run, and later the same one, or an error that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from amfm.pretrain.distillation.teacher import Teacher, find_model


def test_a_run_means_its_newest_checkpoint_and_later_the_one_that_was_found(teacher: str, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints"
    shutil.copytree(Path(teacher) / "checkpoints/step-00000006", saved / "step-00000006")
    found = Teacher.find(str(tmp_path))
    assert found.folder == str(saved / "step-00000006")
    (tmp_path / "teacher.json").write_bytes(found.to_json())
    assert Teacher.from_json(tmp_path / "teacher.json") == found
    shutil.copytree(Path(teacher) / "checkpoints/step-00000012", saved / "step-00000012")
    assert Teacher.find(str(tmp_path), found) == found
    newest = Teacher.find(str(tmp_path))
    assert newest.folder == str(saved / "step-00000012") and newest.digest != found.digest
    assert find_model(str(tmp_path)).pattern == "M*-"
    shutil.rmtree(saved / "step-00000006")
    with pytest.raises(RuntimeError, match=r"step-00000006, the checkpoint that taught before, is gone; put it back"):
        Teacher.find(str(tmp_path), found)
    shutil.copytree(saved / "step-00000012", saved / "step-00000006")
    with pytest.raises(ValueError, match=r"has weights of digest .*, and what taught before, .*step-00000006, had"):
        Teacher.find(str(tmp_path), found)


def test_of_a_folder_of_transformers_every_weight_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    first = Teacher.find(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes(99) + b"1")
    with pytest.raises(ValueError, match="has weights of digest"):
        Teacher.find(str(tmp_path), first)
