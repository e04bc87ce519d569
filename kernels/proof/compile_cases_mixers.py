"""Kernels of scans, convolution and norms as production launches them, to be compiled ahead of time.

TurboS, Nemotron-3-Nano and Granite-4-H all have Mamba2 heads of 64 channels with 128 state numbers, so that one scan
stands for the three; their norms differ in width.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from kernels.causal_conv1d import triton_impl as convolution
from kernels.causal_conv1d.triton_kernels import convolution_backward_kernel, convolution_forward_kernel
from kernels.decay_scan import triton_impl as scan
from kernels.decay_scan.triton_backward import gradients_kernel, walk_back_kernel
from kernels.decay_scan.triton_forward import chunk_state_kernel
from kernels.norm.triton_impl import TILE_VALUES, WARP_VALUES
from kernels.norm.triton_kernels import norm_backward_kernel, norm_forward_kernel
from kernels.proof.compile_cases import CompileCase
from kernels.proof.compile_cases_delta import delta_cases
from kernels.proof.compile_cases_gates import gate_cases

STATE_SIZE = 128


def mixer_cases() -> list[CompileCase]:
    """Every kernel of these operations in bfloat16 with documents, and the tiles that a GPU launch uses."""
    return [*_scan_cases(), *gate_cases(), *delta_cases(), *_convolution_cases(), *_norm_cases()]


def _scan_types(kernel: object) -> dict[str, str]:
    """Triton's type of each argument of a scan kernel."""
    types = dict.fromkeys(("q", "k", "v", "y", "d_y", "d_v", "d_q", "d_k", "entering", "leaving"), "*bf16")
    floats = ("g", "scale", "skip", "final", "decay", "initial", "d_final", "d_initial", "d_g", "d_scale", "d_skip")
    types |= dict.fromkeys(floats, "*fp32") | {"firsts": "*i32"}
    strides = ("stride_qb", "stride_qt", "stride_kb", "stride_kt", "stride_vb", "stride_vt")
    types |= dict.fromkeys(("T", "K", "V", *strides), "i32:16")
    types |= dict.fromkeys(("H", "R", "chunks", "segments", "segment_chunks", "splits"), "i32")
    return types


def _scan_cases() -> Iterator[CompileCase]:
    scaled = {"SCALE": True, "INITIAL": False, "initial": None}
    outputs = scaled | {"SKIP": True, "OUTPUT": True}
    states = scaled | {"SKIP": False, "skip": None, "OUTPUT": False, "y": None, "SAVE": True}
    back = {"D_FINAL": False, "d_final": None, "STORE": True}
    launches = (
        ("walk", chunk_state_kernel, outputs | {"SAVE": False, "entering": None}, scan.WALK[0]),
        ("walk, states kept", chunk_state_kernel, outputs | {"SAVE": True}, scan.WALK[0]),
        ("walk, states only", chunk_state_kernel, states, scan.STATES_WALK[0]),
        ("walk back", walk_back_kernel, back, scan.WALK_BACK[0]),
        ("gradients", gradients_kernel, {"SCALE": True, "SKIP": True}, scan.GRADIENTS[0]),
    )
    for tiles in (1, 2):
        common = {"Q": scan.LARGEST_TILE, "TILES": tiles, "BLOCK_K": STATE_SIZE, "DOT": tl.bfloat16, "DOCUMENTS": True}
        for name, kernel, special, config in launches:
            types, constants = _scan_types(kernel), common | special | {"BLOCK_V": config["BLOCK_V"]}
            options = {option: config[option] for option in ("num_warps", "num_stages")}
            signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
            label = f"scan {name}, chunks of {tiles * scan.LARGEST_TILE}"
            yield CompileCase(label, kernel, signature, constants, options, multiplies=True)


def _convolution_cases() -> Iterator[CompileCase]:
    types = dict.fromkeys(("x", "y", "d_y", "d_x"), "*bf16") | dict.fromkeys(("weight", "bias", "partial"), "*fp32")
    types |= {"ids": "*i32"} | dict.fromkeys(("T", "C", "stride_b", "stride_t"), "i32:16")
    types |= dict.fromkeys(("blocks_per_strip", "strips"), "i32")
    flags = {"W": 4, "BIAS": True, "DOCUMENTS": True}
    for name, kernel, config in (
        ("forward", convolution_forward_kernel, convolution.FORWARD[0]),
        ("backward", convolution_backward_kernel, convolution.BACKWARD[0]),
    ):
        constants = flags | {size: config[size] for size in ("BLOCK_T", "BLOCK_C")}
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
