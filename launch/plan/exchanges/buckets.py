"""Buckets of gradients under ZeRO-1 and 2: their sizes, as `group_parameters` closes them, and what of them is on a rank."""

from __future__ import annotations

from itertools import pairwise

from amfm.launch.plan.activations import FLOAT32_BYTES
from amfm.launch.plan.exchange import BUCKET_ELEMENTS
from amfm.launch.plan.layout import Layout, StageShare


def bucketed_bytes(held: StageShare, layout: Layout) -> float:
    """Bytes of gradients under ZeRO-1 and 2 while passes run: all sums, or a rank's share and the buckets under way.

    Those are one that is sent and the one after it that is filled, of dense weights and of spread experts apart.
    """
    whole = FLOAT32_BYTES * held.parameters
    if layout.zero_stage == 1 or held.share(layout) == held.parameters:
        return whole
    kinds = [sizes for sizes in bucket_sizes(held, layout) if sizes]
    pairs = [max(map(sum, pairwise(sizes)), default=sizes[0]) for sizes in kinds]
    largest = [max(sizes) for sizes in kinds]
    in_transit = max(pair + sum(largest) - own for pair, own in zip(pairs, largest))
    return FLOAT32_BYTES * (held.share(layout) + in_transit)


def resting_bytes(held: StageShare, layout: Layout) -> float:
    """Bytes of gradients between two passes: under ZeRO-2 a rank's share, and the bucket that a pass reduces last."""
    whole = FLOAT32_BYTES * held.parameters
    if layout.zero_stage == 1 or held.share(layout) == held.parameters:
        return whole
    return FLOAT32_BYTES * (held.share(layout) + bucket_sizes(held, layout)[0][0])


def bucket_sizes(held: StageShare, layout: Layout) -> list[list[float]]:
    """Parameters of each bucket, in the module's order, as `group_parameters` closes them: dense ones, then spread experts.

    Without an expert axis there is one kind.
    """
    kinds = [[dense + routed for dense, routed in held.parts]]
    if layout.expert > 1:
        kinds = [[part[number] for part in held.parts] for number in (0, 1)]
    found: list[list[float]] = []
    for parts in kinds:
        sizes, filling = [], 0.0
        for part in parts:
            filling += part
            if filling >= BUCKET_ELEMENTS:
                sizes.append(filling)
                filling = 0.0
        found.append([*sizes, filling] if filling else sizes)
    return found
