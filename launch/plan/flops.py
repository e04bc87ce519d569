"""FLOPs of matrix products, of a measured block and of a trace: torch's formulas for its operations, ours for Triton kernels and what torch has none for.

Kernels of packages are known to torch: `torch.utils.flop_counter.register_flop_formula`.

Products that an operation's body leaves to torch are counted when they run, so the table below leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from torch.utils.flop_counter import flop_registry

from amfm.kernels.attention.op import attention_flops
from amfm.kernels.decay_scan.op import scan_flops
from amfm.kernels.delta_block.sizes import DeltaSizes
from amfm.kernels.delta_scan.op import delta_flops
from amfm.kernels.sparse_attention.op import sparse_flops

Named = dict[str, Any]
Known = Callable[[Any], Any]


def count_flops(func: Any, args: Any, kwargs: Named, out: Any, known: Known = lambda tensor: None) -> int:
    """FLOPs of one call (a multiply-add is two); 0 for operations without a matrix product.

    known: the values of an integer tensor as nested lists, or None, which say what attention sees.
    """
    count = KERNELS.get(func._opname)
    if count is not None:
        return int(count(name_arguments(func, args, kwargs) | {"known": known}))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def name_arguments(func: Any, args: Any, kwargs: Named) -> Named:
    """Arguments of a call by the names in the operation's schema, positional ones too."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args)), **kwargs}


def _attention(given: Named, *, backward: bool) -> int:
    """FLOPs of causal attention: of the keys from the first that each query sees, where documents or a window say so.

    Else over the queries' own length, scaled to the keys': where keys outnumber queries (context parallelism) each query
    sees half of the keys on average.
    """
    batch, queries, heads, size = given["q_BTHK"].shape
    keys = given["k_BSJK"].shape[1]
    first_BT = None if given["first_BT"] is None else given["known"](given["first_BT"])
    if first_BT is not None:
        pairs = batch * _seen(0, queries, keys) - sum(map(sum, first_BT))
        return pairs * heads * size * (10 if backward else 4)
    return attention_flops(batch, queries, heads, size, backward=backward) * keys // max(1, queries)


def _documents(given: Named, *, backward: bool) -> int:
    """PyTorch's attention inside documents laid end to end; where their ends are not known as if all were the longest."""
    tokens, heads, size = given["query"].shape
    ends, key_ends = (given["known"](given[name]) for name in ("cu_seq_q", "cu_seq_k"))
    if ends is not None and key_ends is not None:
        window = given["window_size"][0] + 1
        lengths = ([end - start for start, end in pairwise(each)] for each in (ends, key_ends))
        return sum(map(partial(_seen, window), *lengths)) * heads * size * (10 if backward else 4)
    return attention_flops(1, tokens, heads, size, backward=backward) * given["max_q"] // tokens


def _seen(window: int, queries: int, keys: int) -> int:
    """Pairs of the last queries of as many or more keys and those up to each, only of its window unless that is 0."""
    before = keys - queries
    pairs = queries * before + queries * (queries + 1) // 2
    hidden, least = keys - window, max(1, before + 1 - window)
    return pairs if not window or hidden < least else pairs - (least + hidden) * (hidden - least + 1) // 2


def _chosen(given: Named, *, backward: bool) -> int:
    """Attention to chosen keys, of as many as queries of one document see; scores made again for the weights are not counted."""
    (batch, queries, heads, size), keys = given["q_BTHK"].shape, given["k_BSJK"].shape[1]
    pairs = batch * _seen(given["places_BTN"].shape[2], queries, keys)
    return sparse_flops(pairs, heads, size, given["value_size"], backward=backward)


def _decay(given: Named, *, backward: bool) -> int:
    """Chunked scan with one decay a head; k is [B, T, G, N], v is [B, T, H, P]."""
    (rows, tokens, groups, size), (heads, width) = given["k"].shape, given["v"].shape[2:]
    return scan_flops(rows, tokens, heads, groups, size, width, chunk_size=given["chunk_size"], backward=backward)


