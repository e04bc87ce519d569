"""Kernels of the delta product as production launches them, to be compiled ahead of time.

Gated DeltaNet as in Qwen3-Next (states of 128 x 128, one step a token), DeltaProduct with two steps a token, and Kimi Delta
Attention as in Kimi Linear (a gate of each of 128 key channels).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from kernels.delta_scan import triton_impl as delta
from kernels.delta_scan.triton_backward import gradients_kernel, walk_back_kernel
from kernels.delta_scan.triton_forward import chunk_state_kernel, prepare_kernel
from kernels.delta_scan.vector import triton_impl as vector
from kernels.delta_scan.vector.triton_backward import (
    vector_gradients_kernel,
    vector_pairs_kernel,
    vector_walk_back_kernel,
)
from kernels.delta_scan.vector.triton_forward import vector_prepare_kernel, vector_walk_kernel
from kernels.limits import DELTA_LIMITS, VECTOR_DELTA_LIMITS
from kernels.proof.compile_cases import CompileCase
from kernels.tuning import Config

STATE_SIZE = 128


def _types() -> dict[str, str]:
    """Triton's type of each argument."""
    wide = ["q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v", "inverse", "scores", "entering", "leaving", "errors"]
    wide += ["q_start", "k_start", "k_end", "by_read", "by_found"]
    floats = ["beta", "g", "enter", "leave", "carry", "decay", "initial", "final"]
    floats += ["d_final", "d_initial", "d_beta", "d_g"]
    types = dict.fromkeys(wide, "*bf16") | dict.fromkeys(floats, "*fp32") | {"firsts": "*i32"}
    strides = [f"stride_{name}{dim}" for name in "qkv" for dim in "btn"]
    types |= dict.fromkeys(("T", "H", "K", "V", *strides), "i32:16")
    return types | dict.fromkeys(("R", "chunks"), "i32")


def delta_cases() -> Iterator[CompileCase]:
    """Every kernel of the operation in bfloat16 with gates and documents, and the tiles that a GPU launch uses."""
    types, gates = _types(), {"GATE": True, "DOCUMENTS": True}
    outputs = {"INITIAL": False, "initial": None, "OUTPUT": True, "SAVE": False, "entering": None, "errors": None}
    states = {"INITIAL": False, "initial": None, "OUTPUT": False, "SAVE": True, "o": None}
    whole = {"BLOCK_K": STATE_SIZE}
    launches = (
        ("prepare", prepare_kernel, gates | whole | {"PRECISION": "tf32"}, delta.PREPARE[0]),
        ("walk", chunk_state_kernel, outputs | whole, delta.WALK[0]),
        ("walk, states only", chunk_state_kernel, states | whole, delta.STATES_WALK[0]),
        ("walk back", walk_back_kernel, {"D_FINAL": False, "d_final": None} | whole, delta.WALK_BACK[0]),
    )
    chunk = DELTA_LIMITS.chunk_sizes[-1]
    for steps in (1, 2):
        common = {"Q": chunk, "QT": chunk // steps, "N": steps, "DOT": tl.bfloat16}
        gradients = ("gradients", gradients_kernel, gates, delta.gradient_candidates(steps)[0])
        for name, kernel, special, config in (*launches, gradients):
            options = {option: config[option] for option in ("num_warps", "num_stages")}
            blocks = {option: size for option, size in config.items() if option not in options}
            constants = common | special | blocks
            signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
            label = f"delta {name}, {steps} {'step' if steps == 1 else 'steps'} a token"
            yield CompileCase(label, kernel, signature, constants, options, multiplies=True)
    yield from _vector_cases(types)


def _vector_cases(types: dict[str, str]) -> Iterator[CompileCase]:
    """Every kernel of gates of key channels."""
    chunk = VECTOR_DELTA_LIMITS.chunk_sizes[-1]
    common = {"Q": chunk, "DOT": tl.bfloat16}
    halved = {"LEVELS": chunk.bit_length() - 1, "DOCUMENTS": True}
    whole = {"BLOCK_K": STATE_SIZE}
    outputs = {"INITIAL": False, "initial": None, "OUTPUT": True, "SAVE": False, "entering": None, "errors": None}
    states = {"INITIAL": False, "initial": None, "OUTPUT": False, "SAVE": True, "o": None}
    launches: tuple[tuple[str, Any, dict[str, Any], Config], ...] = (
        ("prepare", vector_prepare_kernel, halved | {"PRECISION": "tf32"}, vector.PREPARE[0]),
        ("walk", vector_walk_kernel, outputs | whole, vector.WALK[0]),
        ("walk, states only", vector_walk_kernel, states | whole, vector.WALK[0]),
        ("walk back", vector_walk_back_kernel, {"D_FINAL": False, "d_final": None} | whole, vector.WALK[0]),
        ("gradients of pairs", vector_pairs_kernel, {}, vector.PAIRS[0]),
        ("gradients", vector_gradients_kernel, halved, vector.GRADIENTS[0]),
    )
    for name, kernel, special, config in launches:
        options = {option: config[option] for option in ("num_warps", "num_stages")}
        constants = common | special | {option: size for option, size in config.items() if option not in options}
        signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
        yield CompileCase(f"delta of channels {name}", kernel, signature, constants, options, multiplies=True)
