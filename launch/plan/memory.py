"""Peak memory of one rank: persistent states, plus the fullest of building, the passes and the optimizer's step.

How it works: each phase is a table of named parts in bytes. Weights, float32 masters and moments persist, sharded
by ZeRO. The passes are walked backwards block by block, as activations shrink while gradients grow, to find their
fullest moment. The optimizer phase adds what DeepSpeed allocates to reduce gradients and to step. Building is counted
as well: a rank's model is made whole, in float32, on the device. Every pipeline stage is estimated; the fullest
decides.

Under ZeRO-1 gradients are float32 sums that lie whole on every rank until the last backward pass of a step; ZeRO-2 reduces
them in every pass and keeps this rank's share and the buckets under way. Under ZeRO-0 and 3 they lie whole in the dtype of
the weights, with bf16 and several micro-batches also as float32 sums. `amfm bench memory` measures the estimates against real steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan.activations import (
    FLOAT32_BYTES,
    Split,
    Storage,
    block_bytes,
    depth_bytes,
    head_bytes,
    recomputed_bytes,
)
from launch.plan.exchanges import BUCKET_ELEMENTS, DEEPSPEED_BUCKET_ELEMENTS, static_slots
from launch.plan.layout import Layout, StageShare, distinct_stages, held_by_stages
from pretrain.config.schema import RunConfig
from pretrain.engine.muon.newton_schulz import BATCH_ELEMENTS

STAGE0_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's own all-reduce
PREFETCH_ELEMENTS = 50_000_000  # that it gathers ahead
LIVE_ELEMENTS = 1_000_000_000  # weights that ZeRO-3 keeps gathered


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a rank by named part; `phase` says when the peak occurs."""

    parts: dict[str, float]
    phase: str

    def total(self) -> float:
        """Bytes of all parts together."""
        return sum(self.parts.values())


def storage_of(config: RunConfig, *, on_gpu: bool = True) -> Storage:
    """Precision and kernels that the configuration resolves to; `auto` is Triton on a GPU in bf16, else PyTorch."""
    backend = config.kernels.backend
    if backend == "auto":
        backend = "triton" if on_gpu and config.train.precision == "bf16" else "torch"
    return Storage(2 if config.train.precision == "bf16" else 4, "triton" if backend == "triton" else "torch")


def estimate_memory(
    config: RunConfig, layout: Layout, storage: Storage, *, margin: float, imbalance: float = 1.0
) -> Memory:
    """Peak bytes of the fullest rank. `margin`: fraction added for fragmentation and small allocations.

    `imbalance`: routed rows of the fullest rank over the mean, where experts are spread.
    """
    stages = distinct_stages(
        held_by_stages(config.model, layout, config.train.sequence_length, config.optimizer.muon_settings())
    )
    found = [estimate_stage(config, layout, storage, held, imbalance) for held in stages]
    fullest = max(found, key=Memory.total)
    parts = fullest.parts | {"margin": margin * fullest.total()}
    return Memory({name: size for name, size in parts.items() if size > 0}, fullest.phase)


def estimate_stage(config: RunConfig, layout: Layout, storage: Storage, held: StageShare, imbalance: float) -> Memory:
    """Peak bytes of a rank of one pipeline stage, without margin: the fullest of its three phases."""
    stays = persistent_bytes(held, layout, storage)
    moments = {
        "passes": stays | busiest_pass(config, layout, storage, held, imbalance),
        "optimizer step": stays | step_bytes(held, layout, storage),
        "building": building_bytes(held, layout, storage),
    }
    phase = max(moments, key=lambda name: sum(moments[name].values()))
    place = f" of pipeline stage {held.stage}" if layout.pipeline > 1 else ""
    return Memory(moments[phase], f"{phase}{place}")


def building_bytes(held: StageShare, layout: Layout, storage: Storage) -> dict[str, float]:
    """Parts at the peak before the first step: the float32 model, or DeepSpeed's states with what it shards from."""
    e, parameters = storage.element_bytes, held.parameters
    first = {"weights in float32": FLOAT32_BYTES * parameters}
    stays = persistent_bytes(held, layout, storage)
    if layout.zero_stage == 0:
        # The wrapper of bf16 steps once, with gradients of zeros, to allocate moments.
        then = stays | ({"gradients": (FLOAT32_BYTES + e) * parameters} if e < FLOAT32_BYTES else {"moments": 0.0})
    elif layout.zero_stage == 3:
        then = stays | {"moments": 0.0}
    else:
        then = stays | {"joined weights": e * parameters, "moments": 0.0}
    return max(first, then, key=lambda parts: sum(parts.values()))


