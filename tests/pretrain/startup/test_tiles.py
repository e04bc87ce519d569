"""All ranks of a run launch the same tiles."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.runtime import tuning
from amfm.kernels.runtime.tuning import Environment, Table, choose_table
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks

HOPPER = Environment("NVIDIA H100 80GB HBM3", "3.9.0", "13.4.59")
AMPERE = Environment("NVIDIA A100", "3.9.0", "13.4.59")
TUNED, OTHER = {"scan_walk 64": {"num_warps": 4}}, {"scan_walk 64": {"num_warps": 8}}


def test_rank_0_decides_among_equal_cards_and_nobody_among_different_ones() -> None:
    assert choose_table([Table(HOPPER, TUNED), Table(HOPPER, OTHER)]).configs == TUNED
    assert choose_table([Table(HOPPER, TUNED), Table(AMPERE, OTHER)]) is None


def agree(tables: list[Table]) -> list[dict[str, dict[str, int]]]:
    """On one of two ranks: agree on its own table, then ask as a launch asks; default tiles come first among candidates."""
    from amfm.pretrain.parallel import start_process_group
    from amfm.pretrain.startup.kernels import agree_on_tiles

    start_process_group(PATIENCE_SECONDS)
    agree_on_tiles(tables[torch.distributed.get_rank()])
    candidates = ({"num_warps": 1}, {"num_warps": 4}, {"num_warps": 8})
    answers = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        answers.append(tuning.config_for("scan_walk", (64,), candidates, torch.device("cuda")))
    return answers


@pytest.mark.parametrize(
    ("second", "wanted"),
    [(Table(HOPPER, OTHER), {"num_warps": 4}), (Table(AMPERE, TUNED), {"num_warps": 1})],
    ids=["equal GPUs", "different GPUs"],
)
def test_ranks_launch_what_they_agreed_on_and_their_own_tiles_where_asked_for_determinism(
    second: Table, wanted: dict[str, int]
) -> None:
    for tuned, fixed in run_ranks(agree, [Table(HOPPER, TUNED), second]):
        assert tuned == wanted
        assert fixed == {"num_warps": 1}
