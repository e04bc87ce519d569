"""Attention to keys that an indexer chooses, and what teaches the indexer: DeepSeek sparse attention.

How: an indexer of narrow heads scores every key of a query's document, `choose_keys` takes the highest, `sparse_attention`
reads only those, and a loss draws the indexer's softmax towards what attention weighed: all keys in a warm-up whose
attention is dense (`warm_up_loss`), the chosen ones afterwards (`chosen_loss`). `reference.py` is the definition with its
[T, S] scores; `torch_impl.py` takes blocks of queries and keeps no scores for backward. Both losses make their gradients in
forward, because that is where the scores are.

Source: DeepSeek-AI 2025, DeepSeek-V3.2 (arXiv 2512.02556), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from amfm.kernels.attention.log_sums import raise_highest
from amfm.kernels.common.inputs import check_documents, check_float, check_shape
from amfm.kernels.runtime.backend import BACKENDS, resolve_backend
from amfm.kernels.sparse_attention import reference, torch_impl
from amfm.kernels.sparse_attention.reference import IndexRows, keep


def choose_keys(
    index: IndexRows, *, top_k: int, document_ids_BS: Tensor | None = None, backend: str = "torch"
) -> Tensor:
    """Places [B, T, N] int64 of the keys with the highest scores for each query, N = min(top_k, S), in the order of the row.

    The last T keys are those of the queries, which see the keys of their document up to their own; `document_ids_BS` are those
    of the keys. Of equal scores the earlier key is taken, so that ranks and layouts choose alike; -1 fills the places of
    queries that see fewer keys. No gradient. Raises ValueError for wrong shapes and dtypes.
    """
    _check_index(index, document_ids_BS)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    choose = reference.choose_keys if _plain(backend) == "reference" else torch_impl.choose_keys
    return choose(index, min(top_k, index.k_BSC.shape[1]), document_ids_BS)


def sparse_attention(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor | int,
    places_BTN: Tensor,
    *,
    scale: float,
    highest_H: Tensor | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over only the keys at `places_BTN` -> [B, T, H, V], and the weights of each key, [B, T, N].

    q [B, T, H, K], k [B, S, J, K], v [B, S, J, V] with J dividing H; a number V in place of v: values are the first V channels of
    keys, as of latents. A place of -1 stands for none, and each query needs a key. The weights are summed over heads and carry no gradient, in float32 at least as the softmax is. `highest_H` [H] is raised in
    place to the largest log-sum-exp of each head's queries. Backward reads the chosen keys again. Raises ValueError for
    wrong shapes and dtypes.
    """
    check_shape("q_BTHK", q_BTHK, (-1, -1, -1, -1))
    check_float("q_BTHK", q_BTHK)
    batch, tokens, heads, size = q_BTHK.shape
    check_shape("k_BSJK", k_BSJK, (batch, -1, -1, size), q_BTHK)
    check_float("k_BSJK", k_BSJK, q_BTHK)
    keys, kv_heads = k_BSJK.shape[1:3]
    if isinstance(v_BSJV, int):
        if not 0 < v_BSJV <= size:
            raise ValueError(f"values must be 1 to {size} of the channels of keys; got {v_BSJV}")
    else:
        check_shape("v_BSJV", v_BSJV, (batch, keys, kv_heads, -1), q_BTHK)
        check_float("v_BSJV", v_BSJV, q_BTHK)
    check_shape("places_BTN", places_BTN, (batch, tokens, -1), q_BTHK)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key heads must divide the query heads; got {kv_heads} and {heads}")
    backend = resolve_backend(backend, q_BTHK.device, "sparse_attention")
    if backend == "triton":
        from amfm.kernels.sparse_attention.triton_impl import sparse_attention_triton

        v, value_size = (None, v_BSJV) if isinstance(v_BSJV, int) else (v_BSJV, v_BSJV.shape[3])
        o_BTHV, mass_BTN, log_sums_BTH = sparse_attention_triton(q_BTHK, k_BSJK, v, places_BTN, scale, value_size)
    else:
        attend = reference.sparse_attention if backend == "reference" else torch_impl.sparse_attention
        v_BSJV = k_BSJK[..., :v_BSJV] if isinstance(v_BSJV, int) else v_BSJV
        o_BTHV, mass_BTN, log_sums_BTH = attend(q_BTHK, k_BSJK, v_BSJV, places_BTN, scale)
    if highest_H is not None:
        raise_highest(highest_H, log_sums_BTH.detach().transpose(1, 2))
    return o_BTHV, mass_BTN


