"""Seconds of a step: each operation at its roofline, ZeRO's collectives on rings, AdamW and gradient sums by bandwidth.

Roofline: an operation takes the longer of its arithmetic at a stated part of the peak and its bytes at a stated part of
the bandwidth (Williams et al. 2009, "Roofline", section 3). Ring collectives over N ranks move (N - 1) / N of the bytes
once for a gather or scatter and twice for an all-reduce (Thakur et al. 2005, "Optimization of Collective Communication
Operations in MPICH", section 3). Routing is dropless and experts are not spread over ranks, so how unevenly tokens
choose experts changes neither a rank's arithmetic nor its memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan_activations import FLOAT32_BYTES, Storage, up_rows
from launch.plan_hardware import Hardware
from launch.plan_memory import BUCKET_ELEMENTS, KINDS, Layout
from model.config import ModelConfig
from model.flops import count_parameters
from model.pattern import parse_pattern
from pretrain.config import RunConfig
from pretrain.recompute import recomputed_letters


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part; `exposed_gathers` is what compute does not hide."""

    compute: dict[str, float]
    optimizer: float
    reduction: float
    exposed_gathers: float

    def total(self) -> float:
        """The whole step."""
        return sum(self.compute.values()) + self.optimizer + self.reduction + self.exposed_gathers


class Roofline:
    """Adds up the seconds of forward and backward operations on one device; `forwards` is 2 where blocks are recomputed."""

    def __init__(self, hardware: Hardware, precision: str, element_bytes: int, forwards: int = 1) -> None:
        self.hardware, self.element_bytes, self.forwards = hardware, element_bytes, forwards
        self.peak = hardware.peak_flops(precision)
        self.bandwidth = hardware.memory_bytes_per_second * hardware.memory_efficiency
        self.seconds = 0.0

    def product(self, rows: float, inputs: float, outputs: float, *, groups: int = 1, wide: bool = False) -> None:
        """[rows, in] times [in, out], and the two products of its backward pass; `groups` matrices share the rows.

        `wide`: in float32, as the router's logits are.
        """
        hardware = self.hardware
        efficiency = hardware.grouped_efficiency if groups > 1 else hardware.product_efficiency
        peak = hardware.float32_flops if wide else self.peak
        size = FLOAT32_BYTES if wide else self.element_bytes
        moved = size * (rows * (inputs + outputs) + groups * inputs * outputs)
        self.seconds += (self.forwards + 2) * max(
            2 * rows * inputs * outputs / (peak * efficiency), moved / self.bandwidth
        )

    def mixing(self, flops: float, moved: float) -> None:
        """Attention or a scan: forward `flops` and bytes; backward computes the scores again, 2.5 times as much."""
        rate = self.peak * self.hardware.attention_efficiency
        self.seconds += (self.forwards + 2.5) * max(flops / rate, moved / self.bandwidth)

    def passes(self, moved: float) -> None:
        """Bytes that operations without products move, forward and backward together; a third of them are forward's."""
        self.seconds += (self.forwards + 2) / 3 * moved / self.bandwidth


def block_seconds(config: RunConfig, letter: str, tokens: int, hardware: Hardware, storage: Storage) -> float:
    """Forward and backward seconds of one block for a micro-batch of `tokens` tokens."""
    model, e = config.model, storage.element_bytes
    forwards = 2 if letter in recomputed_letters(config) else 1
    line = Roofline(hardware, config.train.precision, e, forwards)
    # The norm with its residual: two tensors read and two written; backward reads three and writes two.
    line.passes(9 * tokens * model.hidden_size * e)
    if letter == "M":
        _add_mamba(line, model, tokens)
    elif letter == "*":
        _add_attention(line, model, tokens, config.train.sequence_length)
    elif letter == "E":
        _add_moe(line, model, tokens)
    else:
        assert model.feed_forward is not None, "check_model was not called: model.feed_forward is missing"
        feed_forward = model.feed_forward
        _add_feed_forward(line, tokens, model.hidden_size, feed_forward.hidden_size, feed_forward.activation)
    return line.seconds


def _add_feed_forward(line: Roofline, rows: float, width: int, units: int, activation: str, groups: int = 1) -> None:
    up = up_rows(units, activation)
    line.product(rows, width, up, groups=groups)
    line.product(rows, units, width, groups=groups)
    line.passes(rows * (3 * up + 2 * units) * line.element_bytes)


def _add_mamba(line: Roofline, model: ModelConfig, tokens: int) -> None:
    assert model.mamba is not None, "check_model was not called: model.mamba is missing"
    mamba, e = model.mamba, line.element_bytes
    inner, channels = mamba.inner_size(), mamba.conv_channels()
    line.product(tokens, model.hidden_size, inner + channels + mamba.num_heads)
    line.product(tokens, inner, model.hidden_size)
    line.passes(tokens * channels * 5 * e + tokens * inner * 8 * e)  # convolution, gated norm
    # Scores once a group, their product with x, and the state's way in and out.
    scan = 2 * mamba.chunk_size * (mamba.num_groups * mamba.state_size + inner) + 4 * inner * mamba.state_size
    states = FLOAT32_BYTES * inner * mamba.state_size / mamba.chunk_size
    line.mixing(tokens * scan, tokens * ((channels + inner) * e + states))


