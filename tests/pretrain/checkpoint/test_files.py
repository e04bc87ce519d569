"""Files of a checkpoint are in folders of blocks of ranks, and those of older checkpoints in none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amfm.pretrain.checkpoint.files import file_names_by_rank, find_foreign_files, is_finite, make_place
from amfm.pretrain.checkpoint.manifest_file import BLOCK_RANKS, rank_file_name


def test_no_folder_has_the_files_of_more_ranks_than_a_block_and_every_name_says_its_rank() -> None:
    names = [rank_file_name(rank) for rank in range(16_384)]
    assert names[255:257] == ["rank-00255.safetensors", "ranks-00256/rank-00256.safetensors"]
    folders = [str(Path(name).parent) for name in names]
    assert {folders.count(folder) for folder in set(folders)} == {BLOCK_RANKS}
    assert file_names_by_rank({"files": dict.fromkeys(names)}) == dict(enumerate(names))


def test_a_checkpoint_without_blocks_is_known_by_its_own_names() -> None:
    names = [f"rank-{rank:05d}.safetensors" for rank in range(300)]
    assert file_names_by_rank({"files": dict.fromkeys([*names, "others.json"])}) == dict(enumerate(names))


def test_tensors_that_the_manifest_does_not_list_are_found_in_the_folders_of_blocks_too(tmp_path: Path) -> None:
    names = [rank_file_name(0), rank_file_name(300), "ranks-00256/rank-00301.safetensors", "ranks-00256/notes.txt"]
    for name in ("manifest.json", *names):
        make_place(tmp_path, name).touch()
    assert find_foreign_files(tmp_path, {"files": dict.fromkeys(names[:2])}) == (names[2:3], names[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 62])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, place: int, bad: float) -> None:
    numbers = torch.ones(63, dtype=dtype)
    assert is_finite(numbers) and is_finite(numbers[:0])
    numbers[place] = bad
    assert not is_finite(numbers)
    numbers[31] = -bad  # infinities of both signs do not cancel
    assert not is_finite(numbers)


def test_finite_numbers_whose_sum_is_not_are_finite() -> None:
    assert is_finite(torch.full((63,), torch.finfo(torch.float32).max))