def chosen_loss(index: IndexRows, places_BTN: Tensor, mass_BTN: Tensor, *, backend: str = "torch") -> Tensor:
    """KL(mass / its sum || softmax of the indexer's scores) over the keys at `places_BTN`, summed over queries.

    mass [B, T, N]: what attention gave each chosen key, of all heads, as `sparse_attention` returns it. The gradient reaches only
    the indexer's rows. A scalar in float32 at least.
    """
    _check_index(index, None)
    check_shape("mass_BTN", mass_BTN, tuple(places_BTN.shape), index.k_BSC)
    loss = reference.chosen_loss if _plain(backend) == "reference" else torch_impl.chosen_loss
    return loss(index, places_BTN, mass_BTN)


def warm_up_loss(
    index: IndexRows,
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    *,
    scale: float,
    document_ids_BS: Tensor | None = None,
    sum_heads: Callable[[Tensor], Tensor] = keep,
    backend: str = "torch",
) -> Tensor:
    """KL(what dense attention weighs || softmax of the indexer's scores) over all keys that a query sees, summed over queries.

    Shapes as in `sparse_attention`. `sum_heads` adds the weights of heads on other ranks, [B, queries, keys], in place or not;
    it is called once per block of queries, alike on all ranks. The gradient reaches only the indexer's rows. A scalar in
    float32 at least.
    """
    _check_index(index, document_ids_BS)
    check_shape("q_BTHK", q_BTHK, (*index.q_BTIC.shape[:2], -1, -1), index.k_BSC)
    check_shape("k_BSJK", k_BSJK, (*index.k_BSC.shape[:2], -1, q_BTHK.shape[3]), index.k_BSC)
    loss = reference.warm_up_loss if _plain(backend) == "reference" else torch_impl.warm_up_loss
    return loss(index, q_BTHK.detach(), k_BSJK.detach(), scale, document_ids_BS, sum_heads)


def _plain(backend: str) -> str:
    """What runs of the indexer's part, which has no Triton kernels: `auto` and `triton` are PyTorch on a GPU too."""
    if backend not in BACKENDS:
        raise ValueError(f"kernels backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return "reference" if backend == "reference" else "torch"


def _check_index(index: IndexRows, document_ids_BS: Tensor | None) -> None:
    check_shape("index.q_BTIC", index.q_BTIC, (-1, -1, -1, -1))
    check_float("index.q_BTIC", index.q_BTIC)
    batch, tokens, heads, size = index.q_BTIC.shape
    check_shape("index.k_BSC", index.k_BSC, (batch, -1, size), index.q_BTIC)
    check_shape("index.weight_BTI", index.weight_BTI, (batch, tokens, heads), index.q_BTIC)
    if index.k_BSC.shape[1] < tokens:
        raise ValueError(f"keys must be at least as many as queries; got {index.k_BSC.shape[1]} and {tokens}")
    check_documents(document_ids_BS, batch, index.k_BSC.shape[1], index.q_BTIC, name="document_ids_BS")


def sparse_flops(pairs: int, heads: int, size: int, value_size: int, *, backward: bool) -> int:
    """Floating point operations of attention over pairs of a query and a chosen key: two products forward, five backward.

    The weights that an indexer learns from take the first once more, which is not counted.
    """
    return pairs * heads * (2 * (3 * size + 2 * value_size) if backward else 2 * (size + value_size))


def sparse_bytes(queries: int, outputs: int, keys: int, places: int, element: int, *, backward: bool) -> int:
    """Least bytes, of numbers of q, of the output, of keys with their values, and of places, which are 8 bytes each.

    Forward reads q, keys and places, and writes the output and float32 weights; backward reads all but weights and the output's
    gradient, and writes three gradients. `element`: bytes of one number of q.
    """
    if backward:
        return element * 2 * (queries + outputs + keys) + 8 * places
    return element * (queries + outputs + keys) + 12 * places
