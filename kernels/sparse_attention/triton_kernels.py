"""Attention to chosen keys: each query reads its own keys where they are, all heads of a key head at once.

A program has one query, so what it multiplies is a tile of its heads and a tile of its keys: with the 64 or 128 heads of
latent attention as much work per number read as dense attention has, with the 4 of grouped queries little. Tiles of scores
are [key, head] in all kernels: no product then takes the transpose of another's result.

Forward holds all channels of a tile of keys. Latents are keys whose first channels are the values (SHARED): the tile of values
is the first part of the tile of keys. So keys come in two parts, `split` channels and the rest, and 576 channels need no tile
of 1,024.

Backward would have to hold sums of 576 channels next to that, so it is cut if nothing wide is held: `chosen_slopes_kernel`
writes the weight of each pair of query and key, for each head, and the gradient of its score; the gradients of queries and of
keys are products of those by tiles of channels. Gradients of keys are sums over the queries that chose them. Atomic additions
would change bits from run to run, so a program writes what its query adds to each of its keys, and `sum_pairs_kernel` adds what
belongs to a key in the order of the queries.

Arguments that all share: rows [Q, N], of each query the rows of its keys in k [R, J, K] and v [R, J, V], -1 for none, and
ends [Q], the slot after the last that has a key; q [Q, H, K], o and d_o [Q, H, V]; all packed. `scale_log2` is scale * log2(e).
Products take operands of DOT and add up in float32; exponentials are powers of 2. Rows are counted in 64 bits.
"""

# Triton reads a kernel's parameters from the call: they carry no types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_part(x, row, is_real, size, first, width, BLOCK: tl.constexpr):
    """`width` channels from `first` on of rows of x [rows, size] -> [len(row), BLOCK], zeros elsewhere, in the dtype of x."""
    lane = tl.arange(0, BLOCK)
    mask = is_real[:, None] & (lane[None, :] < width)
    return tl.load(x + row[:, None] * size + first + lane[None, :], mask=mask, other=0.0)


@triton.jit
def _load_rest(x, row, is_real, size, split, main, DOT: tl.constexpr, BLOCK_R: tl.constexpr):
    """The channels from `split` on; if there are none (BLOCK_R 0) `main`, which nothing reads."""
    return _load_part(x, row, is_real, size, split, size - split, BLOCK_R).to(DOT) if BLOCK_R > 0 else main


@triton.jit
def _load_turned(x, row, is_real, size, first, width, BLOCK: tl.constexpr):
    """As `_load_part`, a row in each column: [BLOCK, len(row)]."""
    lane = tl.arange(0, BLOCK)
    mask = is_real[None, :] & (lane[:, None] < width)
    return tl.load(x + row[None, :] * size + first + lane[:, None], mask=mask, other=0.0)


