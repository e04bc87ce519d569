"""Activation memory of a block by formula: what forward keeps for backward, and what backward needs while it runs.

How it works: for every letter of the pattern the tensors that its kernels save are added up, each once, views of one
storage together. What a kernel recomputes by design is not counted; blocks of `train.recompute` keep only their input.
All sizes are bytes a token of one rank, so that `memory.py` multiplies by the tokens of a micro-batch and a search over
layouts costs no tensor work. A `Split` says how tensor, sequence and expert parallelism shrink a rank's part.

Why formulas for our own blocks and fake tensors for registered ones (`registered.py`): our kernels are fixed and their
savings known, while a plugin says nothing of what it keeps. tests/launch/plan/real_memory.py compares the sums with real steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amfm.launch.plan.registered import COUNTED_TOKENS, is_registered, registered_block
from amfm.model.config.attention import AttentionConfig
from amfm.model.config.mamba2 import Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.config.structure import DENSE, Structure

FLOAT32_BYTES, INT32_BYTES = 4, 4
# Slices of the head's logits, in elements, and their least rows (kernels/linear_cross_entropy).
LOGITS_SLICE = {"triton": 1 << 28, "torch": 1 << 21}
LOGITS_LEAST_ROWS = {"triton": 256, "torch": 128}


@dataclass(frozen=True)
class BlockBytes:
    """Activation bytes a token of one block: `kept` from forward to backward, `working` only during backward.

    `apart`: of both, what is never there together, as backward frees some before it needs the rest.
    """

    kept: float
    working: float
    apart: float = 0.0


@dataclass(frozen=True)
class Storage:
    """Precision and kernels of a run: `element_bytes` of a weight or activation (4 or 2), `backend` triton or torch, and
    `state_bytes` of a master or moment.

    The backend matters because Triton and PyTorch implementations save different tensors and slice the head
    differently.
    """

    element_bytes: int
    backend: str
    state_bytes: int = FLOAT32_BYTES


@dataclass(frozen=True)
class Split:
    """How a rank's part of a block is smaller than the block: widths over `tensor` ranks, tokens between blocks over `stream`.

    `tokens`: tensor ranks among which a router's tokens are cut. `is_spread`: experts live on other ranks, so rows are
    copied on their way. `sent`: rows of a token that travel, once to each rank of its experts; 0 where a row of each choice lies
    in a slot. `beside`: ranks that share the inner width of spread experts, each of which has the rows of all. `rows`:
    routed rows of the fullest rank over the mean. `parts`: in which those come to the experts. `is_in_segments`: rows lie on
    several context ranks, so that a Mamba2 block runs in parts.
    """

    tensor: int = 1
    stream: int = 1
    tokens: int = 1
    is_spread: bool = False
    sent: float = 0.0
    beside: int = 1
    rows: float = 1.0
    parts: int = 1
    is_in_segments: bool = False


def block_bytes(config: ModelConfig, letter: str, storage: Storage, split: Split = Split()) -> BlockBytes:
    """Bytes a token that one block of the pattern keeps and works with, its norm and residual stream included.

    `letter` is the block's symbol in `model.pattern`; registered mixers are measured on fake tensors, all others follow
    from the configuration. Assumes that `check_model` passed, so that the section of the letter exists.
    """
    e = storage.element_bytes
    stream = FLOAT32_BYTES if config.residual_in_fp32 else e
    # The summed stream and one number a row for the norm, then the normed input that the first product keeps: of cut
    # tokens this rank's, because projections gather them again in backward. Routed experts keep all that they gathered,
    # unless they are spread: then each rank sends its own tokens.
    tokens = 1 if letter == "E" and not split.is_spread else split.stream
    kept = (config.hidden_size * stream + FLOAT32_BYTES) / split.stream + config.hidden_size * e / tokens
    if letter == "M":
        assert config.mamba is not None, "check_model was not called: model.mamba is missing"
        inner = _mamba_bytes(config.mamba, storage, split)
    elif letter == "*":
        assert config.attention is not None, "check_model was not called: model.attention is missing"
        inner = _attention_bytes(config.attention, storage)
    elif is_registered(letter):
        dtype = torch.float32 if e == FLOAT32_BYTES else torch.bfloat16
        # Its heads are cut; what every tensor rank has whole (insides of low-rank gates) is not.
        block = registered_block(config, letter, dtype, COUNTED_TOKENS, storage.backend, split.tensor)
        inner = BlockBytes(block.kept_bytes, block.working_bytes)
    elif letter == "E":
        assert config.moe is not None, "check_model was not called: model.moe is missing"
        inner = _moe_bytes(config.moe, config.hidden_size, storage, split)
    else:
        assert config.feed_forward is not None, "check_model was not called: model.feed_forward is missing"
        units = config.feed_forward.hidden_size
        rows = up_rows(units, config.feed_forward.activation)
        between = _between(config.hidden_size, units, rows, config.feed_forward.structure())
        if config.guide is not None and config.feed_forward.structure() != DENSE:
            between += 2 * rows  # outputs of the dense and the factored matrix, before they are mixed
        inner = BlockBytes((rows + units + between) * e, (rows + units + between) * e + units * FLOAT32_BYTES)
    if letter in ("*", "-"):
        inner = BlockBytes(inner.kept / split.tensor, inner.working / split.tensor)
    # Gradients of the stream, of the block's input and of its normed input.
    working = inner.working + config.hidden_size * (stream / split.stream + 2 * e)
    return BlockBytes(kept + inner.kept, working, inner.apart)


def recomputed_bytes(block: BlockBytes, config: ModelConfig, storage: Storage, stream_ranks: int = 1) -> BlockBytes:
    """The same block under activation recomputation: it keeps its input stream, all else becomes working space."""
    stream = config.hidden_size * (FLOAT32_BYTES if config.residual_in_fp32 else storage.element_bytes) / stream_ranks
    return BlockBytes(stream, block.kept - stream + block.working - block.apart)


def _between(width: int, units: int, rows: int, structure: Structure) -> int:
    """Numbers a token between the factors of up and down; none of dense matrices."""
    return structure.between(width, rows) + structure.between(units, width)


def depth_bytes(config: ModelConfig, storage: Storage, tensor: int, stream_ranks: int) -> float:
    """Bytes a token that a depth of multi-token prediction keeps around its blocks.

    The embedding of the token ahead and the two normed streams, joined; where tensor ranks cut the projection, its part of
    them; and at the end the summed stream, its norm, and one number a row for each of the three norms.
    """
    e, hidden = storage.element_bytes, config.hidden_size
    stream = FLOAT32_BYTES if config.residual_in_fp32 else e
    kept = (2 * stream * hidden + 4 * e * hidden + 3 * FLOAT32_BYTES) / stream_ranks
    return kept if tensor == 1 else kept + 2 * hidden * e / tensor


def stream_bytes(config: ModelConfig, storage: Storage, split: Split = Split()) -> float:
    """Bytes a token of the residual stream between blocks."""
    return config.hidden_size * (FLOAT32_BYTES if config.residual_in_fp32 else storage.element_bytes) / split.stream


def weight_gradient_bytes(config: ModelConfig, letter: str, storage: Storage, split: Split = Split()) -> float:
    """Bytes a token of what a block's weight gradients are made of, where a schedule puts them off.

    Of each projection and of routed experts what they read, and the gradient of what they gave; all else of the pass is
    over (kernels/common/split_backward.py). Projections of one stream share what they read, all tokens of it.
    """
    e, hidden = storage.element_bytes, config.hidden_size
    found = 2.0 * hidden * e
    if letter == "M" and config.mamba is not None:
        mamba = config.mamba
        inner, groups = mamba.inner_size() / split.tensor, max(1.0, mamba.num_groups / split.tensor)
        return found + (3 * inner + 2 * groups * mamba.state_size + mamba.num_heads / split.tensor) * e
    if letter == "*" and config.attention is not None:
        attention = config.attention
        gates = {"none": 0, "head": attention.num_heads, "element": attention.num_heads * attention.head_dim}
        numbers = 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim + gates[attention.gate]
        return found + numbers * e / split.tensor
    if letter == "E" and config.moe is not None:
        moe, width = config.moe, config.moe.latent_size or hidden
        choices, units = moe.top_k * split.rows / split.tensor, moe.expert_hidden_size
        found += choices * (up_rows(units, moe.activation) + units) * e
        if split.sent:  # and which row is of which choice
            found += split.beside * arrived_rows(split) * (2 * width * e + INT32_BYTES * moe.top_k)
        else:
            found += 2 * width * e * (split.beside * choices if split.is_spread else 1 / split.tokens)
        if moe.latent_size is not None:
            found += 2 * width * e / split.tokens
        shared = moe.shared_expert_hidden_size
        rows = up_rows(shared, moe.activation)
        return found + (rows + shared + 2 * _between(hidden, shared, rows, moe.shared_structure())) * e / split.tensor
    if letter == "-" and config.feed_forward is not None:
        section = config.feed_forward
        units, rows = section.hidden_size, up_rows(section.hidden_size, section.activation)
        return found + (units + rows + 2 * _between(hidden, units, rows, section.structure())) * e / split.tensor
    dtype = torch.float32 if e == FLOAT32_BYTES else torch.bfloat16
    block = registered_block(config, letter, dtype, COUNTED_TOKENS, storage.backend, split.tensor)
    return found + sum((out + into) * e - hidden * e * (hidden in (out, into)) for out, into in block.matrices)


def up_rows(units: int, activation: str) -> int:
    """Rows of the up projection for `units` hidden units: gate and up, twice as many, for SwiGLU."""
    return 2 * units if activation == "swiglu" else units


def _mamba_bytes(mamba: Mamba2Config, storage: Storage, split: Split) -> BlockBytes:
    """A rank's part: heads are cut evenly, a group of B and C that several ranks share is on each of them."""
    tensor = split.tensor
    e, inner, heads = storage.element_bytes, mamba.inner_size() / tensor, mamba.num_heads / tensor
    groups = max(1.0, mamba.num_groups / tensor)
    channels = inner + 2 * groups * mamba.state_size
    # States that enter chunks of at most 128 tokens, kept or made again, and the gradients of those that leave them.
    states = inner * mamba.state_size / min(mamba.chunk_size, 128) * e
    if storage.backend == "triton" and mamba.num_groups >= tensor and not split.is_in_segments:
        # One operation keeps the projection and the norm's factors, and y with the states. In backward it has the
        # projection's gradient, that of y, the convolved channels and theirs; before that, y and two more of its width.
        projected = (inner + channels + heads) * e
        kept_by_one = projected + groups * FLOAT32_BYTES
        if mamba.keep_states:
            return BlockBytes(kept_by_one + inner * e + states, projected + (inner + 2 * channels) * e + states)
        working = max(
            projected + (4 * inner + channels) * e + states, projected + (inner + 2 * channels) * e + 2 * states
        )
        return BlockBytes(kept_by_one, working)
    # The whole projection (z, x, B, C, dt are views of it), the convolved channels, y before and after the gated norm.
    kept: float = (inner + channels + heads) * e + channels * e + 2 * inner * e
    kept += (3 * heads + groups) * FLOAT32_BYTES
    if split.is_in_segments:
        # The convolution's input, joined with the rows before it; and the states before those of other ranks came in.
        kept += channels * e + (states if storage.backend == "triton" and mamba.keep_states else 0.0)
    if mamba.num_groups < tensor:
        # A norm whose group lies on several ranks: silu(z), gated and scaled in float32, and y and z widened to it.
        kept += 3 * inner * FLOAT32_BYTES + (2 * inner * FLOAT32_BYTES if e < FLOAT32_BYTES else 0)
    projection = (inner + channels + heads) * e
    if storage.backend == "triton":
        kept += states if mamba.keep_states else 0.0
        working = 2 * projection + channels * FLOAT32_BYTES + 2 * inner * e + states
        # Both y are gone when the scan goes backward, and the projection's gradient and the carry's states come after it.
        apart = 2 * inner * e + projection + (states if mamba.keep_states else 0.0)
        return BlockBytes(kept, working if mamba.keep_states else working + states, apart)
    states = inner * mamba.state_size / mamba.chunk_size * FLOAT32_BYTES
    # PyTorch also keeps the sums before SiLU, y before the skip, decays inside chunks, and the states entering them.
    square = heads * mamba.chunk_size * FLOAT32_BYTES
    kept += (channels + inner) * FLOAT32_BYTES + square + states
    return BlockBytes(kept, projection + (3 * inner + 2 * channels) * FLOAT32_BYTES + 3 * square + 2 * states)


