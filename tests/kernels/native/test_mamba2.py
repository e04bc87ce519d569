"""Mamba2's mixer in C against its definition in float64, one token at a time: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from amfm.kernels.mamba2.native_impl import mix_native
from amfm.kernels.mamba2.op import mamba2_mix
from amfm.kernels.runtime.native import refuse_native
from tests.helpers.mixers import NAMES, MixerCase, make_leaves, run_mixer
from tests.helpers.numbers import assert_bitwise, assert_near

pytestmark = pytest.mark.skipif(refuse_native(torch.device("cpu")) is not None, reason="no C compiler")

FLOAT32 = 1e-5
# One number per head, a sum over all tokens that cancels: float32 keeps fewer digits of it (docs/kernels.md).
SUMS = 4e-5
BF16 = 6e-3  # half of its last bit, 2^-9, for results, and as much for the normed rows and their gradient on the way
BASE = MixerCase(chunk=64)
CASES = {
    "one_token": replace(BASE, T=1),
    "one_token_of_two_rows": replace(BASE, B=2, T=1),
    "a_token_less_than_a_chunk": replace(BASE, T=63, H=4, P=32, bias=False, width=3),
    "documents_over_chunks": replace(BASE, B=2, T=150, lengths=(5, 1, 60, 84)),
    "documents_at_chunks": replace(BASE, T=130, H=3, lengths=(64, 1, 63, 2)),
    "groups": replace(BASE, B=3, T=70, H=4, G=2, N=32, norm_groups=2, width=2),
    "blocks_of_the_convolution": replace(BASE, T=260, N=48, lengths=(127, 3, 130)),
}


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """PyTorch, and code that asks it, on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mix(case: MixerCase, leaves: dict[str, Tensor], starts: Tensor | None) -> dict[str, Tensor]:
    """The normed rows, and gradients by name; without the second projection, whose bits depend on threads."""
    given = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if name != "out_weight"}
    out = mix_native(*(given.get(name) for name in NAMES[:-1]), case.sizes(), starts, 64)
    gradients = torch.autograd.grad(out, [*given.values()], torch.linspace(-1, 1, out.numel()).view(out.shape))
    return {"out": out.detach()} | dict(zip(given, gradients))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_the_definition_by_any_number_of_threads(
    case: MixerCase, poisoned_memory: None
) -> None:
    expected = run_mixer(case, make_leaves(case, torch.float64), "reference")
    leaves = make_leaves(case, torch.float32)
    for name, value in run_mixer(case, leaves, "native").items():
        assert_near(value, expected[name], SUMS if name in ("d_A_log", "d_dt_bias") else FLOAT32, name)
    by_one = mix(case, leaves, case.starts())
    for threads in (1, 2, 3):
        with use_threads(threads):
            for name, value in mix(case, leaves, case.starts()).items():
                assert_bitwise(value, by_one[name], f"{name} by {threads} threads")


@pytest.mark.parametrize("name", ["a_token_less_than_a_chunk", "documents_over_chunks", "groups"])
def test_bf16_rounds_results_once(name: str) -> None:
    case = CASES[name]
    leaves = make_leaves(case, torch.bfloat16)
    widened = {each: leaf.detach().double().requires_grad_() for each, leaf in leaves.items()}
    expected = run_mixer(case, widened, "reference")
    for each, value in run_mixer(case, leaves, "native").items():
        assert value.dtype == torch.bfloat16
        is_sum = each in ("d_A_log", "d_dt_bias", "d_D")  # over tokens, of numbers that cancel, as above
        assert_near(value, expected[each], 4 * BF16 if is_sum else BF16, each)


def test_rows_are_worked_on_whole_or_in_parts_to_the_same_bits() -> None:
    case = replace(BASE, B=6, T=130, H=4, lengths=(3, 100, 27))
    leaves = make_leaves(case, torch.float32)
    whole = mix(case, leaves, case.starts())
    with use_threads(4):  # fewer than two rows a thread
        for name, value in mix(case, leaves, case.starts()).items():
            assert_bitwise(value, whole[name], name)


def test_nothing_of_a_document_reaches_another() -> None:
    case = replace(BASE, T=170, H=4, lengths=(50, 60, 60))
    leaves = make_leaves(case, torch.float32)
    out, gradient = (mix(case, leaves, case.starts())[name] for name in ("out", "projected"))
    for first, end in ((0, 50), (50, 110), (110, 170)):
        changed = leaves | {"projected": leaves["projected"].detach().clone()}
        changed["projected"][:, first:end] = 30 * torch.randn_like(changed["projected"][:, first:end])
        other, other_gradient = (mix(case, changed, case.starts())[name] for name in ("out", "projected"))
        kept = [place for place in range(170) if not first <= place < end]
        assert_bitwise(other[:, kept], out[:, kept])
        assert_bitwise(other_gradient[:, kept], gradient[:, kept])
        assert not torch.equal(other[:, first:end], out[:, first:end])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible_and_in_its_row(value: float) -> None:
    case = replace(BASE, B=2, T=100)
    leaves = make_leaves(case, torch.float32)
    leaves["projected"].data[0, 30, 40] = value
    out, gradient = (mix(case, leaves, None)[name] for name in ("out", "projected"))
    assert torch.isfinite(out[0, :30]).all() and not torch.isfinite(out[0, 30]).all()
    assert torch.isfinite(out[1]).all() and torch.isfinite(gradient[1]).all()
    assert not torch.isfinite(gradient[0]).all()


def test_small_numbers_stay_what_they_are() -> None:
    tiny = torch.full((4,), 1e-39)  # a compiler's -ffast-math flushes them in the whole process
    mix(replace(BASE, T=1), make_leaves(replace(BASE, T=1), torch.float32), None)
    assert ((tiny * 0.5) > 0).all()


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"chunk": 32}, torch.float32, "in chunks of 64; got 16 x 16 in 32: use backend"),
        ({"N": 24}, torch.float32, "of multiples of 16 in chunks of 64; got 24 x 16 in 64: use backend"),
        ({}, torch.float64, "native code takes float32 and bf16; got torch.float64: use backend"),
    ],
)
def test_what_the_code_does_not_take_is_an_error(change: dict[str, int], dtype: torch.dtype, message: str) -> None:
    case = replace(BASE, T=8, **change)
    with pytest.raises(ValueError, match=message):
        run_mixer(case, make_leaves(case, dtype), "native")


def test_a_compiler_sees_the_shapes_that_the_code_gives() -> None:
    case = replace(BASE, B=2, T=70, H=4, G=2, norm_groups=2)
    shapes = {name: leaf.shape for name, leaf in run_mixer(case, make_leaves(case, torch.float32), "native").items()}
    with FakeTensorMode():
        leaves = {
            name: torch.empty(leaf.shape).requires_grad_() for name, leaf in make_leaves(case, torch.float32).items()
        }
        out = mamba2_mix(*(leaves[name] for name in NAMES), case.sizes(), backend="native")
        gradients = torch.autograd.grad(out.sum(), [*leaves.values()])
    assert out.shape == shapes.pop("out") and [each.shape for each in gradients] == [*shapes.values()]
