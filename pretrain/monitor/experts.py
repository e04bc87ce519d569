"""Expert collapse: a router that sends nearly every token to the same experts, and settings that do nothing against it.

Without a balancing loss or bias the experts that are a little better early get more tokens, learn more, and get more
still; the loss falls anyway, so no one notices that most of the experts learn nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig

EXPERT_STEPS = 20
# Of the way from even loads (0) to one set of top_k experts that takes every token (1).
COLLAPSE = 0.9


def describe_unbalanced(model: ModelConfig) -> str | None:
    """Report that no setting balances the experts, and which ones would; None if one does or no token has a
    choice.
    """
    return next(
        filter(None, (_unbalanced(key, moe) for key, moe in model.expert_sections() if model.routed_experts())), None
    )


def _unbalanced(key: str, moe: MoeConfig) -> str | None:
    balances = (
        moe.top_k == moe.num_experts,
        moe.package_router() is not None,
        moe.expert_bias and moe.bias_update_rate > 0,
        moe.auxiliary_loss_weight,
        moe.sequence_loss_weight,
        moe.overflow == "recycle",
    )
    if any(balances):
        return None
    remedies = f"{key}.expert_bias=true, or " if moe.router != "softmax" else ""
    return (
        f"nothing balances the {moe.num_experts} experts: few of them may end up with all tokens; "
        f"set {remedies}for example {key}.auxiliary_loss_weight=1e-3"
    )


def find_collapsed(expert_counts: Mapping[int, Sequence[int]], top_k: int) -> dict[int, float]:
    """Find the MoE blocks that collapsed in a step, with the share of tokens (0 to 1) that chose their most loaded expert.

    expert_counts: choices by expert, for each block.
    """
    found = {}
    for block, counts in expert_counts.items():
        share, even = max(counts) * top_k / max(1, sum(counts)), top_k / len(counts)
        if even < 1 and (share - even) / (1 - even) >= COLLAPSE:
            found[block] = share
    return found