def _attention_bytes(attention: AttentionConfig, storage: Storage) -> BlockBytes:
    """Bytes of an attention block before the cut over tensor ranks; flash kernels keep no [T, S] scores."""
    e, size = storage.element_bytes, attention.head_dim
    query, keys = attention.num_heads * size, 2 * attention.num_kv_heads * size
    # q, k, v, the output and its log-sum-exp; with a norm or rotation q and k before it too.
    kept: float = (2 * query + keys) * e + attention.num_heads * FLOAT32_BYTES
    if attention.qk_norm or attention.positions == "rope":
        kept += (query + keys / 2) * e
    if attention.gate != "none":
        # The gates, and the gated output beside the one before.
        kept += (query + (query if attention.gate == "element" else attention.num_heads)) * e
    if storage.backend == "torch":
        kept += query * e  # documents are attended one by one and joined
    return BlockBytes(kept, (2 * query + keys) * e + (query + keys) * FLOAT32_BYTES)


def _moe_bytes(moe: MoeConfig, hidden_size: int, storage: Storage, split: Split) -> BlockBytes:
    """A rank's part of an E block, router and shared expert included, in bytes a token of the micro-batch.

    Router tensors are cut over `split.tokens`; chosen rows over the tensor ranks, which cut either tokens or expert
    widths.
    """
    e, width = storage.element_bytes, moe.latent_size or hidden_size
    rows = up_rows(moe.expert_hidden_size, moe.activation)
    # Router logits and scores, ids and weights of the choices and where they are sorted to; the hidden rows of experts.
    kept = 3.0 * moe.num_experts * FLOAT32_BYTES + moe.top_k * (8 + 8 + 2 * FLOAT32_BYTES)
    if moe.latent_size is not None:
        kept += 2 * moe.latent_size * e
    kept /= split.tokens
    # Either tokens or widths of the routed experts are cut over tensor ranks.
    choices = moe.top_k * split.rows / split.tensor
    kept += choices * rows * e
    arrived = split.beside * arrived_rows(split)
    if split.sent:
        # Rows as they came, with weights and ids of all choices of their tokens, and how those are sorted by expert.
        kept += arrived * (width * e + moe.top_k * (2 * FLOAT32_BYTES + 3 * INT32_BYTES))
    elif split.is_spread:
        kept += (split.beside + 1) * choices * width * e  # rows as they came, and results as they went back
    shared = moe.shared_expert_hidden_size
    shared_rows = up_rows(shared, moe.activation)
    kept += (
        (shared_rows + shared + _between(hidden_size, shared, shared_rows, moe.shared_structure())) * e / split.tensor
    )
    if moe.shared_expert_gate:
        kept += (hidden_size + 1) * e / split.tokens  # what is gated, and the gate
    units = moe.expert_hidden_size
    if storage.backend == "triton" and split.sent:
        # Of a part gradients of hidden rows, the activation, and gradients of rows by choice, beside all those that came and go.
        by_choice = choices / split.parts * (split.beside * width + rows + units) * e
        return BlockBytes(kept, by_choice + arrived * (2 * width * e + moe.top_k * FLOAT32_BYTES))
    if storage.backend == "triton":
        # Gradients of rows and of hidden rows, and the activation. Where rows lie in slots, the results that went back make
        # room for their gradients.
        return BlockBytes(kept, choices * ((2 * split.beside - 1) * width + rows + units) * e)
    # Rows and their gradients in expert order, hidden rows with activation and gradient, sums by token in float32.
    working = choices * (3 * width * e + (rows + 3 * units) * e) + 2 * width * FLOAT32_BYTES
    return BlockBytes(kept, working)


