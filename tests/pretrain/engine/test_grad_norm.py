"""Which ranks hold an element of a weight, so that a norm over all of them counts it once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amfm.model.parallel.shards import Shard, ShardSpec
from amfm.pretrain.engine.grad_norm import count_copies


def group(size: int) -> Any:
    return SimpleNamespace(size=lambda: size)


GROUPS: Any = SimpleNamespace(tp=group(4), embd=group(2), ep=group(4))


@pytest.mark.parametrize(
    ("shard", "copies"),
    [
        (Shard(), 4),
        (Shard((ShardSpec(0, "tp", (8, 8)),)), 1),
        (Shard((ShardSpec(0, "tp", (4, 4), (2, 1)),), partial=("tp",)), [2] * 12 + [4] * 24),
        (Shard((ShardSpec(1, "tp", (8, 8), (8, 2)),), partial=("tp",)), [1, 1, 2, 2, 2, 2] * 6),
        (Shard((ShardSpec(0, "tp", (8,), (2,)),), partial=("tp",)), 2),
        (Shard((ShardSpec(0, "tp", (24,)),), partial=("embd",)), 2),
        (Shard((ShardSpec(0, "ep", (8,)), ShardSpec(1, "tp", (8,)))), 1),
    ],
)
def test_an_element_is_counted_as_often_as_ranks_hold_it(shard: Shard, copies: int | list[int]) -> None:
    """Four tensor ranks, which share key-value heads if there are fewer, and both ends of a pipeline."""
    found = count_copies(shard, (6, 6), GROUPS)
    assert (found if isinstance(found, int) else torch.as_tensor(found).tolist()) == copies
