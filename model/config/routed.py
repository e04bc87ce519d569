"""What a router of a package is given, and what it gives (routers.py). No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Tensor = Any  # torch's


@dataclass(frozen=True)
class RouterInput:
    """What a router is given: R tokens of one micro-batch, rows of T tokens one after the other, and E experts.

    logits_RE [R, E], float32 at least, differentiable. bias_E [E], the balancing bias, or None. num_tokens: of the R, those that
    are not padding; is_padding_R [R] bool, or None. seed: an int64 scalar that differs by block and step, for draws.
    """

    logits_RE: Tensor
    moe: Any  # the MoeConfig, which is made after this
    bias_E: Tensor | None
    num_tokens: int
    is_padding_R: Tensor | None
    seed: Tensor
    is_training: bool


@dataclass(frozen=True)
class Routed:
    """What a router chose: K experts a token, for any K.

    expert_ids_RK [R, K] int64; E for no expert, and no expert twice. weights_RK [R, K], differentiable, of the experts' outputs
    in the sum. scores_RE [R, E], at least 0, by which load is balanced and whose entropy is logged. losses: values a token, [R],
    by the names in `RouterSpec.losses`; their means over tokens are added to the loss in training. most: choices that are
    experts, at most, where it is below R * K.
    """

    expert_ids_RK: Tensor
    weights_RK: Tensor
    scores_RE: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    most: int | None = None
