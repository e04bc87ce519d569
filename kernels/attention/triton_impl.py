"""Flash attention with documents in Triton: one forward kernel, two backward kernels, nothing summed by atomics.

How: forward keeps each query's log-sum-exp, so that backward makes the probabilities again tile by tile instead
of storing [T, S] of them (Dao 2023, arXiv 2307.08691, section 3.1). Backward is two launches: one walks the
keys of a tile of queries for d_q, one walks the queries of a tile of keys for d_k and d_v. That computes the
scores twice, but every gradient has one writer: a single kernel would add d_q by atomics, whose order changes
its bits from run to run.

Flash attention with documents: tiles that no query of a document can see are never loaded.

Document boundaries come as two numbers: for each query the first key of its document, for each key the query after the
last of its document. Keys of a tile of queries begin at its first document's start, queries of a tile of keys end at its
last document's end, so loops have exact bounds.

Softmax is taken online (running maximum and sum, in float32, with powers of 2 because the GPU's exponential is
one of 2); scores are scaled by log2(e) for that. Products take operands of DOT and add up in float32. Offsets
of tensors are 64 bit: a row of 128k tokens with 64 heads passes 2^31 numbers.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amfm.kernels.attention.log_sums import of_keys_alone, raise_highest
from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.inputs import first_tokens
from amfm.kernels.runtime.backend import INTERPRETED
from amfm.kernels.runtime.interpreter import dot_dtype
from amfm.kernels.runtime.tuning import Config, config_for


@triton.jit
def _load_heads(x, batch, token, head, tokens, heads, size, BLOCK_K: tl.constexpr):
    """Rows `token` of one head of x [B, tokens, heads, size], zeros outside.

    Returns [len(token), BLOCK_K] in the dtype of x.
    """
    lane = tl.arange(0, BLOCK_K)
    place = ((batch * tokens + token[:, None]) * heads + head) * size + lane[None, :]
    return tl.load(x + place, mask=(token[:, None] < tokens) & (lane[None, :] < size), other=0.0)


@triton.jit
def _store_heads(x, value, batch, token, head, tokens, heads, size, BLOCK_K: tl.constexpr):
    """Write what `_load_heads` reads."""
    lane = tl.arange(0, BLOCK_K)
    place = ((batch * tokens + token[:, None]) * heads + head) * size + lane[None, :]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=(token[:, None] < tokens) & (lane[None, :] < size))


@triton.jit
def _visible(query, key, first, offset, keys):
    """Which keys each query may see: not after it, not before its document.

    The last queries align with the last keys, so query t stands at key t + offset. Arguments broadcast to a
    tile.
    """
    return (key <= query + offset) & (key >= first) & (key < keys)


@triton.jit
def _key_range(query_begin, first_keys, batch, tokens, keys, offset, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """First document start of each query of the tile, and the range of keys that the tile can see."""
    query = query_begin + tl.arange(0, BLOCK_M)
    begin = tl.cast(0, tl.int64)
    if DOCUMENTS:
        # Queries beyond the row have no keys: `keys` as their first keeps them out of the minimum.
        first = tl.load(first_keys + batch * tokens + query, mask=query < tokens, other=keys)
        begin = tl.min(first, 0).to(tl.int64)
    else:
        first = tl.zeros((BLOCK_M,), tl.int32)
    end = tl.minimum(query_begin + BLOCK_M + offset, keys)
    return query, first, begin, end


@triton.jit
def attention_forward_kernel(
    q, k, v, y, log_sums, first_keys, sinks_log2, tokens, keys, heads, kv_heads, size, scale_log2,
    DOCUMENTS: tl.constexpr, SINKS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, K] and the log-sum-exp in base 2 [B, H, T]. Grid: (query tiles, B * H).

    A program holds one tile of BLOCK_M queries of one head and walks the keys that any of them can see. q, k, v
    and y are [B, T or S, heads, K] packed; `scale_log2` is scale * log2(e). With SINKS the sums begin with e^sink, of a key
    without a value: nothing else changes, in backward neither.
    """
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    kv_head, offset = head // (heads // kv_heads), keys - tokens
    query, first, begin, end = _key_range(
        tl.program_id(0).to(tl.int64) * BLOCK_M, first_keys, batch, tokens, keys, offset, DOCUMENTS, BLOCK_M
    )
    q_tile = _load_heads(q, batch, query, head, tokens, heads, size, BLOCK_K).to(DOT)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if SINKS:
        peak = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_log2 + head)
        total += 1.0
    result = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k_tile = _load_heads(k, batch, key, kv_head, keys, kv_heads, size, BLOCK_K).to(DOT)
        # [BLOCK_M, BLOCK_N]. "tf32x3": float32 inputs keep their digits in three products of tf32.
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3") * scale_log2
        scores = tl.where(_visible(query[:, None], key[None, :], first[:, None], offset, keys), scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A query whose document starts later has seen nothing yet: its maximum is -inf, and -inf - -inf is NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(share, 1)
        v_tile = _load_heads(v, batch, key, kv_head, keys, kv_heads, size, BLOCK_K).to(DOT)
        result = tl.dot(share.to(DOT), v_tile, result * shrink[:, None], input_precision="tf32x3")
        peak = higher
    # Queries beyond the row saw nothing; dividing by 1 keeps NaN out of lanes that the store masks anyway.
    total = tl.where(total == 0.0, 1.0, total)
    _store_heads(y, result / total[:, None], batch, query, head, tokens, heads, size, BLOCK_K)
    tl.store(log_sums + (batch * heads + head) * tokens + query, peak + tl.log2(total), mask=query < tokens)


@triton.jit
def attention_query_gradient_kernel(
    q, k, v, y, d_y, log_sums, deltas, d_q, first_keys, tokens, keys, heads, kv_heads, size, scale, scale_log2,
    DOCUMENTS: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_q [B, T, H, K], and <d_y, y> of each query [B, H, T] for the other kernel. Grid: (query tiles, B * H).

    Grid and walk as in the forward kernel. With p = e^(s - log_sum): dp = dy v^T, ds = p (dp - <dy, y>), dq =
    scale ds k.
    """
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    kv_head, offset = head // (heads // kv_heads), keys - tokens
    query, first, begin, end = _key_range(
        tl.program_id(0).to(tl.int64) * BLOCK_M, first_keys, batch, tokens, keys, offset, DOCUMENTS, BLOCK_M
    )
    q_tile = _load_heads(q, batch, query, head, tokens, heads, size, BLOCK_K).to(DOT)
    grad = _load_heads(d_y, batch, query, head, tokens, heads, size, BLOCK_K)
    y_tile = _load_heads(y, batch, query, head, tokens, heads, size, BLOCK_K)
    place = (batch * heads + head) * tokens + query
    delta = tl.sum(grad.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(deltas + place, delta, mask=query < tokens)
    log_sum = tl.load(log_sums + place, mask=query < tokens, other=0.0)
    grad = grad.to(DOT)
    result = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k_tile = _load_heads(k, batch, key, kv_head, keys, kv_heads, size, BLOCK_K).to(DOT)
        v_tile = _load_heads(v, batch, key, kv_head, keys, kv_heads, size, BLOCK_K).to(DOT)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3") * scale_log2
        seen = _visible(query[:, None], key[None, :], first[:, None], offset, keys)
        # The mask acts on the exponent: outside a document it has no bound, and infinity times a zero of a mask
        # is NaN.
        share = tl.exp2(tl.where(seen, scores - log_sum[:, None], float("-inf")))
        slope = share * (tl.dot(grad, tl.trans(v_tile), input_precision="tf32x3") - delta[:, None])
        result = tl.dot(slope.to(DOT), k_tile, result, input_precision="tf32x3")
    _store_heads(d_q, result * scale, batch, query, head, tokens, heads, size, BLOCK_K)


@triton.jit
def attention_key_gradient_kernel(
    q, k, v, d_y, log_sums, deltas, d_k, d_v, first_keys, document_ends, tokens, keys, heads, kv_heads, size,
    scale, scale_log2,
    DOCUMENTS: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_k and d_v [B, S, J, K], summed over the query heads of the group. Grid: (key tiles, B * J).

    One program per tile of BLOCK_N keys of one key head; it walks the query heads of the group and their queries
    that can see the tile, so that the sum over the group needs no second pass. Tiles are [key, query], so that
    both sums are plain products and no result is transposed.
    """
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), tl.program_id(1) % kv_heads
    group, offset = heads // kv_heads, keys - tokens
    key_begin = tl.program_id(0).to(tl.int64) * BLOCK_N
    key = key_begin + tl.arange(0, BLOCK_N)
    k_tile = _load_heads(k, batch, key, kv_head, keys, kv_heads, size, BLOCK_K).to(DOT)
    v_tile = _load_heads(v, batch, key, kv_head, keys, kv_heads, size, BLOCK_K).to(DOT)
    sum_k = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    # The first query that stands at or after the tile's first key.
    begin = tl.maximum(key_begin - offset, 0)
    end = tl.cast(tokens, tl.int64)
    if DOCUMENTS:
        end = tl.max(tl.load(document_ends + batch * keys + key, mask=key < keys, other=0), 0).to(tl.int64)
    for member in range(0, group):
        head = kv_head * group + member
        for start in range(begin, end, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            first = tl.zeros((BLOCK_M,), tl.int32)
            if DOCUMENTS:
                first = tl.load(first_keys + batch * tokens + query, mask=query < tokens, other=0)
            q_tile = _load_heads(q, batch, query, head, tokens, heads, size, BLOCK_K).to(DOT)
            grad = _load_heads(d_y, batch, query, head, tokens, heads, size, BLOCK_K).to(DOT)
            place = (batch * heads + head) * tokens + query
            log_sum = tl.load(log_sums + place, mask=query < tokens, other=0.0)
            delta = tl.load(deltas + place, mask=query < tokens, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="tf32x3") * scale_log2
            seen = _visible(query[None, :], key[:, None], first[None, :], offset, keys) & (query[None, :] < tokens)
            share = tl.exp2(tl.where(seen, scores - log_sum[None, :], float("-inf")))
            sum_v = tl.dot(share.to(DOT), grad, sum_v, input_precision="tf32x3")
            slope = share * (tl.dot(v_tile, tl.trans(grad), input_precision="tf32x3") - delta[None, :])
            sum_k = tl.dot(slope.to(DOT), q_tile, sum_k, input_precision="tf32x3")
    _store_heads(d_k, sum_k * scale, batch, key, kv_head, keys, kv_heads, size, BLOCK_K)
    _store_heads(d_v, sum_v, batch, key, kv_head, keys, kv_heads, size, BLOCK_K)


LOG2_E = math.log2(math.e)


def _candidates(interpreted: tuple[int, int], *tiles: tuple[int, int, int, int]) -> tuple[Config, ...]:
    """Queries and keys of a tile, warps and stages, the fixed ones first; small tiles in the interpreter.

    The first is used without a tuning table, in the interpreter and in deterministic mode
    (`amfm.kernels.runtime.tuning.config_for`).
    """
    tiles = ((*interpreted, 4, 1), *tiles) if INTERPRETED else tiles
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return tuple(dict(zip(names, each, strict=True)) for each in tiles)


def forward_candidates(head_dim: int) -> tuple[Config, ...]:
    """Those of the forward kernel: above 128 channels a tile of 128 queries leaves no shared memory for keys and values."""
    if head_dim <= 128:
        return _candidates((32, 16), (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3))
    return _candidates((32, 16), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2))


def query_candidates(head_dim: int) -> tuple[Config, ...]:
    """Those of the kernel for queries; above 128 channels 64 keys spill."""
    if head_dim <= 128:
        return _candidates((16, 32), (64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2))
    return _candidates((16, 32), (64, 32, 8, 2), (128, 32, 8, 2))


def key_candidates(head_dim: int) -> tuple[Config, ...]:
    """Those of the kernel for keys: above 64 channels its two sums leave no registers for a second stage.

    Above 128 they leave none for the 64 keys that Hopper's wgmma multiplies: with 32 products are smaller, and nothing spills.
    """
    if head_dim <= 64:
        return _candidates((16, 32), (32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2))
    if head_dim <= 128:
        return _candidates((16, 32), (32, 128, 8, 1), (64, 64, 8, 1), (32, 64, 4, 2))
    return _candidates((16, 32), (64, 32, 8, 1), (16, 64, 8, 1), (32, 32, 4, 1))


def document_bounds(document_ids_BS: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """First key of each query's document [B, T], and the query after the last of each key's [B, S]; int32, no waiting.

    The queries are the last `tokens` keys; a document without queries ends at query 0.

    Both are what the kernels' loops need: a tile of queries starts at the smallest first key of its queries, a
    tile of keys ends at the largest end of its keys. Computed by scans on the device, so that the host waits
    for nothing.
    """
    keys = document_ids_BS.shape[1]
    place = torch.arange(keys, device=document_ids_BS.device)
    is_last_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
    is_last_BS[:, :-1] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    ends_BS = (place + 1).where(is_last_BS, keys).flip(1).cummin(1).values.flip(1)
    return first_tokens(document_ids_BS)[:, keys - tokens :].contiguous(), (ends_BS - (keys - tokens)).clamp(min=0).to(
        torch.int32
    ).contiguous()


def _sizes(q_BTHK: Tensor, k_BSJK: Tensor) -> tuple[int, int, int, int, int]:
    """Tokens, keys, heads, key heads, head size: the order in which kernels take them."""
    _, tokens, heads, size = q_BTHK.shape
    return tokens, k_BSJK.shape[1], heads, k_BSJK.shape[2], size


def _constants(q_BTHK: Tensor, first_BT: Tensor | None) -> dict[str, Any]:
    """Values that all three kernels are compiled for; BLOCK_K is the head width as a power of two, as tiles need."""
    return {
        "DOCUMENTS": first_BT is not None,
        "DOT": dot_dtype(q_BTHK.dtype),
        "BLOCK_K": max(16, triton.next_power_of_2(q_BTHK.shape[3])),
    }


@torch.library.custom_op("amfm::attention_triton", mutates_args=())
def _forward(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    sinks_H: Tensor | None,
    first_BT: Tensor | None,
    ends_BS: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, K] and log-sum-exp in base 2 [B, H, T], sinks among its terms."""
    q, k, v = q_BTHK.contiguous(), k_BSJK.contiguous(), v_BSJK.contiguous()
    tokens, keys, heads, kv_heads, size = _sizes(q, k)
    y = torch.empty_like(q)
    log_sums = q.new_empty(q.shape[0], heads, tokens, dtype=torch.float32)
    if q.numel():
        config = config_for("attention_forward", (q.dtype, size), forward_candidates(size), q.device)
        attention_forward_kernel[(triton.cdiv(tokens, config["BLOCK_M"]), q.shape[0] * heads)](
            q, k, v, y, log_sums, first_BT, None if sinks_H is None else sinks_H.float() * LOG2_E,
            tokens, keys, heads, kv_heads, size, scale * LOG2_E,
            SINKS=sinks_H is not None, **_constants(q, first_BT), **config,
        )  # fmt: skip
    return y, log_sums


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    q = given.q_BTHK
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("amfm::attention_triton_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    sinks_H: Tensor | None,
    y: Tensor,
    log_sums: Tensor,
    first_BT: Tensor | None,
    ends_BS: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks (empty without them)."""
    q, k, v, d_y = q_BTHK.contiguous(), k_BSJK.contiguous(), v_BSJK.contiguous(), d_y.contiguous()
    sizes = tokens, keys, heads, kv_heads, _ = _sizes(q, k)
    d_q, d_k, d_v, deltas = (torch.empty_like(x) for x in (q, k, v, log_sums))
    if not q.numel():
        return d_q, d_k.zero_(), d_v.zero_(), q.new_empty(0) if sinks_H is None else torch.zeros_like(sinks_H)
    scales, constants = (scale, scale * LOG2_E), _constants(q, first_BT)
    # First, because it also writes the deltas <dy, y> that the kernel for keys reads; launches of one stream
    # run in order.
    config = config_for("attention_queries", (q.dtype, sizes[4]), query_candidates(sizes[4]), q.device)
    attention_query_gradient_kernel[(triton.cdiv(tokens, config["BLOCK_M"]), q.shape[0] * heads)](
        q, k, v, y, d_y, log_sums, deltas, d_q, first_BT, *sizes, *scales,
        **constants, **config,
    )  # fmt: skip
    config = config_for("attention_keys", (q.dtype, sizes[4]), key_candidates(sizes[4]), q.device)
    attention_key_gradient_kernel[(triton.cdiv(keys, config["BLOCK_N"]), q.shape[0] * kv_heads)](
        q, k, v, d_y, log_sums, deltas, d_k, d_v, first_BT, ends_BS, *sizes, *scales,
        **constants, **config,
    )  # fmt: skip
    if sinks_H is None:
        return d_q, d_k, d_v, q.new_empty(0)
    weights_BHT = torch.exp2((sinks_H.float() * LOG2_E)[:, None] - log_sums)
    return d_q, d_k, d_v, -(weights_BHT * deltas).sum((0, 2)).to(sinks_H.dtype)


differentiate(_forward, _backward, outputs=("y", "log_sums"), gradients=("q_BTHK", "k_BSJK", "v_BSJK", "sinks_H"))


def window_bounds(first_BT: Tensor, ends_BS: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """`document_bounds` where a query also sees no key more than `window` - 1 before its own.

    A key's end becomes the query after the last one whose window still holds it, counted among only the
    queries.
    """
    tokens, keys = first_BT.shape[1], ends_BS.shape[1]
    place = torch.arange(keys, device=first_BT.device, dtype=torch.int32)
    first_BT = torch.maximum(first_BT, place[keys - tokens :] - (window - 1))
    return first_BT, torch.minimum(ends_BS, (place + window - (keys - tokens)).clamp(min=0))


def attention_triton(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJK: Tensor,
    document_ids_BS: Tensor | None,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    highest_H: Tensor | None = None,
) -> Tensor:
    """As `attention_reference`, for float32, bfloat16 and float16. Saves q, k, v, the output and its log-sum-exp."""
    # The kernels know document bounds only, so a window without documents is a window in one document.
    dot_dtype(q_BTHK.dtype)  # rejects float64
    first_BT = ends_BS = None
    if document_ids_BS is None and window is not None:
        document_ids_BS = torch.zeros(k_BSJK.shape[:2], dtype=torch.int32, device=k_BSJK.device)
    if document_ids_BS is not None:
        first_BT, ends_BS = document_bounds(document_ids_BS, q_BTHK.shape[1])
    if first_BT is not None and ends_BS is not None and window is not None:
        first_BT, ends_BS = window_bounds(first_BT, ends_BS, window)
    y_BTHK, log_sums_BHT = _forward(q_BTHK, k_BSJK, v_BSJK, sinks_H, first_BT, ends_BS, scale)
    if highest_H is not None:
        raise_highest(highest_H, of_keys_alone(log_sums_BHT, sinks_H))
    return y_BTHK
