"""Flash attention with documents: tiles that no query of a document can see are never loaded.

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

import triton
import triton.language as tl


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
