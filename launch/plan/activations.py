"""Activation memory around the blocks by formula: the residual stream between them, the head, and MTP layers.

What a block keeps and works with is measured (`measured.py`). Sizes are bytes per token of one rank, but those of the
head, whose slices of logits do not grow with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from amfm.model.config.schema import ModelConfig
from amfm.model.config.structure import Activation, matrices_of
from amfm.pretrain.config.schema import RunConfig

FLOAT32_BYTES = 4
# Slices of the head's logits, in elements, and their least rows (kernels/linear_cross_entropy).
LOGITS_SLICE = {"triton": 1 << 28, "torch": 1 << 21}
LOGITS_LEAST_ROWS = {"triton": 256, "torch": 128}


@dataclass(frozen=True)
class Handed:
    """What a rank hands to calls of one collective over one axis, in a row of `tokens` tokens on this rank."""

    axis: str
    collective: str
    dtype: str
    calls: int
    nbytes: int
    tokens: int


class Product(NamedTuple):
    """A product of activations with a weight, [rows per token of a micro-batch, in] x [in, out]; `groups` matrices share the rows.

    `is_wide`: of factors of few bits a result in float32.
    """

    weight: str
    rows: float
    inputs: int
    outputs: int
    groups: int = 1
    is_wide: bool = False


@dataclass(frozen=True)
class BlockBytes:
    """Activation bytes per token of one block: `kept` from forward to backward, `working` in addition at backward's
    peak.

    `left`: what remains of a pass that puts off the gradients of weights, of which they will be made. `launches`: operations
    that the host starts, forward and backward, whatever the tokens. `is_graphable`: whether CUDA graphs can replay them.
    Per token, forward and backward: bytes that PyTorch's operations move `between` kernels, those of the tensors that our `kernels`
    without products are given, those of attention and scans (`mixed`), and FLOPs of `scans`. `products`: with weights, of the forward
    pass. `handed`: to collectives, forward and backward together.
    """

    kept: float
    working: float
    left: float = 0.0
    launches: tuple[int, int] = (0, 0)
    is_graphable: bool = False
    between: tuple[float, float] = (0.0, 0.0)
    kernels: tuple[float, float] = (0.0, 0.0)
    mixed: tuple[float, float] = (0.0, 0.0)
    scans: tuple[float, float] = (0.0, 0.0)
    products: tuple[Product, ...] = ()
    handed: tuple[Handed, ...] = ()


@dataclass(frozen=True)
class Storage:
    """Precision and kernels of a run: `element_bytes` of a weight or activation (4 or 2), `backend` triton or torch,
    `state_bytes` of a master or moment, of which a weight that Muon does not step has `num_moments`, and `accumulates`: products add weight gradients to the float32 sums of ZeRO 1 and 2. keeps_average: a moving average of weights is next to the master weights.

    The backend matters because Triton and PyTorch implementations save different tensors and slice the head
    differently.
    """

    element_bytes: int
    backend: str
    state_bytes: int = FLOAT32_BYTES
    accumulates: bool = False
    num_moments: int = 2
    keeps_average: bool = False


def storage_of(config: RunConfig, *, on_gpu: bool = True) -> Storage:
    """Precision and kernels that the configuration resolves to; `auto` is Triton on a GPU in bf16, else PyTorch."""
    backend = config.kernels.backend
    if backend == "auto":
        backend = "triton" if on_gpu and config.train.precision == "bf16" else "torch"
    return Storage(
        2 if config.train.precision == "bf16" else 4,
        "triton" if backend == "triton" else "torch",
        2 if config.optimizer.state_dtype == "bf16" else FLOAT32_BYTES,
        # On a CPU a product is added after itself, at the cost of a hook.
        backend == "triton" and config.train.sums_in_products(),
        config.optimizer.num_moments(),
        config.ema is not None,
    )


def recomputed_bytes(block: BlockBytes, config: ModelConfig, storage: Storage, stream_ranks: int = 1) -> BlockBytes:
    """The same block under activation recomputation: it keeps its input stream, all else becomes working space.

    Where `made_bytes` has what each block begins with, that is all it keeps.
    """
    is_made = config.stream is not None and config.stream.keeps_inputs
    stream = 0.0 if is_made else stream_bytes(config, storage, stream_ranks)
    return BlockBytes(stream, block.kept - stream + block.working)


def stream_bytes(config: ModelConfig, storage: Storage, stream_ranks: int = 1) -> float:
    """Bytes per token of the residual stream between blocks."""
    return config.hidden_size * (FLOAT32_BYTES if config.residual_in_fp32 else storage.element_bytes) / stream_ranks


def made_bytes(config: ModelConfig, storage: Storage, stream_ranks: int, places: Sequence[int]) -> float:
    """Bytes per token of what these blocks of a piece keep of another kind of residual stream than the sum, next to what each one keeps."""
    if config.stream is None:
        return 0.0
    return config.stream.num_kept(places) * stream_bytes(config, storage, stream_ranks)


def mixture_bytes(config: ModelConfig) -> float:
    """Bytes per token that pass through memory where a block reads another kind of residual stream than the sum, a mean over blocks.

    PyTorch's operations in float32 read and write each of its tensors `StreamConfig.passes` times, forward and backward.
    """
    if config.stream is None:
        return 0.0
    number = len(config.letters)
    tensors = sum(map(config.stream_tensors, range(number))) / number
    return config.stream.passes * tensors * config.hidden_size * FLOAT32_BYTES


def depth_bytes(config: ModelConfig, storage: Storage, tensor: int, stream_ranks: int) -> float:
    """Bytes per token that an MTP layer keeps around its blocks.

    The embedding of the token ahead and the two normed streams, joined; where tensor ranks cut the projection, its part of
    them; and at the end the summed stream, its norm, and one number per row for each of the three norms.
    """
    e, hidden = storage.element_bytes, config.hidden_size
    stream = FLOAT32_BYTES if config.residual_in_fp32 else e
    kept = (2 * stream * hidden + 4 * e * hidden + 3 * FLOAT32_BYTES) / stream_ranks
    return kept if tensor == 1 else kept + 2 * hidden * e / tensor


def up_rows(units: int, activation: Activation) -> int:
    """Rows of the up projection for `units` hidden units: gate and up, twice as many, for gated units."""
    return units * (matrices_of(activation) - 1)


def slice_rows(vocab: float, backend: str) -> int:
    """Rows of the head's slices: the kernel chooses them by elements, so a large vocabulary gets few, down to a least number."""
    rows = max(LOGITS_LEAST_ROWS[backend], int(LOGITS_SLICE[backend] // vocab))
    if backend == "triton":
        rows = max(LOGITS_LEAST_ROWS[backend], min(4096, rows // 128 * 128))  # whole tiles
    return rows


def head_bytes(
    config: ModelConfig, storage: Storage, tokens: float, tensor: int = 1, *, accumulates: bool = False
) -> tuple[float, float]:
    """(kept, working) bytes of the head for `tokens` tokens in one pass; the loss makes its gradients in forward.

    Kept: gradients of hidden and weight. Working: one slice of float32 logits with its gradient, and the float32 sum of
    the weight's gradient. Slices keep the [tokens, vocab] logits from ever existing whole. With tensor parallelism
    Triton kernels compute the logits again in backward, because a slice's softmax needs sums over all ranks first; where
    the weight's gradient `accumulates` in its bucket's sum, their products add to it.
    """
    e, vocab, hidden = storage.element_bytes, config.vocab_size // tensor, config.hidden_size
    backend = storage.backend
    rows: float = slice_rows(vocab, backend)
    # Triton's first slice is the sum itself; at the second the float32 sum is next to both products.
    is_summed = e < FLOAT32_BYTES and (backend == "torch" or tokens > rows)
    product: float = vocab * hidden * e
    sums: float = vocab * hidden * FLOAT32_BYTES if is_summed else 0.0
    if is_summed and backend == "triton":
        sums += product
    rows = min(tokens, rows)
    if tensor > 1 and backend == "triton":
        own = 0.0 if accumulates else product + sums
        return tokens * hidden * 2 * e, tokens * hidden * e + rows * vocab * e + own
    return tokens * hidden * 3 * e + product, rows * vocab * (FLOAT32_BYTES + e) + sums
