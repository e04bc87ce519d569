"""Kernels of feed-forward, attention, positions and loss as production launches them, to be compiled ahead of time.

Shapes only reach a kernel through its tile and through which sizes 16 divides, so one case stands for many models;
where a constant follows a shape (head size, experts), the cases take those of Granite-4-H and Nemotron-3-Nano.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl

from kernels.attention import triton_impl as attention
from kernels.attention import triton_kernels as attention_kernels
from kernels.linear_cross_entropy import triton_impl as loss
from kernels.linear_cross_entropy import triton_kernels as loss_kernels
from kernels.moe import triton_experts as experts
from kernels.moe import triton_kernels as expert_kernels
from kernels.moe import triton_router as router
from kernels.rope import triton_impl as rope
from kernels.swiglu import triton_impl as activations

_BF16, _FP32, _INT32, _INT64, _SIZE = "*bf16", "*fp32", "*i32", "*i64", "i32:16"


@dataclass(frozen=True)
class CompileCase:
    """Arguments of `kernels.proof.ahead_of_time.compile_ahead`, and what to call the result."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    multiplies: bool = False


def _case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int] | None = None,
    *,
    multiplies: bool = False,
) -> CompileCase:
    """Take from `types` what the kernel has as arguments."""
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
    return CompileCase(name, kernel, signature, constants, options or {}, multiplies)


def compile_cases() -> list[CompileCase]:
    """Every kernel of these operations in bfloat16, with the tiles that a GPU launch uses (not the interpreter's)."""
    return [*_attention_cases(), *_loss_cases(), *_expert_cases(), *_router_cases(), *_elementwise_cases()]


def _attention_cases() -> Iterator[CompileCase]:
    pointers = dict.fromkeys(("q", "k", "v", "y", "d_y", "d_q", "d_k", "d_v"), _BF16)
    types = pointers | {"log_sums": _FP32, "deltas": _FP32, "first_keys": _INT32, "document_ends": _INT32}
    types |= {"tokens": _SIZE, "keys": _SIZE, "heads": _SIZE, "kv_heads": "i32", "size": _SIZE}
    types |= {"scale": "fp32", "scale_log2": "fp32"}
    for size in (64, 128):
        constants = {"DOCUMENTS": True, "DOT": tl.bfloat16, "BLOCK_K": size}
        launches = (
            ("forward", attention_kernels.attention_forward_kernel, attention.FORWARD[0]),
            ("d_q", attention_kernels.attention_query_gradient_kernel, attention.QUERIES[0]),
            ("d_k d_v", attention_kernels.attention_key_gradient_kernel, attention.key_candidates(size)[0]),
        )
        for part, kernel, config in launches:
            tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_N")}
            options = {name: config[name] for name in ("num_warps", "num_stages")}
            yield _case(f"attention {part}, head {size}", kernel, types, constants | tile, options, multiplies=True)


def _loss_cases() -> Iterator[CompileCase]:
    types = dict.fromkeys(("hidden", "weight", "d_logits"), _BF16) | {"labels": _INT64}
    floats = ("peaks", "sums", "targets", "logits", "logits_out", "log_sums", "d_log_sums", "d_targets")
    types |= dict.fromkeys(floats, _FP32) | dict.fromkeys(("rows", "vocab", "model"), _SIZE)
    types |= {"first_row": "i32", "tiles_per_split": "i32"}
    product, options = {"DOT": tl.bfloat16, **loss.TILE}, loss.PRODUCT_OPTIONS
    for store, name in ((True, "whole"), (False, "shard")):
        constants = {"STORE": store, **product} | ({} if store else {"logits_out": None})
        kernel = loss_kernels.statistics_kernel
        yield _case(f"cross-entropy statistics, {name}", kernel, types, constants, options, multiplies=True)
    yield _case("cross-entropy gradient, shard", loss_kernels.gradient_kernel, types, product, options, multiplies=True)
    yield _case(
        "cross-entropy gradient, whole", loss_kernels.stored_gradient_kernel, types, dict(loss.ELEMENTWISE_TILE)
    )


