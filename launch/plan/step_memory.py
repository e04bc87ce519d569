"""Bytes that a step holds next to weights and activations: gathered weights, reductions, the optimizer's update, products."""

from __future__ import annotations

from amfm.launch.plan.activations import (
    FLOAT32_BYTES,
    Storage,
)
from amfm.launch.plan.exchange import BUCKET_ELEMENTS, DEEPSPEED_BUCKET_ELEMENTS
from amfm.launch.plan.exchanges.buckets import bucketed_bytes
from amfm.launch.plan.layout import Layout, StageShare
from amfm.pretrain.engine.adamw import CHUNK_BYTES, CHUNK_ELEMENTS
from amfm.pretrain.engine.muon.newton_schulz import BATCH_ELEMENTS

STAGE0_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's own all-reduce
PREFETCH_ELEMENTS = 50_000_000  # that it gathers ahead
LIVE_ELEMENTS = 1_000_000_000  # weights that ZeRO-3 keeps gathered


def gathered_bytes(layout: Layout, storage: Storage, held: StageShare) -> tuple[float, float]:
    """Bytes of whole weights that ZeRO-3 keeps gathered next to its shards, and of those that arrive meanwhile.

    Several ranks' parts arrive in one buffer and are copied out of it, tensor by tensor; after the last block nothing is left
    to arrive.
    """
    if layout.zero_stage != 3 or layout.dense_sharers == 1:
        return 0.0, 0.0  # a single rank computes with its share itself
    e = storage.element_bytes
    gathered = min(held.parameters, LIVE_ELEMENTS + held.largest_block)
    return e * gathered, e * min(held.parameters, PREFETCH_ELEMENTS)


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
    if storage.state_bytes < FLOAT32_BYTES:
        # DeepSpeed hands gradients over in the master weights' dtype, one group after the other under ZeRO-1 and 2.
        rounded = storage.state_bytes * (share if stage == 3 else min(share, BUCKET_ELEMENTS + held.largest_block))
        return {"gradients": FLOAT32_BYTES * share + rounded, "rounding": float(CHUNK_ELEMENTS * CHUNK_BYTES)}
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
    in_transit = 3 * size * updates if max(layout.dense_sharers, layout.expert_sharers) > 1 else size * updates
    if updates:
        in_transit *= (own.dense_sent + own.routed_sent) / (2 * (own.dense + own.routed))
    return FLOAT32_BYTES * updates + in_transit + 3 * size * min(updates, BATCH_ELEMENTS)
