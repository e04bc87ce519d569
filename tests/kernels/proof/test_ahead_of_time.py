"""Kernels compile for GPUs that are not here."""

from __future__ import annotations

import pytest

from amfm.kernels.causal_conv1d.op import convolution_bytes
from amfm.kernels.causal_conv1d.triton_impl import convolution_forward_kernel
from amfm.kernels.decay_scan.op import scan_bytes, scan_flops
from amfm.kernels.norm.op import norm_bytes
from amfm.kernels.norm.triton_impl import norm_forward_kernel
from amfm.kernels.proof.ahead_of_time import compile_ahead
from amfm.kernels.proof.recorded import record
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.swiglu.case import CASE as swiglu

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.mark.parametrize("architecture", [80, 90])
def test_streaming_kernels_compile_without_spills(architecture: int) -> None:
    signature = {"x": "*bf16", "other": "*bf16", "weight": "*bf16", "out": "*bf16", "reciprocal": "*fp32"}
    signature |= dict.fromkeys(("rows", "size", "stride_x"), "i32:16") | {"stride_other": "i32", "epsilon": "fp32"}
    constants = {
        "h": None,
        "bias": None,
        "CENTERED": False,
        "GATED": True,
        "RESIDUAL": False,
        "UNIT": 8,
        "BLOCK_R": 1,
        "BLOCK_S": 1024,
    }
    norm = compile_ahead(norm_forward_kernel, signature, constants, architecture)
    signature = {"x": "*bf16", "weight": "*fp32", "bias": "*fp32", "ids": "*i32", "y": "*bf16"}
    signature |= dict.fromkeys(("T", "C"), "i32:16") | dict.fromkeys(("stride_b", "stride_t"), "i32")
    constants = {"W": 4, "BIAS": True, "DOCUMENTS": True, "UNIT": 8, "SILU": True, "BLOCK_T": 32, "BLOCK_C": 128}
    constants |= {"WINDOW": False, "window": None}
    convolution = compile_ahead(convolution_forward_kernel, signature, constants, architecture)
    # Rows of odd length leave loads of single numbers.
    odd = compile_ahead(convolution_forward_kernel, signature, constants | {"UNIT": 1}, architecture)
    assert (convolution.widest_load_bytes, norm.widest_load_bytes) == (16, 16)
    assert odd.widest_load_bytes < 16
    for kernel in (norm, convolution):
        assert kernel.spill_bytes == 0, kernel
        assert not kernel.uses_wgmma


def test_units_compile_as_they_are_launched() -> None:
    """Of a float the compiler takes no condition, which the interpreter does."""
    forms = {form.kernel.fn.__name__: form for form in reversed(record(swiglu).values())}  # the first, silu's, of each
    assert set(forms) == {
        "swiglu_forward_kernel",
        "swiglu_backward_kernel",
        "plain_forward_kernel",
        "plain_backward_kernel",
    }
    for form in forms.values():
        compile_ahead(form.kernel, form.signature, form.constants, 90, **form.options)


def test_missing_and_unknown_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"arguments missing \['BIAS'.*unknown \['nonsense'\]"):
        compile_ahead(convolution_forward_kernel, {"x": "*bf16"}, {"nonsense": 1}, 90)


def test_formulas_count_each_tensor_once() -> None:
    """Granite 4 small in bfloat16: 4 d + 4 G N bytes per token forward, and 8 H for the float32 gates."""
    d, H, N = 8192, 128, 128
    assert scan_bytes(1, 1, H, 1, N, 64) == 4 * d + 4 * N + 8 * H
    assert scan_bytes(1, 1, H, 1, N, 64, backward=True) == 6 * d + 8 * N + 16 * H
    assert scan_flops(1, 1, H, 1, N, 64, chunk_size=64) == 2 * 64 * N + 2 * 64 * d + 4 * N * d
    assert convolution_bytes(1, 1, 8) == 32
    assert norm_bytes(10, gated=True, backward=True) == 100