def persistent_bytes(held: StageShare, layout: Layout, storage: Storage) -> dict[str, float]:
    """Parts that live as long as the run: weights, float32 masters, moments (two of AdamW's, one of Muon's), ZeRO-3's buffers."""
    e, stage = storage.element_bytes, layout.zero_stage
    share = held.share(layout) if stage else held.parameters
    matrices = held.own_matrices(layout) if stage else held.matrices
    has_masters = stage > 0 or e < FLOAT32_BYTES
    return {
        "weights": e * (share if stage == 3 else held.parameters),
        "masters": FLOAT32_BYTES * share if has_masters else 0.0,
        "moments": FLOAT32_BYTES * (2 * share - matrices.dense - matrices.routed),
        "gradient share": e * share if stage == 3 else 0.0,
        "reduction bucket": FLOAT32_BYTES * min(held.parameters, DEEPSPEED_BUCKET_ELEMENTS) if stage == 3 else 0.0,
    }


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a rank of a stage holds at once, in passes through all of its blocks.

    1F1B: as many as stages follow, itself included, and zero-bubble schedules begin alike; interleaved ones begin with more
    pieces of a rank's blocks (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
    """
    following = layout.pipeline - stage
    if layout.schedule != "interleaved":
        return min(micro_batches, following)
    pieces = 2 * (following - 1) + (layout.virtual_stages - 1) * layout.pipeline + 1
    return min(micro_batches * layout.virtual_stages, pieces) / layout.virtual_stages


def split_of(layout: Layout, imbalance: float) -> Split:
    """How a block shrinks on a rank of this layout, in the terms of `activations.py`."""
    is_spread = layout.expert > 1
    return Split(
        tensor=layout.tensor,
        stream=layout.stream_ranks,
        tokens=layout.tensor if is_spread else layout.stream_ranks,
        is_spread=is_spread,
        rows=imbalance if is_spread else 1.0,
        is_in_segments=layout.context > 1,
    )


def slots_to_choices(config: RunConfig, layout: Layout) -> float:
    """Rows that a rank keeps for experts under a capacity factor, over its choices, where rows lie in slots; else 1."""
    slots, moe = static_slots(config, layout), config.model.moe
    if slots is None or moe is None:
        return 1.0
    return slots * moe.num_experts / (layout.tokens(config) // layout.tensor * moe.top_k)


def busiest_pass(
    config: RunConfig, layout: Layout, storage: Storage, held: StageShare, imbalance: float
) -> dict[str, float]:
    """Parts at the fullest moment of forward and backward of a rank.

    Walks from the head to the first block: each block's backward pass frees its activations and adds its gradients, so
    the peak lies where their sum with the block's working space is largest.
    """
    model, tokens, e = config.model, layout.tokens(config), storage.element_bytes
    micro_batches = layout.micro_batches(config)
    accumulates = micro_batches > 1  # then this is not the step's first micro-batch, and all gradients exist
    kinds = set(held.letters)
    split = split_of(layout, max(imbalance, slots_to_choices(config, layout)))
    sizes = {letter: block_bytes(model, letter, storage, split) for letter in kinds}
    for letter in layout.recompute & kinds:
        sizes[letter] = recomputed_bytes(sizes[letter], model, storage, layout.stream_ranks)
    is_bucketed = layout.zero_stage in (1, 2)
    gradient_bytes = e + (FLOAT32_BYTES if accumulates and e < FLOAT32_BYTES else 0)
    whole = bucketed_bytes(held, layout) if is_bucketed else held.parameters * gradient_bytes
    block_gradients = whole / max(1, len(held.letters))
    kept_head, working_head = head_bytes(model, storage, tokens, layout.tensor) if held.has_head else (0.0, 0.0)
    # Activations of this stage's blocks for one micro-batch; other micro-batches in flight hold as much each.
    one_pass = tokens * sum(sizes[letter].kept for letter in held.letters)
    # The losses of prediction depths, and what their projections keep, stay until the backward pass begins with them.
    kept_head *= held.heads
    one_pass += tokens * held.depths * depth_bytes(model, storage, layout.tensor, layout.stream_ranks)
    others = one_pass * (in_flight(layout, held.stage, micro_batches) - 1)
    activations: float = one_pass
    gathered = gathered_bytes(layout, storage, held)

    def moment(kept: float, working: float, gradients: float, logits: float) -> dict[str, float]:
        return {
            "gradients": gradients,
            "activations": kept + others,
            "working space": working,
            "logits": logits,
            "gathered weights": gathered,
        }

    best = moment(activations, 0.0, whole if accumulates else 0.0, kept_head + working_head)
    # Gradients that exist so far in the first micro-batch: the head's, then those of each block passed.
    size = FLOAT32_BYTES if is_bucketed else e
    made: float = model.vocab_size * model.hidden_size * size / layout.tensor * held.has_head
    for letter in reversed(held.letters):
        made += block_gradients
        gradients = whole if accumulates else min(made, whole)
        found = moment(activations, tokens * sizes[letter].working, gradients, 0.0)
        if sum(found.values()) > sum(best.values()):
            best = found
        activations -= tokens * sizes[letter].kept
    return best


def bucketed_bytes(held: StageShare, layout: Layout) -> float:
    """Bytes of gradients under ZeRO-1 and 2 while passes run: all sums, or a rank's share and the buckets under way.

    A bucket that is filled and one that travels, each closed behind a whole block.
    """
    whole = FLOAT32_BYTES * held.parameters
    if layout.zero_stage == 1 or held.share(layout) == held.parameters:
        return whole
    return min(whole, FLOAT32_BYTES * (held.share(layout) + 2 * (BUCKET_ELEMENTS + held.largest_block)))


def gathered_bytes(layout: Layout, storage: Storage, held: StageShare) -> float:
    """Bytes of whole weights that ZeRO-3 keeps gathered beside its shards."""
    if layout.zero_stage != 3 or layout.dense_sharers == 1:
        return 0.0  # a single rank computes with its share itself
    # Several ranks' parts arrive in one buffer and are copied out of it, tensor by tensor.
    arriving = min(held.parameters, PREFETCH_ELEMENTS)
    return storage.element_bytes * (min(held.parameters, LIVE_ELEMENTS + held.largest_block) + arriving)


def step_bytes(held: StageShare, layout: Layout, storage: Storage) -> dict[str, float]:
    """Parts of the optimizer phase, after activations are freed: the larger of the reduction and the update."""
    return max(
        reduction_bytes(held, layout, storage),
        update_bytes(held, layout, storage),
        key=lambda parts: sum(parts.values()),
    )


def reduction_bytes(held: StageShare, layout: Layout, storage: Storage) -> dict[str, float]:
    """Parts while gradients are reduced over the ranks that share weights, one bucket at a time."""
    e, stage, parameters = storage.element_bytes, layout.zero_stage, held.parameters
    bucket = min(parameters, DEEPSPEED_BUCKET_ELEMENTS if stage else STAGE0_BUCKET_ELEMENTS)
    whole, sent = e * parameters, FLOAT32_BYTES * bucket if e < FLOAT32_BYTES else 0.0
    if stage == 0:
        return {"gradients": whole, "communication": e * bucket + sent}  # joined, and in float32
    if stage == 3:
        return {"gradients": whole, "communication": FLOAT32_BYTES * bucket}
    # What is left behind by the passes, with the shares that arrive.
    shares = FLOAT32_BYTES * held.share(layout) if max(layout.dense_sharers, layout.expert_sharers) > 1 else 0.0
    return {"gradients": bucketed_bytes(held, layout) + (shares if stage == 1 else 0.0)}


def update_bytes(held: StageShare, layout: Layout, storage: Storage) -> dict[str, float]:
    """Parts while the optimizer runs: reduced gradients of this rank's shard, joined, in float32; and Muon's products."""
    e, stage, share = storage.element_bytes, layout.zero_stage, held.share(layout)
    wide = FLOAT32_BYTES if e < FLOAT32_BYTES else 0
    products = {"matrix products": product_bytes(held, layout, storage)}
    if stage == 0:
        # For bf16 weights a float32 copy to step with, and one from which the norm is taken.
        return {"gradients": (e + 2 * wide) * held.parameters} | products
    return {"gradients": FLOAT32_BYTES * share} | products


def product_bytes(held: StageShare, layout: Layout, storage: Storage) -> float:
    """Bytes of the updates that Muon orthogonalises at a time, on their way and in Newton-Schulz rounds; 0 with AdamW.

    ZeRO-1 and 2 step bucket by bucket, the others all at once; rounds hold a batch of matrices three times.
    """
    own = held.own_matrices(layout)
    size = 2 if storage.backend == "triton" else FLOAT32_BYTES
    updates = own.dense + own.routed
    if layout.zero_stage in (1, 2):
        updates = min(
            updates, (BUCKET_ELEMENTS + held.largest_block) / min(layout.dense_sharers, layout.expert_sharers)
        )
    elif layout.zero_stage == 0:
        updates = held.matrices.dense + held.matrices.routed
    on_the_way = 3 * size * updates if max(layout.dense_sharers, layout.expert_sharers) > 1 else size * updates
    return FLOAT32_BYTES * updates + on_the_way + 3 * size * min(updates, BATCH_ELEMENTS)