def _mixer(given: Named, *, backward: bool) -> int:
    """The scan inside Mamba2's mixer; its product with the output's weight is torch's, counted as it runs."""
    heads, width, groups, size, _ = given["numbers"]
    rows, tokens, _ = given["projected"].shape
    return scan_flops(rows, tokens, heads, groups, size, width, chunk_size=given["chunk_size"], backward=backward)


def _walk(given: Named) -> int:
    """What segments take beyond a scan: a walk for what leaves each, forward, or back for what enters it."""
    heads, width, _, size, _ = given["numbers"]
    rows, tokens, _ = given["projected"].shape
    return 2 * rows * tokens * heads * width * size


def _delta_block(given: Named, *, backward: bool) -> int:
    """The scan inside a delta mixer; its product with the output's weight is torch's, counted as it runs."""
    rows, tokens, _ = given["projected"].shape
    own = DeltaSizes.of(given["numbers"], given["floats"])
    sizes = (rows, tokens, own.steps, own.key_heads, own.heads, own.key, own.value)
    return delta_flops(*sizes, chunk_size=given["chunk_size"], backward=backward)


def _vector(given: Named, *, backward: bool) -> int:
    """Scan with a decay for each key channel: every head has its own keys, so it counts as a group."""
    (rows, tokens, heads, size), width = given["k"].shape, given["v"].shape[-1]
    return scan_flops(rows, tokens, heads, heads, size, width, chunk_size=given["tile"], backward=backward)


def _delta(given: Named, *, backward: bool) -> int:
    """Delta-rule scan; a five-dimensional k holds several updates a token.

    With gates of key channels as with one per head, though its kernels take products of keys by halves, log2(chunk) times.
    """
    (rows, tokens, groups, size), steps = given["q"].shape, given["k"].shape[2] if given["k"].dim() == 5 else 1
    heads, width = given["v"].shape[-2:]
    sizes = (rows, tokens, steps, groups, heads, size, width)
    return delta_flops(*sizes, chunk_size=given["chunk_size"], backward=backward)


def _experts(given: Named, *, times: int) -> int:
    """Up and down products of every chosen expert row; backward (`times=2`) has two products for each."""
    weights = given["up_EFD"][0].numel() + given["down_EDF"][0].numel()
    rows: int = given["rows"] if times == 1 else given["hidden"].shape[0]
    return times * 2 * rows * weights


def _logits(given: Named) -> int:
    """One product [R, D] x [D, V]."""
    return 2 * given["hidden_RD"].shape[0] * given["weight_VD"].numel()


def _both(formula: Callable[..., int], name: str) -> dict[str, Callable[[Named], int]]:
    """Table entries for an operation and its backward pass."""
    return {
        name: lambda given: formula(given, backward=False),
        f"{name}_backward": lambda given: formula(given, backward=True),
    }


KERNELS: dict[str, Callable[[Named], int]] = {
    **_both(_attention, "attention_triton"),
    **_both(_documents, "_varlen_attn"),
    **_both(_chosen, "sparse_attention_triton"),
    **_both(_decay, "decay_scan_triton"),
    **_both(_mixer, "mamba2_triton"),
    "mamba2_leaving_triton": _walk,
    "mamba2_entered_triton": lambda given: _mixer(given, backward=False),
    "mamba2_entered_triton_backward": _walk,
    "mamba2_leaving_triton_backward": lambda given: _mixer(given, backward=True),
    **_both(_vector, "vector_scan_triton"),
    **_both(_delta, "delta_scan_triton"),
    **_both(_delta, "delta_vector_triton"),
    **_both(_delta_block, "delta_block_triton"),
    "expert_feed_forward_triton": lambda given: _experts(given, times=1),
    "expert_feed_forward_triton_backward": lambda given: _experts(given, times=2),
    # Gradients are products of torch's inside the bodies; the logits are the kernel's.
    "linear_cross_entropy_triton": _logits,
    "linear_statistics_triton": _logits,
    "linear_statistics_triton_backward": _logits,
    # Inside bodies, where torch does not take it apart.
    "linear": lambda given: 2 * given["input"].numel() * given["weight"].shape[0],
    # Rows [S, A] times a matrix [A, B] for each expert, or [A, S] times [S, B] over each expert's rows.
    "_grouped_mm": lambda given: 2 * given["self"].numel() * given["mat2"].shape[-1],
}
