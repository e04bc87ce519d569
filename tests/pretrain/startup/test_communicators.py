"""Each communicator of a layout answers a small sum at the start, or is named with its axis and ranks."""

from __future__ import annotations

import pytest
import torch

from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from amfm.pretrain.startup.communicators import describe_slow, list_communicators, make_communicators, time_sum
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks


def make_all() -> tuple[list[str], list[str], str]:
    layout = ParallelConfig(tensor=2, pipeline=2)
    parallel = initialize_parallel(layout, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    axes = [axis for axis, _ in list_communicators(parallel)]
    slow = make_communicators(parallel, PATIENCE_SECONDS)
    missing = ""
    if parallel.rank == 0:  # the other rank of the group does not come
        try:
            time_sum(("tp", (0, 1)), parallel.groups.tp, torch.device("cpu"), 0.2)
        except RuntimeError as error:
            missing = str(error)
    return axes, slow, missing


def test_communicators_of_all_axes_are_made_and_a_missing_rank_is_named_by_axis_and_ranks() -> None:
    found = run_ranks(make_all, num_ranks=4)
    for axes, _, _ in found:
        assert axes[0] == "all" and {"tp", "pp", "mp"} <= set(axes)
    missing = found[0][2]
    assert missing.startswith("the communicator tp of ranks 0, 1 does not answer")
    assert "0.2 s (train.timeout_seconds)" in missing and "amfm launch --doctor" in missing


@pytest.mark.parametrize(("slow", "number"), [(0.2, 0), (0.3, 1), (5.0, 1)])
def test_what_takes_ten_times_as_long_as_most_and_long_enough_is_slow(slow: float, number: int) -> None:
    seconds = {("tp", (0, 1)): 0.002, ("tp", (2, 3)): 0.001, ("dp", (0, 2)): slow, ("dp", (1, 3)): 0.002}
    found = describe_slow(seconds)
    assert len(found) == number and all(text.startswith("the communicator dp of ranks 0, 2 is slow") for text in found)
    assert describe_slow({("all", (0, 1)): 0.2}) == describe_slow({}) == []
