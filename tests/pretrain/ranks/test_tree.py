"""No rank talks to many others, and what is exchanged does not grow with ranks times ranks."""

from __future__ import annotations

import pytest

from amfm.pretrain.ranks.group import BLOCK, FAN_OUT, RankTree
from tests.pretrain.rehearsal import Rehearsal, rehearse


@pytest.mark.parametrize("world_size", [1, 2, 7, 8, 9, 63, 137, 1030])
def test_every_rank_is_reached_once(world_size: int) -> None:
    tree = RankTree(world_size)
    below = [child for rank in range(world_size) for child in tree.children(rank)]
    assert sorted(below) == list(range(1, world_size))
    assert all(rank in tree.children(tree.parent(rank) or 0) for rank in range(1, world_size))
    post = Rehearsal()
    found = post.up(tree, lambda rank: [rank], lambda known, more: known + more)
    assert sorted(found) == list(range(world_size)) and found[0] == 0
    post.down(tree, found)


def check(world_size: int) -> None:
    found = rehearse(world_size)
    assert found["peers of any rank"] == BLOCK - 1 + FAN_OUT + (1 if world_size > BLOCK * (FAN_OUT + 1) else 0)
    assert found["messages of any rank"] <= 3 * (BLOCK + FAN_OUT)
    # As many as the checkpoint has shards: 8 stages of 16 layers, two matrices of each for every expert rank.
    assert found["bytes of claims to each rank"] < 600_000
    assert found["bytes of reports to rank 0"] < 1.5 * found["bytes of the manifest"]
    assert found["before: bytes of reports to rank 0"] > found["bytes of reports to rank 0"]


def test_a_save_of_512_ranks_stays_within_bounds() -> None:
    check(512)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2048, 16_384])
def test_a_save_of_thousands_of_ranks_stays_within_bounds(world_size: int) -> None:
    check(world_size)
