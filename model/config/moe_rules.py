"""Rules of a mixture of experts that few models need: routers of packages, quantile balancing, pruned experts. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from amfm.model.config.routers import OURS

# Settings that a package's router may leave out of account (`RouterSpec.reads`).
READ_BY_OURS = frozenset(
    (
        "normalize_probabilities",
        "routed_scaling",
        "num_router_groups",
        "router_group_top_k",
        "expert_bias",
        "balance_counts",
        "capacity_factor",
        "forced_balance",
    )
)


def broken_router(moe: Any) -> Iterator[tuple[str, str]]:
    """Options of a MoeConfig that are of another router than the one that is named, and settings that this one does not read."""
    for name in moe.router_options.packages_used():
        if name != moe.router:
            yield f"router_options.{name}", f"has no effect with model.moe.router={moe.router}; remove it"
    spec = moe.package_router()
    for name in () if spec is None else sorted(READ_BY_OURS - spec.reads):
        if getattr(moe, name) != type(moe).model_fields[name].default:
            yield name, f"is not read by the router {moe.router}; remove it, or use one of {', '.join(OURS)}"


def broken_quantile(moe: Any) -> Iterator[tuple[str, str]]:
    """A quantile is of scores between 0 and 1 with a bias, where any expert may be chosen and one is not."""
    if not moe.expert_bias or moe.router != "sigmoid":
        rule = "quantile sets the balancing bias of scores between 0 and 1"
        yield "bias_rule", f"{rule}; set expert_bias: true and router: sigmoid, or use sign"
    if moe.router_group_top_k != moe.num_router_groups:
        yield "bias_rule", "quantile does not know limits of groups; use num_router_groups: 1, or sign"
    if moe.top_k == moe.num_experts:
        yield "bias_rule", "quantile needs an expert that is not chosen; lower top_k, or use sign"


def keeps_experts(moe: Any) -> Iterator[tuple[str, str]]:
    """Rules, each with a fix, that keep experts from being pruned."""
    if not moe.expert_bias:
        rule = (
            "needs model.moe.expert_bias=true (with router: sigmoid): a router without a bias would still choose them"
        )
        yield rule, "set it"
    if moe.router not in OURS:
        yield (
            f"does not go with model.moe.router={moe.router}, which is a package's",
            f"use one of {', '.join(OURS)}",
        )
    if moe.num_router_groups > 1:
        rule = f"does not go with model.moe.num_router_groups={moe.num_router_groups}: groups must stay of one size"
        yield rule, "use 1"
    if moe.bias:
        yield "does not go with model.moe.bias=true, whose biases it does not remove yet", "use false"
    if moe.overflow == "recycle":
        rule = "does not go with model.moe.overflow=recycle, which sends tokens to any expert with free capacity"
        yield rule, "use overflow: drop"