def _expert_cases() -> Iterator[CompileCase]:
    names = (
        "x",
        "weight",
        "y",
        "up",
        "down",
        "hidden",
        "active",
        "d_y",
        "d_hidden",
        "left",
        "right",
        "result",
        "rows_SD",
    )
    types = dict.fromkeys(names, _BF16) | {"order": _INT64, "inverse": _INT64, "offsets": _INT32}
    types |= {"weights": _FP32, "d_weights": _FP32, "choices": "i32", "experts": _SIZE}
    sizes = ("columns", "inner", "width", "pairs", "model", "lefts", "rights", "tokens", "weight_expert")
    types |= dict.fromkeys((*sizes, "weight_row", "weight_column"), _SIZE)
    for rows, label in ((64, "64 rows an expert"), (1024, "1024 rows an expert")):
        product, narrow = experts.product_tile(rows * 128, 128), experts.narrow_tile(rows * 128, 128)
        shared = {"DOT": tl.bfloat16, "EXPERTS": 128}
        for strides, way in (({"weight_column": 1}, "down"), ({"weight_row": 1}, "up backward")):
            yield _case(
                f"experts {way}, {label}", expert_kernels.grouped_product_kernel, types,
                {"GATHER": False, **shared, **product, **strides}, experts.OPTIONS, multiplies=True,
            )  # fmt: skip
        for swiglu, activation in ((True, "SwiGLU"), (False, "squared ReLU")):
            constants = {"SWIGLU": swiglu, "GATHER": True, **shared}
            yield _case(
                f"experts up, {activation}, {label}", expert_kernels.up_kernel, types,
                constants | (narrow if swiglu else product), experts.OPTIONS, multiplies=True,
            )  # fmt: skip
            yield _case(
                f"experts down backward, {activation}, {label}", expert_kernels.down_backward_kernel, types,
                constants | narrow, experts.OPTIONS, multiplies=True,
            )  # fmt: skip
    for left, name in ((True, "d_down"), (False, "d_up")):
        constants = {"GATHER_LEFT": left, "GATHER_RIGHT": not left, "DOT": tl.bfloat16, **experts.OUTER_TILE}
        kernel = expert_kernels.grouped_outer_kernel
        yield _case(f"experts {name}", kernel, types, constants, experts.OPTIONS, multiplies=True)
    yield _case("experts sum over choices", expert_kernels.sum_choices_kernel, types, dict(experts.SUM_TILE))


def _router_cases() -> Iterator[CompileCase]:
    floats = ("logits", "bias", "scores", "weights", "d_weights", "d_scores", "d_logits")
    types = dict.fromkeys(floats, _FP32) | {"expert_ids": _INT64, "counts": _INT32, "scaling": "fp32"}
    types |= {"rows": _SIZE, "experts": _SIZE, "group_size": _SIZE}
    types |= dict.fromkeys(("num_groups", "group_top_k", "top_k"), "i32")
    for label, softmax, groups, size, top_k in (("Granite, 64", True, 1, 64, 10), ("grouped, 256", False, 8, 32, 8)):
        width, choices = groups * size, triton.next_power_of_2(top_k)
        block = {"BLOCK": router.rows_of_block(width), "CHOICES": choices, "SOFTMAX": softmax, "NORMALIZE": True}
        forward = {"BIAS": not softmax, "LIMIT": groups > 1, "GROUPS": groups, "SIZE": size, **block}
        yield _case(f"router forward, {label}", router.route_forward_kernel, types, forward)
        yield _case(f"router backward, {label}", router.route_backward_kernel, types, {"EXPERTS": width, **block})


def _elementwise_cases() -> Iterator[CompileCase]:
    types = dict.fromkeys(("gate_up", "x", "y", "d_y", "d_x", "d_gate_up", "weight"), _BF16)
    types |= dict.fromkeys(("cosine", "sine", "d_weight"), _FP32)
    types |= dict.fromkeys(("rows", "columns", "heads", "size", "half"), _SIZE) | {"epsilon": "fp32"}
    tile = {"BLOCK_R": activations.BLOCK_ROWS, "BLOCK_C": activations.BLOCK_COLUMNS}
    for name, kernel in (
        ("SwiGLU forward", activations.swiglu_forward_kernel),
        ("SwiGLU backward", activations.swiglu_backward_kernel),
        ("squared ReLU forward", activations.squared_relu_forward_kernel),
        ("squared ReLU backward", activations.squared_relu_backward_kernel),
    ):
        yield _case(name, kernel, types, tile)
    constants = {"NORM": True, "ROTATE": True, "BLOCK": rope.BLOCK_HEADS, "HALF": 64, "REST": 2}
    yield _case("QK-norm and rotation forward", rope.norm_rope_forward_kernel, types, constants)
    yield _case("QK-norm and rotation backward", rope.norm_rope_backward_kernel, types, constants)
