"""Mamba2's mixer as one Triton operation, in the interpreter, against its definition one token at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amfm.kernels.decay_scan import triton_impl as scan_launch
from amfm.kernels.linear.op import linear
from amfm.kernels.low_precision.recipe import Recipe
from amfm.kernels.mamba2 import triton_impl
from tests.helpers.gradient_place import Place
from tests.helpers.mixers import NAMES, MixerCase, make_leaves, run_mixer
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.registration import assert_registered
from tests.kernels.twice import Twice

FLOAT32 = 1e-5
# One number per head, a sum over all tokens that cancels: float32 keeps fewer digits of it (docs/kernels.md).
SUMS = 4e-5

CASES = {
    "one_token": MixerCase(T=1, lengths=()),
    "one_token_of_two_rows": MixerCase(B=2, T=1),
    "odd_sizes": MixerCase(T=33, P=20, N=12, model=7, width=3, bias=False),
    "documents": MixerCase(B=2, T=37, P=8, N=8, lengths=(5, 1, 31)),
    "groups": MixerCase(T=20, H=4, G=2, P=8, N=8, norm_groups=2, width=2),
    "two_tiles": MixerCase(T=100, P=8, N=8, chunk=128, lengths=(40, 30, 30)),
}


# Of two tiles the scan has a quick test, in test_decay_scan.py.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name == "two_tiles" else [])
        for name, case in CASES.items()
    ],
)
def test_operation_equals_the_definition_twice_bitwise(case: MixerCase, twice: Twice, poisoned_memory: None) -> None:
    expected = run_mixer(case, make_leaves(case, torch.float64), "reference")
    leaves = make_leaves(case, torch.float32)
    for name, value in twice(lambda: run_mixer(case, leaves, "triton")).items():
        assert_near(value, expected[name], SUMS if name in ("d_A_log", "d_dt_bias") else FLOAT32, name)


# Borders are after each L tokens: documents end at them, and one token before or behind.
SEGMENTS = {
    "documents_at_and_next_to_borders": (MixerCase(T=51, P=8, N=8, lengths=(16, 1, 17, 1, 16)), 3),
    "a_document_of_many_segments": (MixerCase(T=52, H=4, G=2, P=8, N=8, norm_groups=2, lengths=(3, 44, 5)), 4),
    "two_tiles": (MixerCase(T=200, P=8, N=8, chunk=128, lengths=(90, 110)), 2),
    "one_token": (MixerCase(T=3, width=2, lengths=(1, 2)), 3),
}
LONG_SEGMENTS = ("a_document_of_many_segments", "two_tiles")


@pytest.mark.parametrize(
    ("case", "segments"),
    [
        pytest.param(*given, id=name, marks=[pytest.mark.slow] if name in LONG_SEGMENTS else [])
        for name, given in SEGMENTS.items()
    ],
)
def test_segments_that_pass_states_on_equal_the_whole_row(
    case: MixerCase, segments: int, poisoned_memory: None
) -> None:
    expected = run_mixer(case, make_leaves(case, torch.float64), "reference")
    leaves = make_leaves(case, torch.float32)
    kept, again = (run_mixer(case, leaves, "triton", keep=keep, segments=segments) for keep in (True, False))
    for name, value in kept.items():
        assert_near(value, expected[name], SUMS if name in ("d_A_log", "d_dt_bias") else FLOAT32, name)
        assert_bitwise(again[name], value, f"{name} with states made again")


@pytest.mark.slow
def test_a_rank_whose_row_is_cut_for_its_gpu_too_hands_on_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = MixerCase(T=132, P=8, N=8, lengths=(40, 92))
    leaves = make_leaves(case, torch.float32)
    whole = run_mixer(case, leaves, "triton", segments=2)
    monkeypatch.setattr(scan_launch, "cut_segments", lambda chunks, *_: (3, 2))
    for name, value in run_mixer(case, leaves, "triton", segments=2).items():
        assert_near(value, whole[name].double(), FLOAT32, name)


@pytest.mark.parametrize("segments", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_the_gradient_of_the_outputs_weight_lands_in_its_sum_to_the_bit(segments: int, poisoned_memory: None) -> None:
    case = MixerCase(T=18, H=1, P=8, N=8, model=7)
    leaves = make_leaves(case, torch.float32)
    wanted = run_mixer(case, leaves, "triton", segments=segments)
    place = Place.of(leaves["out_weight"])
    for _ in range(2):
        found = run_mixer(case, leaves, "triton", segments=segments)
    assert_bitwise(place.sum, 2 * wanted.pop("d_out_weight"))
    assert found["d_out_weight"] is None
    for name, value in wanted.items():
        assert_bitwise(found[name], value, name)


def test_an_output_weight_with_a_recipe_multiplies_the_normed_rows_by_it() -> None:
    case = MixerCase(T=17, P=20, N=12, model=7)
    leaves = make_leaves(case, torch.float32)
    weight = leaves["out_weight"]
    weight.recipe = Recipe("fp8_block")  # type: ignore[attr-defined]
    found = run_mixer(case, leaves, "triton")
    # The normed rows through an output weight that changes nothing: products by ones and zeros are exact.
    whole = replace(case, model=case.sizes().inner)
    normed = run_mixer(whole, leaves | {"out_weight": torch.eye(whole.model).requires_grad_()}, "triton")["out"]
    normed_rows = normed.detach().requires_grad_()
    out = linear(normed_rows, weight)
    assert_bitwise(found["out"], out)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).float())
    assert weight.grad is not None
    assert_near(found["d_out_weight"], weight.grad.double(), FLOAT32)
    assert_near(found["d_norm_weight"], _norm_weight_gradient(leaves, normed_rows), FLOAT32)


def _norm_weight_gradient(leaves: dict[str, torch.Tensor], normed: torch.Tensor) -> torch.Tensor:
    """Of the weight of a norm, from its rows and their gradient: they are products of the weight."""
    assert normed.grad is not None
    return (normed.grad.double() * normed.double() / leaves["norm_weight"].double()).sum((0, 1)).detach()


def test_states_made_again_and_shared_groups_change_nothing(
    poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = MixerCase(T=20, H=2, P=8, N=8, lengths=(11, 9))
    leaves = make_leaves(case, torch.float32)
    kept = run_mixer(case, leaves, "triton")
    again = run_mixer(case, leaves, "triton", keep=False)
    monkeypatch.setattr(scan_launch, "HEADS_PER_SPLIT", 1)
    shared = run_mixer(case, leaves, "triton")
    for name, value in kept.items():
        assert_bitwise(again[name], value, name)
        assert_near(shared[name], value, FLOAT32, name)


def test_a_document_never_feels_another() -> None:
    case = MixerCase(T=40, H=1, P=8, N=8, lengths=(5, 14, 21))
    leaves = make_leaves(case, torch.float32)
    before = run_mixer(case, leaves, "triton")
    with torch.no_grad():
        leaves["projected"][:, 5:19] = torch.randn_like(leaves["projected"][:, 5:19]) * 3
    after = run_mixer(case, leaves, "triton")
    for name in ("out", "d_projected"):
        assert_bitwise(after[name][:, :5], before[name][:, :5], f"{name} before")
        assert_bitwise(after[name][:, 19:], before[name][:, 19:], f"{name} after")


@pytest.mark.parametrize(
    ("keep", "groups", "limit"),
    [
        pytest.param(False, 1, 2.5, marks=pytest.mark.slow),
        (False, 4, 3.0),
        pytest.param(True, 1, 3.5, marks=pytest.mark.slow),
    ],
)
def test_little_is_kept_for_backward(keep: bool, groups: int, limit: float) -> None:
    """Limits in d numbers per token, states aside; the B and C of 4 groups weigh half a d, as those of Nemotron's 8
    do.
    """
    case = MixerCase(T=64, H=4, P=64, N=16, G=groups, chunk=64)
    leaves = {
        name: leaf.detach().bfloat16().requires_grad_() for name, leaf in make_leaves(case, torch.float32).items()
    }
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = sum(leaves[name].untyped_storage().nbytes() for name in NAMES[1:])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        triton_impl.mix_triton(
            *(leaves[name] for name in NAMES),
            sizes=case.sizes(),
            document_starts_BT=None,
            chunk_size=case.chunk,
            keep_states=keep,
        )
    width = 2 * case.T * case.sizes().inner  # d bfloat16 numbers per token
    states = case.N / case.chunk if keep else 0.0
    assert sum(kept.values()) - parameters <= (limit + states) * width


@pytest.mark.parametrize("keep", [False, True])
def test_registration_is_complete(keep: bool) -> None:
    case = MixerCase(T=17, H=1, lengths=(9, 8))
    leaves = make_leaves(case, torch.float32)
    numbers = [1, case.P, 1, case.N, 1]
    tensors = [leaves[name] for name in NAMES]
    assert_registered(triton_impl._forward, *tensors, case.starts(), numbers, 1e-5, case.chunk, keep)


def test_sizes_without_a_kernel_are_refused() -> None:
    case = MixerCase(chunk=24)
    with pytest.raises(ValueError, match="chunk_size of 16, 32, 64 or a multiple of 128; got 24"):
        run_mixer(case, make_leaves(case, torch.float32), "triton")
    with pytest.raises(ValueError, match="float64"):
        run_mixer(MixerCase(), make_leaves(MixerCase(), torch.float64), "triton")
