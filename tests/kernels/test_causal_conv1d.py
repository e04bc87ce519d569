"""The convolution against the step-by-step definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step
from amfm.kernels.causal_conv1d.torch_impl import _backward, _forward, convolve
from tests.helpers.numbers import assert_all_near, assert_bitwise, assert_near
from tests.helpers.registration import assert_registered

FLOAT64 = 1e-13  # a handful of additions in another order
FLOAT32 = 1e-6  # sums of a few products, and of the gradients of all tokens in blocks
BFLOAT16 = 1e-2  # inputs and outputs carry 2^-9 each


def make(B: int, T: int, C: int, W: int, dtype: torch.dtype, *, window: bool, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, T, C), (C, W), (C,)] + ([(B, W - 1, C)] if window else [])
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def documents(T: int, *starts: int) -> Tensor:
    ids = torch.zeros(2, T, dtype=torch.int32)
    for start in starts:
        ids[0, start:] += 1
    return ids


def run(tensors: list[Tensor], ids: Tensor | None, backend: str, activation: str = "silu") -> list[Tensor]:
    x, weight, bias, *window = tensors
    initial = window[0] if window else None
    y = causal_conv1d(
        x, weight, bias, document_ids_BT=ids, initial_window_BWC=initial, activation=activation, backend=backend
    )
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    return [y, *torch.autograd.grad((y.double() * dy).sum(), tensors)]


def covering(*values: list[Any]) -> list[Any]:
    """All combinations; those are quick whose last value follows from the others: with each pair of others once at least."""
    combinations = []
    for places in product(*(range(len(each)) for each in values)):
        case = [each[place] for each, place in zip(values, places, strict=True)]
        is_quick = places[-1] == sum(places[:-1]) % len(values[-1])
        combinations.append(pytest.param(*case, marks=[] if is_quick else [pytest.mark.slow]))
    return combinations


@pytest.mark.parametrize(
    ("W", "T", "window", "starts"), covering([2, 3, 4], [1, 2, 63], [False, True], [None, (1, 2, 40)])
)
def test_shifted_sums_equal_single_steps(
    W: int, T: int, window: bool, starts: tuple[int, ...] | None, poisoned_memory: None
) -> None:
    tensors = make(2, T, 5, W, torch.float64, window=window)
    ids = None if starts is None else documents(T, *(s for s in starts if s < T))
    assert_all_near(run(tensors, ids, "torch"), run(tensors, ids, "reference"), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_silu_it_is_the_sum_itself(dtype: torch.dtype, poisoned_memory: None) -> None:
    ids = documents(63, 1, 2, 40)
    wanted = run(make(2, 63, 5, 3, torch.float64, window=True), ids, "reference", "none")
    found = run(make(2, 63, 5, 3, dtype, window=True), ids, "torch", "none")
    assert_all_near(found, wanted, FLOAT64 if dtype == torch.float64 else FLOAT32)
    with pytest.raises(ValueError, match="activation must be one of silu, none; got 'relu'"):
        run(make(1, 3, 5, 3, dtype, window=False), None, "torch", "relu")


def test_gradients_match_finite_differences() -> None:
    x, weight, bias, window = make(2, 6, 2, 4, torch.float64, window=True)
    ids = documents(6, 2, 3)
    assert torch.autograd.gradcheck(
        lambda *t: causal_conv1d(*t[:3], document_ids_BT=ids, initial_window_BWC=t[3]), (x, weight, bias, window)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_pytorch_knows_the_operation_and_its_gradient(dtype: torch.dtype, bias: bool) -> None:
    x, weight, bias_C = make(2, 6, 4, 4, dtype, window=False)
    given = bias_C if bias else None
    assert_registered(_forward, x, weight, given, documents(6, 2), True)
    _, longer = _forward(x, weight, given, None, True)
    dy = torch.ones_like(x)
    inputs = (t if t is None else t.detach() for t in (dy, x, weight, given, None))
    assert_registered(_backward, *inputs, True, longer.detach())


def test_in_a_compiled_graph_it_is_what_runs_without_one() -> None:
    tensors = make(2, 30, 4, 4, torch.float32, window=False)
    ids = documents(30, 1, 17)
    results = []
    for form in (convolve, torch.compile(convolve, backend="aot_eager", fullgraph=True)):
        y = form(*tensors, ids)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for eager, compiled in zip(*results):
        assert_bitwise(eager, compiled)


def test_bfloat16_stays_near_float64() -> None:
    tensors = make(2, 40, 8, 4, torch.bfloat16, window=True)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    assert_all_near(run(tensors, documents(40, 9), "torch"), run(exact, documents(40, 9), "reference"), BFLOAT16)


def test_without_bias() -> None:
    x, weight, _ = make(2, 10, 3, 4, torch.float64, window=False)
    assert_near(causal_conv1d(x, weight, None), causal_conv1d(x, weight, None, backend="reference"), FLOAT64)


@pytest.mark.parametrize(
    ("sizes", "starts", "W"),
    covering(
        [(2, 129, 96), (1, 300, 80), (1, 1, 3000), (9, 3, 1000), (3, 5, 1), (1, 1, 1)],
        [None, (1, 2, 64, 128)],
        [2, 3, 4],
    ),
)
def test_rows_that_the_library_convolves_stay_near_float64(
    sizes: tuple[int, int, int], starts: tuple[int, ...] | None, W: int, poisoned_memory: None
) -> None:
    B, T, C = sizes
    tensors = make(B, T, C, W, torch.float32, window=False)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    ids = None if starts is None else documents(T, *(s for s in starts if s < T)).repeat(B, 1)[:B]
    found = run(tensors, ids, "torch")
    assert_all_near(found, run(exact, ids, "reference"), FLOAT32)
    for first, second in zip(found, run(tensors, ids, "torch")):
        assert_bitwise(first, second)


@pytest.mark.parametrize("C", [6, 300])
def test_a_document_never_feels_another(C: int) -> None:
    tensors = make(2, 40, C, 4, torch.float32, window=False)
    ids = documents(40, 10, 25)
    before = run(tensors, ids, "torch")
    with torch.no_grad():
        tensors[0][0, 10:25] = 5.0
    after = run(tensors, ids, "torch")
    for name, new, old in zip(("y", "dx"), after, before):
        assert_bitwise(new[0, :10], old[0, :10], name)
        assert_bitwise(new[0, 25:], old[0, 25:], name)
        assert_bitwise(new[1], old[1], name)


def test_window_continues_a_row() -> None:
    x, weight, bias = make(2, 20, 3, 4, torch.float64, window=False)
    whole = causal_conv1d(x, weight, bias)
    rest = causal_conv1d(x[:, 7:], weight, bias, initial_window_BWC=x[:, 4:7])
    assert_near(rest, whole[:, 7:], FLOAT64)


def test_steps_continue_a_row() -> None:
    x, weight, bias = make(2, 8, 3, 4, torch.float64, window=False)
    whole = causal_conv1d(x, weight, bias)
    window = torch.zeros(2, 3, 3, dtype=torch.float64)
    for t in range(8):
        y, window = causal_conv1d_step(x[:, t], window, weight, bias)
        assert_near(y, whole[:, t], FLOAT64, f"token {t}")


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(3, 4), None, r"weight_CW must have shape \[2, any\]; got \[3, 4\]"),
        (torch.zeros(2, 5), None, "width of 2, 3 or 4; got 5"),
        (torch.zeros(2, 4), torch.zeros(3), r"bias_C must have shape \[2\]; got \[3\]"),
    ],
)
def test_wrong_inputs_are_named(weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(torch.zeros(1, 5, 2), weight, bias)


# Rows longer than a block of 218 tokens, and this many short rows that one block holds some of them.
@pytest.mark.parametrize(
    ("B", "T", "C"), [(1, 221, 1200), pytest.param(2, 439, 1200, marks=pytest.mark.slow), (37, 20, 800)]
)
@pytest.mark.parametrize("starts", [None, (1, 17, 217, 218, 220, 437)])
def test_blocks_join_without_a_seam(
    B: int, T: int, C: int, starts: tuple[int, ...] | None, poisoned_memory: None
) -> None:
    tensors = make(B, T, C, 4, torch.float64, window=False)
    ids = None if starts is None else documents(T, *(s for s in starts if s < T)).repeat(B, 1)[:B]
    assert_all_near(run(tensors, ids, "torch"), run(tensors, ids, "reference"), FLOAT64 * T)