def _add_attention(line: Roofline, model: ModelConfig, tokens: int, sequence_length: int) -> None:
    assert model.attention is not None, "check_model was not called: model.attention is missing"
    attention, e = model.attention, line.element_bytes
    query, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    line.product(tokens, model.hidden_size, query + 2 * keys)
    line.product(tokens, query, model.hidden_size)
    if attention.qk_norm or attention.positions == "rope":
        line.passes(5 * tokens * (query + keys) * e)
    line.mixing(tokens * 4 * (sequence_length + 1) / 2 * query, tokens * (2 * query + 2 * keys) * e)


def _add_moe(line: Roofline, model: ModelConfig, tokens: int) -> None:
    assert model.moe is not None, "check_model was not called: model.moe is missing"
    moe, e, hidden = model.moe, line.element_bytes, model.hidden_size
    width, rows = moe.latent_size or hidden, tokens * moe.top_k
    line.product(tokens, hidden, moe.num_experts, wide=True)
    line.passes(6 * tokens * moe.num_experts * FLOAT32_BYTES)
    if moe.latent_size is not None:
        line.product(tokens, hidden, width)
        line.product(tokens, width, hidden)
    _add_feed_forward(line, rows, width, moe.expert_hidden_size, moe.activation, groups=moe.num_experts)
    line.passes(rows * width * (4 * e + 2 * FLOAT32_BYTES))  # into expert order, back, and both gradients
    if moe.shared_expert_hidden_size:
        _add_feed_forward(line, tokens, hidden, moe.shared_expert_hidden_size, moe.activation)


def head_seconds(config: RunConfig, tokens: int, hardware: Hardware, storage: Storage) -> float:
    """Final norm, logits, loss and both gradients; logits pass through memory in float32."""
    model = config.model
    line = Roofline(hardware, config.train.precision, storage.element_bytes)
    line.product(tokens, model.hidden_size, model.vocab_size)
    line.passes(4 * FLOAT32_BYTES * tokens * model.vocab_size + 9 * tokens * model.hidden_size * storage.element_bytes)
    return line.seconds


def estimate_step(
    config: RunConfig, layout: Layout, hardware: Hardware, storage: Storage, *, overlap: float
) -> StepTime:
    """Seconds of one step of a rank. `overlap`: part of ZeRO-3's gathers that may run beside compute.

    Reductions come after the last backward pass, so nothing hides them.
    """
    train, e = config.train, storage.element_bytes
    passes = train.global_batch_size // (layout.micro_batch_size * layout.ranks)
    tokens = layout.micro_batch_size * train.sequence_length
    letters = parse_pattern(config.model.pattern).letters
    compute = {
        KINDS[letter]: passes * letters.count(letter) * block_seconds(config, letter, tokens, hardware, storage)
        for letter in dict.fromkeys(letters)
    }
    compute["head"] = passes * head_seconds(config, tokens, hardware, storage)
    parameters = count_parameters(config.model).total
    gathers = 0.0
    if layout.zero_stage == 3:
        # Forward and backward of each micro-batch, block by block.
        gathers = 2 * passes * ring_seconds(e * parameters, layout.ranks, hardware, calls=len(letters))
    hidden = min(gathers * overlap, sum(compute.values()))
    return StepTime(
        compute, optimizer_seconds(parameters, passes, layout, hardware, storage),
        reduction_seconds(parameters, layout, hardware, storage), gathers - hidden,
    )  # fmt: skip


def optimizer_seconds(parameters: int, passes: int, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Float32 sums of bf16 gradients, the check for finite ones, and AdamW on this rank's share."""
    e, share = storage.element_bytes, parameters / (layout.ranks if layout.zero_stage else 1)
    moved = e * parameters + (7 * FLOAT32_BYTES + e) * share
    if e < FLOAT32_BYTES and passes > 1:
        moved += passes * (2 * e + 2 * FLOAT32_BYTES) * parameters
    return moved / (hardware.memory_bytes_per_second * hardware.memory_efficiency)


def reduction_seconds(parameters: int, layout: Layout, hardware: Hardware, storage: Storage) -> float:
    """Gradients, in float32: an all-reduce at stages 0 to 2, a scatter at 3; then weights gathered at 1 and 2."""
    calls = -(-parameters // BUCKET_ELEMENTS)
    scatter = ring_seconds(FLOAT32_BYTES * parameters, layout.ranks, hardware, calls=calls)
    if layout.zero_stage == 3:
        return scatter
    gather = ring_seconds(storage.element_bytes * parameters, layout.ranks, hardware, calls=calls)
    return 2 * scatter + (gather if layout.zero_stage else 0.0)


def ring_seconds(moved: float, ranks: int, hardware: Hardware, *, calls: int) -> float:
    """A gather or scatter of `moved` bytes in all, in `calls` collectives."""
    if ranks == 1:
        return 0.0
    return (
        moved * (ranks - 1) / ranks / hardware.ring_bytes_per_second(ranks) + calls * (ranks - 1) * hardware.hop_seconds
    )
