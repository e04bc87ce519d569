"""Kernels of scan, convolution and norms as production launches them, to be compiled ahead of time.

TurboS, Nemotron-3-Nano and Granite-4-H all have Mamba2 heads of 64 channels with 128 state numbers, so that one scan
stands for the three; their norms differ in width.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from kernels.causal_conv1d.triton_kernels import convolution_backward_kernel, convolution_forward_kernel
from kernels.compile_cases import CompileCase
from kernels.decay_scan.triton_backward import gradients_kernel, states_kernel
from kernels.decay_scan.triton_forward import walk_kernel
from kernels.norm.triton_impl import TILE_VALUES, WARP_VALUES
from kernels.norm.triton_kernels import norm_backward_kernel, norm_forward_kernel

HEAD_DIM, STATE_SIZE = 64, 128
_FLAGS = {"DOCUMENTS": True, "SCALE": True}


def mixer_cases() -> list[CompileCase]:
    """Every kernel of these operations in bfloat16 with documents, and the tiles that a GPU launch uses."""
    return [*_scan_cases(), *_convolution_cases(), *_norm_cases()]


def _scan_types(kernel: object) -> dict[str, str]:
    """Triton's type of each argument of a scan kernel."""
    types = dict.fromkeys(("q", "k", "v", "y", "d_y", "d_v", "entering", "leaving"), "*bf16") | {"ids": "*i32"}
    floats = ("g", "scale", "skip", "final", "decay", "initial", "d_final", "d_initial", "d_q", "d_k", "d_g", "d_scale")
    types |= dict.fromkeys((*floats, "d_skip"), "*fp32")
    strides = ("stride_qb", "stride_qt", "stride_kb", "stride_kt", "stride_vb", "stride_vt")
    types |= dict.fromkeys(("T", "K", "V", *strides), "i32:16")
    types |= dict.fromkeys(("H", "R", "chunks", "segments", "segment_chunks", "splits"), "i32")
    return types


def _scan_cases() -> Iterator[CompileCase]:
    for chunk in (64, 128):
        common = {"Q": chunk, "BLOCK_K": STATE_SIZE, "DOT": tl.bfloat16, **_FLAGS}
        walk = common | {"BLOCK_V": 32, "SKIP": True}
        states = common | {"BLOCK_V": HEAD_DIM, "INITIAL": False, "D_FINAL": False, "STORE": True}
        launches = (
            ("scan walk", walk_kernel, walk | {"OUTPUT": True, "INITIAL": False, "initial": None}, 8, 2),
            ("scan walk, states only", walk_kernel, walk | {"OUTPUT": False, "INITIAL": False, "initial": None}, 8, 2),
            ("scan backward, states", states_kernel, states | {"initial": None, "d_final": None}, 4, 2),
            (
                "scan backward, gradients",
                gradients_kernel,
                common | {"BLOCK_V": HEAD_DIM, "SKIP": True},
                8,
                1,
            ),
        )
        for name, kernel, constants, warps, stages in launches:
            types = _scan_types(kernel)
            signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
            options = {"num_warps": warps, "num_stages": stages}
            yield CompileCase(f"{name}, chunks of {chunk}", kernel, signature, constants, options, multiplies=True)


def _convolution_cases() -> Iterator[CompileCase]:
    types = dict.fromkeys(("x", "y", "d_y", "d_x"), "*bf16") | dict.fromkeys(("weight", "bias", "partial"), "*fp32")
    types |= {"ids": "*i32"} | dict.fromkeys(("T", "C", "stride_b", "stride_t"), "i32:16")
    types |= dict.fromkeys(("blocks_per_strip", "strips"), "i32")
    constants = {"W": 4, "BIAS": True, "DOCUMENTS": True, "BLOCK_T": 32, "BLOCK_C": 128}
    for name, kernel in (("forward", convolution_forward_kernel), ("backward", convolution_backward_kernel)):
        signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
        yield CompileCase(f"convolution {name}, width 4", kernel, signature, constants, {"num_warps": 4})


def _norm_cases() -> Iterator[CompileCase]:
    names = ("x", "other", "z", "out", "h", "d_out", "d_h", "d_x", "d_z", "weight")
    types = dict.fromkeys(names, "*bf16") | {"reciprocal": "*fp32", "partial": "*fp32", "epsilon": "fp32"}
    types |= dict.fromkeys(("rows", "size", "stride_x", "stride_other", "stride_z"), "i32:16")
    for label, block, gated in (
        ("norm with residual, up to 4096 wide", 4096, False),
        ("norm with residual, up to 8192 wide", 8192, False),
        ("gated norm, groups of 512 (Nemotron)", 512, True),
        ("gated norm, up to 8192 wide (Granite)", 8192, True),
    ):
        rows = max(1, TILE_VALUES // block)
        tile = {"BLOCK_S": block, "BLOCK_R": rows}
        options = {"num_warps": max(1, min(16, block * rows // WARP_VALUES))}
        forward = tile | {"GATED": gated, "RESIDUAL": not gated} | ({"h": None} if gated else {})
        backward = tile | {"GATED": gated, "D_H": not gated} | ({"d_h": None} if gated else {"z": None, "d_z": None})
        for way, kernel, constants in (
            ("forward", norm_forward_kernel, forward),
            ("backward", norm_backward_kernel, backward),
        ):
            signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
            yield CompileCase(f"{label}, {way}", kernel, signature, constants, options)