@triton.jit
def _store_turned(x, value, row, is_real, size, first, width, BLOCK: tl.constexpr):
    """Write what `_load_turned` reads."""
    lane = tl.arange(0, BLOCK)
    mask = is_real[None, :] & (lane[:, None] < width)
    tl.store(x + row[None, :] * size + first + lane[:, None], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _place(kv_heads, tiles, parts):
    """A program's query, key head, tile and part of it, by its number: those that read the same numbers run at the same time."""
    number = tl.program_id(0)
    tile, query = number // parts % tiles, number // (parts * tiles * kv_heads)
    return query.to(tl.int64), number // (parts * tiles) % kv_heads, tile, number % parts


@triton.jit
def _chosen_rows(rows, query, kv_head, start, slots, kv_heads, BLOCK_N: tl.constexpr):
    """Of a query's choices from `start` on: their slots, rows of k as [R * J, K], and which are keys."""
    slot = start + tl.arange(0, BLOCK_N)
    row = tl.load(rows + query * slots + slot, mask=slot < slots, other=-1)
    return slot, row * kv_heads + kv_head, row >= 0


@triton.jit
def _head_rows(query, kv_head, begin, heads, kv_heads, BLOCK_H: tl.constexpr):
    """Of a key head's query heads from `begin` on: row of the first in q as [Q * H, K], places after it, and which are."""
    group = heads // kv_heads
    member = begin + tl.arange(0, BLOCK_H)
    return query * heads + kv_head * group, member, member < group


@triton.jit
def _load_queries(q, row, is_head, size, split, DOT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """Both parts of queries, turned: loaded so, they stay in shared memory while a loop reads them."""
    main = _load_turned(q, row, is_head, size, 0, split, BLOCK_K).to(DOT)
    rest = _load_turned(q, row, is_head, size, split, size - split, BLOCK_R).to(DOT) if BLOCK_R > 0 else main
    return main, rest


@triton.jit
def _scores(k_main, k_rest, q_main, q_rest, BLOCK_R: tl.constexpr):
    """Products of keys and turned queries [BLOCK_N, BLOCK_H]. "tf32x3": float32 inputs keep their digits in three products."""
    scores = tl.dot(k_main, q_main, input_precision="tf32x3")
    if BLOCK_R > 0:
        scores = tl.dot(k_rest, q_rest, scores, input_precision="tf32x3")
    return scores


@triton.jit
def chosen_forward_kernel(
    q, k, v, rows, ends, o, log_sums, slots, heads, kv_heads, size, split, value_size, scale_log2,
    SHARED: tl.constexpr, DOT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """o and the log-sum-exp in base 2 [Q, H]. Programs: tiles of a key head's heads. v is None if SHARED."""
    query, kv_head, begin, _part = _place(kv_heads, tl.cdiv(heads // kv_heads, BLOCK_H), 1)
    first_head, row, is_head = _head_rows(query, kv_head, begin * BLOCK_H, heads, kv_heads, BLOCK_H)
    q_main, q_rest = _load_queries(q + first_head * size, row, is_head, size, split, DOT, BLOCK_K, BLOCK_R)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    result = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    for start in tl.range(0, tl.load(ends + query), BLOCK_N, disable_licm=True):
        _, key, is_key = _chosen_rows(rows, query, kv_head, start, slots, kv_heads, BLOCK_N)
        k_main = _load_part(k, key, is_key, size, 0, split, BLOCK_K).to(DOT)
        k_rest = _load_rest(k, key, is_key, size, split, k_main, DOT, BLOCK_R)
        scores = _scores(k_main, k_rest, q_main, q_rest, BLOCK_R) * scale_log2
        scores = tl.where(is_key[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 0))
        # Before the first key the maximum is -inf, and -inf - -inf is NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(scores - base[None, :])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(share, 0)
        values = k_main if SHARED else _load_part(v, key, is_key, value_size, 0, value_size, BLOCK_V).to(DOT)
        result = tl.dot(tl.trans(values), share.to(DOT), result * shrink[None, :], input_precision="tf32x3")
        peak = higher
    total = tl.where(total == 0.0, 1.0, total)
    _store_turned(
        o + first_head * value_size, result / total[None, :], row, is_head, value_size, 0, value_size, BLOCK_V
    )
    tl.store(log_sums + first_head + row, peak + tl.log2(total), mask=is_head)


@triton.jit
def chosen_weights_kernel(
    q, k, rows, ends, log_sums, mass, slots, heads, kv_heads, size, split, scale_log2,
    DOT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Weights of each chosen key, summed over all heads, [Q, N]. Programs: tiles of choices, for all key heads at once."""
    query, _head, tile, _part = _place(1, tl.cdiv(slots, BLOCK_N), 1)
    start, group = tile * BLOCK_N, heads // kv_heads
    total = tl.zeros((BLOCK_N,), tl.float32)
    if start < tl.load(ends + query):
        for kv_head in range(0, kv_heads):
            _, key, is_key = _chosen_rows(rows, query, kv_head, start, slots, kv_heads, BLOCK_N)
            k_main = _load_part(k, key, is_key, size, 0, split, BLOCK_K).to(DOT)
            k_rest = _load_rest(k, key, is_key, size, split, k_main, DOT, BLOCK_R)
            for begin in tl.range(0, group, BLOCK_H, disable_licm=True):
                first_head, row, is_head = _head_rows(query, kv_head, begin, heads, kv_heads, BLOCK_H)
                q_main, q_rest = _load_queries(q + first_head * size, row, is_head, size, split, DOT, BLOCK_K, BLOCK_R)
                log_sum = tl.load(log_sums + first_head + row, mask=is_head, other=0.0)
                scores = _scores(k_main, k_rest, q_main, q_rest, BLOCK_R) * scale_log2 - log_sum[None, :]
                total += tl.sum(tl.exp2(tl.where(is_key[:, None] & is_head[None, :], scores, float("-inf"))), 1)
    slot = start + tl.arange(0, BLOCK_N)
    tl.store(mass + query * slots + slot, total, mask=slot < slots)


@triton.jit
def chosen_slopes_kernel(
    q, k, v, d_o, rows, ends, log_sums, deltas, shares, slopes, slots, heads, kv_heads, size, value_stride, value_size,
    scale_log2, DOT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weights p and gradients of scores ds of each pair and head, [Q, N, H]. Programs: tiles of choices and of heads.

    p = 2^(s - log_sum), ds = p (v d_o^T - delta), where `deltas` [Q, H] are <d_o, o>. Rows of v are `value_stride` apart.
    Written are all slots of a tile that begins before a query's end, zeros for those without a key.
    """
    group = heads // kv_heads
    query, kv_head, tile, begin = _place(kv_heads, tl.cdiv(slots, BLOCK_N), tl.cdiv(group, BLOCK_H))
    start = tile * BLOCK_N
    if start < tl.load(ends + query):
        slot, key, is_key = _chosen_rows(rows, query, kv_head, start, slots, kv_heads, BLOCK_N)
        first_head, row, is_head = _head_rows(query, kv_head, begin * BLOCK_H, heads, kv_heads, BLOCK_H)
        scores = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for channel in range(0, size, BLOCK_C):
            of_keys = _load_part(k, key, is_key, size, channel, size - channel, BLOCK_C).to(DOT)
            of_queries = _load_turned(q + first_head * size, row, is_head, size, channel, size - channel, BLOCK_C).to(
                DOT
            )
            scores = tl.dot(of_keys, of_queries, scores, input_precision="tf32x3")
        products = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for channel in range(0, value_size, BLOCK_C):
            of_values = _load_part(v, key, is_key, value_stride, channel, value_size - channel, BLOCK_C).to(DOT)
            grad = _load_turned(
                d_o + first_head * value_size, row, is_head, value_size, channel, value_size - channel, BLOCK_C
            ).to(DOT)
            products = tl.dot(of_values, grad, products, input_precision="tf32x3")
        log_sum = tl.load(log_sums + first_head + row, mask=is_head, other=0.0)
        delta = tl.load(deltas + first_head + row, mask=is_head, other=0.0)
        share = tl.exp2(tl.where(is_key[:, None], scores * scale_log2 - log_sum[None, :], float("-inf")))
        slope = share * (products - delta[None, :])
        pair = (query * slots + slot)[:, None] * heads + (kv_head * group + row)[None, :]
        mask = (slot < slots)[:, None] & is_head[None, :]
        tl.store(shares + pair, share.to(shares.dtype.element_ty), mask=mask)
        tl.store(slopes + pair, slope.to(slopes.dtype.element_ty), mask=mask)


@triton.jit
def _load_pairs(x, query, slot, last, kv_head, row, is_head, slots, heads, kv_heads):
    """x [Q, N, H] of a query's slots before `last` and of heads of a key head -> [len(slot), len(row)], zeros elsewhere."""
    pair = (query * slots + slot)[:, None] * heads + (kv_head * (heads // kv_heads) + row)[None, :]
    return tl.load(x + pair, mask=(slot < last)[:, None] & is_head[None, :], other=0.0)


@triton.jit
def chosen_query_gradient_kernel(
    k, rows, ends, slopes, d_q, slots, heads, kv_heads, size, scale,
    DOT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d_q = scale k^T ds, [Q, H, K]. Programs: tiles of a key head's heads and of channels."""
    query, kv_head, begin, part = _place(kv_heads, tl.cdiv(heads // kv_heads, BLOCK_H), tl.cdiv(size, BLOCK_C))
    first_head, row, is_head = _head_rows(query, kv_head, begin * BLOCK_H, heads, kv_heads, BLOCK_H)
    channel, last = part * BLOCK_C, tl.load(ends + query)
    total = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
    for start in range(0, last, BLOCK_N):
        slot, key, is_key = _chosen_rows(rows, query, kv_head, start, slots, kv_heads, BLOCK_N)
        of_keys = _load_part(k, key, is_key, size, channel, size - channel, BLOCK_C).to(DOT)
        slope = _load_pairs(slopes, query, slot, last, kv_head, row, is_head, slots, heads, kv_heads).to(DOT)
        total = tl.dot(tl.trans(of_keys), slope, total, input_precision="tf32x3")
    _store_turned(d_q + first_head * size, total * scale, row, is_head, size, channel, size - channel, BLOCK_C)


@triton.jit
def chosen_key_gradient_kernel(
    q, d_o, ends, shares, slopes, pairs, slots, heads, kv_heads, size, value_size, value_first, width, scale,
    DOT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What queries add to d_k and d_v of their keys: pairs [Q, N, J, width]. Programs: tiles of choices and of channels.

    d_k = scale ds q on the first `size` channels, d_v = p d_o on those from `value_first` on, which may be the same. Slots from
    a query's end on are left as they are.
    """
    query, kv_head, tile, part = _place(kv_heads, tl.cdiv(slots, BLOCK_N), tl.cdiv(width, BLOCK_C))
    start, channel, last, group = tile * BLOCK_N, part * BLOCK_C, tl.load(ends + query), heads // kv_heads
    if start < last:
        slot = start + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for begin in range(0, tl.where(channel < size, group, 0), BLOCK_H):
            first_head, row, is_head = _head_rows(query, kv_head, begin, heads, kv_heads, BLOCK_H)
            slope = _load_pairs(slopes, query, slot, last, kv_head, row, is_head, slots, heads, kv_heads).to(DOT)
            of_queries = _load_part(q + first_head * size, row, is_head, size, channel, size - channel, BLOCK_C).to(DOT)
            total = tl.dot(slope, of_queries, total, input_precision="tf32x3")
        total *= scale
        lane = channel + tl.arange(0, BLOCK_C)
        of_value = lane - value_first
        is_value = (of_value >= 0) & (of_value < value_size)
        has_values = (channel + BLOCK_C > value_first) & (channel < value_first + value_size)
        for begin in range(0, tl.where(has_values, group, 0), BLOCK_H):
            first_head, row, is_head = _head_rows(query, kv_head, begin, heads, kv_heads, BLOCK_H)
            share = _load_pairs(shares, query, slot, last, kv_head, row, is_head, slots, heads, kv_heads).to(DOT)
            place = (first_head + row)[:, None] * value_size + of_value[None, :]
            grad = tl.load(d_o + place, mask=is_head[:, None] & is_value[None, :], other=0.0).to(DOT)
            total = tl.dot(share, grad, total, input_precision="tf32x3")
        pair = (query * slots + slot) * kv_heads + kv_head
        mask = (slot < last)[:, None] & (lane < width)[None, :]
        tl.store(pairs + pair[:, None] * width + lane[None, :], total, mask=mask)


@triton.jit
def sum_pairs_kernel(
    pairs, order, offsets, d_rows, num_keys, width,
    KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Add to d_rows [R, J * width] the rows of pairs [Q * N, J * width] of each key. Grid: (tiles of keys, tiles of channels).

    Those of key s are order[offsets[s]] to order[offsets[s + 1] - 1], in the order of the queries.
    """
    begin_key = tl.program_id(0).to(tl.int64) * KEYS
    lane = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    for key in range(begin_key, tl.minimum(begin_key + KEYS, num_keys)):
        begin, end = tl.load(offsets + key), tl.load(offsets + key + 1)
        if begin < end:
            total = tl.load(d_rows + key * width + lane, mask=lane < width, other=0.0)
            for start in range(begin, end, BLOCK_M):
                entry = start + tl.arange(0, BLOCK_M)
                pair = tl.load(order + entry, mask=entry < end, other=0)
                mask = (entry[:, None] < end) & (lane[None, :] < width)
                total += tl.sum(tl.load(pairs + pair[:, None] * width + lane[None, :], mask=mask, other=0.0), 0)
            tl.debug_barrier()  # threads that store a number need not be those that loaded it
            tl.store(d_rows + key * width + lane, total, mask=lane < width)
