"""Mamba2's mixer as one operation on the torch backend, its checks, and softplus as kernels take it."""

from __future__ import annotations

import pytest
import torch

from amfm.kernels.mamba2.op import mamba2_mix
from tests.helpers.mixers import NAMES, MixerCase, make_leaves, run_mixer
from tests.helpers.numbers import assert_near


@pytest.mark.parametrize("lengths", [(), (5, 1, 14)])
def test_parts_in_turn_equal_the_definition(lengths: tuple[int, ...]) -> None:
    case = MixerCase(B=2, T=20, H=4, G=2, norm_groups=2, lengths=lengths)
    leaves = make_leaves(case, torch.float64)
    expected = run_mixer(case, leaves, "reference")
    for name, value in run_mixer(case, leaves, "torch").items():
        assert_near(value, expected[name], 1e-10, name)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("projected", (1, 8, 5), r"projected_BTX must have shape \[any, any, 98\]; got \[1, 8, 5\]"),
        ("conv_weight", (64, 5), "width of 2, 3 or 4; got 5"),
        ("A_log", (3,), r"A_log_H must have shape \[2\]; got \[3\]"),
        ("norm_weight", (4,), r"norm_weight_I must have shape \[32\]"),
        ("out_weight", (24, 4), r"out_weight_DI must have shape \[any, 32\]"),
    ],
)
def test_tensors_of_other_sizes_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    case = MixerCase(T=8)
    leaves = make_leaves(case, torch.float32) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        mamba2_mix(*(leaves[each] for each in NAMES), case.sizes())


def test_segments_need_the_backend_that_can_wait_for_states() -> None:
    case = MixerCase(T=8)
    with pytest.raises(ValueError, match="segments with an exchange need backend \"triton\"; got 'torch'"):
        run_mixer(case, make_leaves(case, torch.float32), "torch", segments=2)
