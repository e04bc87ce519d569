"""Attention to chosen keys in Triton: forward, the weights that it gives keys, and backward in four launches, without atomics.

How: forward keeps each query's log-sum-exp; a second pass over the chosen keys makes their weights from it, summed over heads.
Backward goes by blocks of queries whose pairs of query and key have room in `_NUMBERS` numbers: one launch writes the weights
and the gradients of scores of a block's pairs, one multiplies them with keys for the queries' gradients, one with queries for
what each pair adds to its key. A stable sort of the block's keys then lists the pairs of each, and a last launch adds them up
in that order. So every number has one writer at a time, and each run gives bitwise identical results.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.runtime.tuning import Config, config_for
from amfm.kernels.sparse_attention.reference import FORWARD_HEADS, SLOPE_HEADS, SUM_CHANNELS
from amfm.kernels.sparse_attention.triton_kernels import (
    chosen_forward_kernel,
    chosen_key_gradient_kernel,
    chosen_query_gradient_kernel,
    chosen_slopes_kernel,
    chosen_weights_kernel,
    sum_pairs_kernel,
)

LOG2_E = math.log2(math.e)
# Float32 numbers of a block's pairs: 256 MiB.
_NUMBERS = 1 << 26
SUM = {"KEYS": 16, "BLOCK_M": 8, "BLOCK_X": 256, "num_warps": 4, "num_stages": 1}


class Sizes(NamedTuple):
    """What kernels are given of a call's shapes: choices per query, query and key heads, channels of keys and values."""

    slots: int
    heads: int
    kv_heads: int
    size: int
    value_size: int

    @classmethod
    def of(cls, q_BTHK: Tensor, k_BSJK: Tensor, places_BTN: Tensor, value_size: int) -> Sizes:
        """Those of q, k and the places."""
        return cls(places_BTN.shape[2], q_BTHK.shape[2], k_BSJK.shape[2], q_BTHK.shape[3], value_size)

    def forward_tiles(self, *, shared: bool) -> dict[str, Any]:
        """Widths of forward's tiles: powers of two of at least 16, 0 for a second part of keys that has no channels."""
        split = self.value_size if shared else self.size
        tiles = {"BLOCK_K": _width(split), "BLOCK_R": _width(self.size - split) if split < self.size else 0}
        return tiles | {"BLOCK_V": _width(self.value_size), "SHARED": shared}

    def shape(self, dtype: torch.dtype) -> tuple[object, ...]:
        """What tiles are tuned for."""
        return dtype, self.heads // self.kv_heads, self.size, self.value_size


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _candidates(*tiles: tuple[int, ...]) -> tuple[Config, ...]:
    """Heads and keys of a tile, channels where they are cut, warps and stages, the fixed ones first; small tiles in the interpreter."""
    names = ("BLOCK_H", "BLOCK_N", *(("BLOCK_C",) if len(tiles[0]) == 5 else ()), "num_warps", "num_stages")
    tiles = ((*[16] * (len(names) - 2), 4, 1), *tiles) if INTERPRETED else tiles
    return tuple(dict(zip(names, each, strict=True)) for each in tiles)


def forward_candidates(group: int, size: int) -> tuple[Config, ...]:
    """Those of the forward kernel, by the heads of a key head and their channels; keys are fetched once per tile of heads.

    Of latents 64 heads spill: 48 bytes per thread on sm_90, 104 on sm_100, 296 on sm_80.
    """
    heads = min(FORWARD_HEADS, _width(group))
    if size > 256:
        return _candidates((heads, 64, 8, 1), (heads, 64, 8, 2), (2 * heads, 64, 8, 1))
    return _candidates((heads, 64, 4, 3), (heads, 128, 8, 2))


def weight_candidates(group: int, size: int) -> tuple[Config, ...]:
    """Those of the kernel for the weights of keys."""
    heads = min(64, _width(group))
    if size > 256:
        return _candidates((heads, 64, 8, 1), (min(32, heads), 64, 8, 2))
    return _candidates((heads, 64, 4, 1), (heads, 128, 8, 1))


def slope_candidates(group: int) -> tuple[Config, ...]:
    """Those of the kernel for pairs; keys are fetched once per tile of heads."""
    heads = min(SLOPE_HEADS, _width(group))
    return _candidates((heads, 64, 64, 8, 3), (heads, 128, 64, 8, 2), (heads, 64, 64, 4, 3))