def arrived_rows(split: Split) -> float:
    """Rows of tokens that come to a rank's experts, for each token of the micro-batch, where they travel by rank."""
    return split.sent * split.rows / split.tensor


def head_bytes(config: ModelConfig, storage: Storage, tokens: float, tensor: int = 1) -> tuple[float, float]:
    """(kept, working) bytes of the head for `tokens` tokens in one pass; the loss makes its gradients in forward.

    Kept: gradients of hidden and weight. Working: one slice of float32 logits with its gradient, and the float32 sum of
    the weight's gradient. Slices keep the [tokens, vocab] logits from ever existing whole. With tensor parallelism
    Triton kernels compute the logits again in backward, because a slice's softmax needs sums over all ranks first.
    """
    e, vocab, hidden = storage.element_bytes, config.vocab_size // tensor, config.hidden_size
    backend = storage.backend
    # The kernel chooses rows by elements of a slice, so a large vocabulary gets few rows, down to a least number.
    rows: float = max(LOGITS_LEAST_ROWS[backend], LOGITS_SLICE[backend] // vocab)
    if backend == "triton":
        rows = max(LOGITS_LEAST_ROWS[backend], min(4096, rows // 128 * 128))  # whole tiles
    # Triton's first slice is the sum itself; at the second the float32 sum lies beside both products.
    is_summed = e < FLOAT32_BYTES and (backend == "torch" or tokens > rows)
    product: float = vocab * hidden * e
    sums: float = vocab * hidden * FLOAT32_BYTES if is_summed else 0.0
    if is_summed and backend == "triton":
        sums += product
    rows = min(tokens, rows)
    if tensor > 1 and backend == "triton":
        return tokens * hidden * 2 * e, tokens * hidden * e + rows * vocab * e + product + sums
    return tokens * hidden * 3 * e + product, rows * vocab * (FLOAT32_BYTES + e) + sums
