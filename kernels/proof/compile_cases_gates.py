"""Kernels of the scans that decay each channel at its own rate, as production launches them, to be compiled ahead of time.

GLA at a width of 2048 (4 heads, K = 256, V = 512), HGRN2 (K = V = 128), and Mamba with 16 state numbers a channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import triton.language as tl

from kernels.decay_scan.vector import triton_impl as vector
from kernels.decay_scan.vector.triton_backward import (
    score_gradients_kernel,
    vector_gradients_kernel,
    vector_walk_back_kernel,
)
from kernels.decay_scan.vector.triton_forward import prepare_kernel, vector_walk_kernel
from kernels.diag_scan import triton_impl as diag
from kernels.diag_scan.triton_kernels import diag_backward_kernel, diag_forward_kernel
from kernels.proof.compile_cases import CompileCase

CHUNK_SIZE = 64


def gate_cases() -> Iterator[CompileCase]:
    """Every kernel of these operations in bfloat16 with documents, and the tiles that a GPU launch uses."""
    yield from _vector_cases()
    yield from _diag_cases()


def _case(
    name: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], config: Mapping[str, int]
) -> CompileCase:
    options = {option: config[option] for option in ("num_warps", "num_stages")}
    constants = {**constants, **{size: value for size, value in config.items() if size not in options}}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
    return CompileCase(name, kernel, signature, constants, options, multiplies="DOT" in constants)


def _vector_cases() -> Iterator[CompileCase]:
    wide = (
        "q",
        "k",
        "v",
        "o",
        "d_o",
        "d_q",
        "d_k",
        "d_v",
        "q_start",
        "k_end",
        "scores",
        "d_scores",
        "entering",
        "leaving",
    )
    floats = ("g", "decay", "initial", "final", "total", "d_final", "d_initial", "d_g")
    types = dict.fromkeys(wide, "*bf16") | dict.fromkeys(floats, "*fp32") | {"firsts": "*i32"}
    types |= dict.fromkeys(("T", "K", "V", *(f"stride_{name}{dim}" for name in "qkv" for dim in "bt")), "i32:16")
    types |= dict.fromkeys(("H", "tiles", "segments", "segment_tiles"), "i32")
    tile = {"Q": CHUNK_SIZE, "DOT": tl.bfloat16}
    halved = tile | {"LEVELS": CHUNK_SIZE.bit_length() - 1, "DOCUMENTS": True}
    yield _case("vector scan prepare", prepare_kernel, types, halved, vector.PREPARE[0])
    outputs = {"OUTPUT": True, "SAVE": False, "entering": None}
    walks = (
        ("walk", vector_walk_kernel, outputs),
        ("walk, states kept", vector_walk_kernel, {"OUTPUT": True, "SAVE": True}),
        ("walk, states only", vector_walk_kernel, {"OUTPUT": False, "SAVE": True, "o": None}),
        ("walk back", vector_walk_back_kernel, {"STORE": True}),
    )
    for label, size in (("GLA, K = 256", 256), ("HGRN2, K = 128", 128)):
        for name, kernel, special in walks:
            start = "d_final" if kernel is vector_walk_back_kernel else "initial"
            constants = tile | special | {"BLOCK_K": size, start.upper(): False, start: None}
            yield _case(f"vector scan {name}, {label}", kernel, types, constants, vector.walk_candidates(size)[0])
    config = vector.SCORE_GRADIENTS[0]
    yield _case("vector scan gradients of scores", score_gradients_kernel, types, tile, config)
    yield _case("vector scan gradients", vector_gradients_kernel, types, halved, vector.GRADIENTS[0])


def _diag_cases() -> Iterator[CompileCase]:
    types = dict.fromkeys(("x", "B", "C", "y", "d_y", "d_x"), "*bf16") | {"firsts": "*i32", "chunks": "i32"}
    floats = ("dt", "A", "D", "initial", "entering", "final", "d_final", "room")
    gradients = ("d_dt", "d_A", "d_B", "d_C", "d_D", "d_initial")
    types |= dict.fromkeys((*floats, *gradients), "*fp32")
    types |= dict.fromkeys(("T", "channels", "N", *(f"stride_{name}{dim}" for name in "xbc" for dim in "bt")), "i32:16")
    for way, kernel, config, special in (
        ("forward", diag_forward_kernel, diag.FORWARD[0], {"INITIAL": False, "initial": None, "SAVE": True}),
        ("backward", diag_backward_kernel, diag.BACKWARD[0], {"D_FINAL": False, "d_final": None}),
    ):
        constants = special | {"TILES": CHUNK_SIZE // config["Q"], "BLOCK_N": 16, "DOCUMENTS": True}
        yield _case(f"Mamba scan {way}, 16 state numbers", kernel, types, constants, config)