def query_candidates(group: int) -> tuple[Config, ...]:
    """Those of the kernel for queries: the slopes of a pair are read once per tile of channels."""
    heads = min(SLOPE_HEADS, _width(group))
    return _candidates((heads, 64, SUM_CHANNELS, 8, 3), (heads, 64, SUM_CHANNELS, 4, 3))


def key_candidates(group: int) -> tuple[Config, ...]:
    """Those of the kernel for keys, as that for queries."""
    heads = min(32, _width(group))
    return _candidates((heads, 64, SUM_CHANNELS, 8, 3), (heads, 128, SUM_CHANNELS, 8, 3))


def _rows_and_ends(places_BTN: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Rows of the chosen keys in those of all rows end to end, [B * T, N], -1 for none; the slot after each query's last, int32."""
    first_B = torch.arange(0, len(places_BTN) * keys, keys, device=places_BTN.device)
    rows_QN = (places_BTN + first_B[:, None, None]).masked_fill(places_BTN < 0, -1).flatten(0, 1)
    slot_N = torch.arange(1, rows_QN.shape[1] + 1, device=rows_QN.device, dtype=torch.int32)
    return rows_QN, ((rows_QN >= 0) * slot_N).amax(-1).to(torch.int32)


@torch.library.custom_op("amfm::sparse_attention_triton", mutates_args=())
def _forward(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor | None, places_BTN: Tensor, scale: float, value_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, V], weights [B, T, N] and log-sum-exp in base 2 [B, T, H]; without v the first channels of keys."""
    q, k, v = q_BTHK.contiguous(), k_BSJK.contiguous(), None if v_BSJV is None else v_BSJV.contiguous()
    sizes = Sizes.of(q, k, places_BTN, value_size)
    o = q.new_empty(*q.shape[:3], value_size)
    mass, log_sums = (q.new_empty(*shape, dtype=torch.float32) for shape in (places_BTN.shape, q.shape[:3]))
    if not q.numel():
        return o, mass, log_sums
    (rows, ends), group = _rows_and_ends(places_BTN, k.shape[1]), sizes.heads // sizes.kv_heads
    tiles, dot, scale_log2 = sizes.forward_tiles(shared=v is None), dot_dtype(q.dtype), scale * LOG2_E
    split = value_size if v is None else sizes.size
    config = config_for("chosen_forward", sizes.shape(q.dtype), forward_candidates(group, sizes.size), q.device)
    chosen_forward_kernel[(len(rows) * sizes.kv_heads * triton.cdiv(group, config["BLOCK_H"]),)](
        q, k, v, rows, ends, o, log_sums, *sizes[:-1], split, value_size, scale_log2, DOT=dot, **tiles, **config
    )  # fmt: skip
    config = config_for("chosen_weights", sizes.shape(q.dtype), weight_candidates(group, sizes.size), q.device)
    tiles = {name: tiles[name] for name in ("BLOCK_K", "BLOCK_R")}
    chosen_weights_kernel[(len(rows) * triton.cdiv(sizes.slots, config["BLOCK_N"]),)](
        q, k, rows, ends, log_sums, mass, *sizes[:-1], split, scale_log2, DOT=dot, **tiles, **config
    )  # fmt: skip
    return o, mass, log_sums


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    q = given.q_BTHK
    narrow = (given.places_BTN.shape, q.shape[:3])
    return q.new_empty(*q.shape[:3], given.value_size), *(q.new_empty(*each, dtype=torch.float32) for each in narrow)


@torch.library.custom_op("amfm::sparse_attention_triton_backward", mutates_args=())
def _backward(
    d_o: Tensor,
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor | None,
    places_BTN: Tensor,
    o: Tensor,
    log_sums: Tensor,
    scale: float,
    value_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (empty without it)."""
    q, k, v = q_BTHK.contiguous(), k_BSJK.contiguous(), None if v_BSJV is None else v_BSJV.contiguous()
    sizes, d_q = Sizes.of(q, k, places_BTN, value_size), torch.empty_like(q)
    width = sizes.size + (0 if v is None else value_size)
    d_rows = q.new_zeros(*k.shape[:3], width, dtype=torch.float32)
    if q.numel():
        rows, ends = _rows_and_ends(places_BTN, k.shape[1])
        given = [x.contiguous().flatten(0, 1) for x in (q, d_q, d_o, o, log_sums)]
        queries = max(1, _NUMBERS // (sizes.slots * (sizes.kv_heads * width + 2 * sizes.heads)))
        for block in zip(*(x.split(queries) for x in (*given, rows, ends)), strict=True):
            _add_block(_Block(*block), k, v, sizes, scale, d_rows.view(-1, sizes.kv_heads * width))
    d_k = d_rows[..., : sizes.size].to(k.dtype, copy=True, memory_format=torch.contiguous_format)
    if v is None:
        return d_q, d_k, q.new_empty(0)
    return d_q, d_k, d_rows[..., sizes.size :].to(v.dtype, copy=True, memory_format=torch.contiguous_format)


differentiate(_forward, _backward, outputs=("o", "mass", "log_sums"), gradients=("q_BTHK", "k_BSJK", "v_BSJV"))


class _Block(NamedTuple):
    """Some queries, with all that is of them."""

    q: Tensor
    d_q: Tensor
    d_o: Tensor
    o: Tensor
    log_sums: Tensor
    rows: Tensor
    ends: Tensor


def _add_block(block: _Block, k: Tensor, v: Tensor | None, sizes: Sizes, scale: float, d_rows: Tensor) -> None:
    """Write a block's d_q, and add to d_rows [B * S, J * width] what its queries give keys and values."""
    q, d_o, rows, ends = block.q, block.d_o, block.rows, block.ends
    slots, heads, kv_heads, size, value_size = sizes
    group, (num_keys, width), device, dot = heads // kv_heads, d_rows.shape, q.device, dot_dtype(q.dtype)
    deltas = (d_o.float() * block.o.float()).sum(-1)
    shares, slopes = (q.new_empty(*rows.shape, heads) for _ in range(2))
    values, value_stride, value_first = (k, size, 0) if v is None else (v, value_size, size)
    config = config_for("chosen_slopes", sizes.shape(q.dtype), slope_candidates(group), device)
    choices, tiles = (triton.cdiv(x, config[name]) for x, name in ((slots, "BLOCK_N"), (group, "BLOCK_H")))
    chosen_slopes_kernel[(len(q) * kv_heads * choices * tiles,)](
        q, k, values, d_o, rows, ends, block.log_sums, deltas, shares, slopes, *sizes[:-1], value_stride, value_size,
        scale * LOG2_E, DOT=dot, **config,
    )  # fmt: skip
    config = config_for("chosen_queries", sizes.shape(q.dtype), query_candidates(group), device)
    tiles, channels = (triton.cdiv(x, config[name]) for x, name in ((group, "BLOCK_H"), (size, "BLOCK_C")))
    chosen_query_gradient_kernel[(len(q) * kv_heads * tiles * channels,)](
        k, rows, ends, slopes, block.d_q, *sizes[:-1], scale, DOT=dot, **config
    )  # fmt: skip
    config = config_for("chosen_keys", sizes.shape(q.dtype), key_candidates(group), device)
    pairs, one = q.new_empty(rows.numel(), width, dtype=torch.float32), width // kv_heads
    choices, channels = (triton.cdiv(x, config[name]) for x, name in ((slots, "BLOCK_N"), (one, "BLOCK_C")))
    chosen_key_gradient_kernel[(len(q) * kv_heads * choices * channels,)](
        q, d_o, ends, shares, slopes, pairs, *sizes, value_first, one, scale, DOT=dot, **config
    )  # fmt: skip
    # Pairs without a key come after all keys.
    found, order = rows.masked_fill(rows < 0, num_keys).flatten().sort(stable=True)
    offsets = torch.searchsorted(found, torch.arange(num_keys + 1, device=device))
    grid = triton.cdiv(num_keys, SUM["KEYS"]), triton.cdiv(width, SUM["BLOCK_X"])
    sum_pairs_kernel[grid](pairs, order, offsets, d_rows, num_keys, width, **SUM)


def sparse_attention_triton(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor | None, places_BTN: Tensor, scale: float, value_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_impl.sparse_attention`, for float32, bfloat16 and float16; without v, values are the first channels of keys.

    Saves q, k, v, places, the output and its log-sum-exp.
    """
    dot_dtype(q_BTHK.dtype)  # rejects float64
    o_BTHV, mass_BTN, log_sums_BTH = _forward(q_BTHK, k_BSJK, v_BSJV, places_BTN, scale, value_size)
    return o_BTHV, mass_BTN, log_sums_BTH / LOG2_E
