"""Take groups of zeros out of a model: fewer channels, experts or heads, and the same logits.

A pure function on whole tensors. All blocks of a kind keep the same number, that of the block with most groups left,
because the configuration has one width for all; a block with fewer keeps some of its zeros.

Write the weights folder of a shrunk model, once its logits are those of the pruned one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.terminal import Report, silent
from amfm.model.config.checks import check_model
from amfm.model.config.kinds import kind_of
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters
from amfm.model.moe.block import PRUNED_BIAS
from amfm.pretrain.config.hook_sections import PRUNED_GROUPS
from amfm.pretrain.export.export import RELATIVE_TOLERANCE, logit_difference, proof_text
from amfm.pretrain.export.import_huggingface import write_model
from amfm.pretrain.hooks.prune import GroupPlan, Unit, plan_groups
from amfm.pretrain.inference.merge import factored_places
from amfm.pretrain.inference.weights import Weights, check_shapes, read_weights


@dataclass(frozen=True)
class Shrunk:
    """The smaller model, and how many groups of each kind each block had and keeps, by place; only what changed."""

    weights: Weights
    counts: dict[str, tuple[int, int]]


def shrink_weights(weights: Weights) -> Shrunk:
    """Remove every kind of group that is zero in all blocks. Raises ValueError if there is none."""
    counts: dict[str, tuple[int, int]] = {}
    found = weights
    for kind in PRUNED_GROUPS:
        for number in range(len(_alike(plan_groups(found.model, kind), found.model))):
            # Numbered again: what the units before have lost moves the numbers of these.
            plan = plan_groups(found.model, kind)
            units = _alike(plan, found.model)[number]
            kept = _kept(found, plan, units)
            width, before = len(kept[units[0].place]), units[0].count
            if width == before:
                continue
            state = dict(found.state)
            for unit in units:
                _take(state, plan, unit, kept[unit.place])
                counts[f"{unit.place}{kind}"] = (before, width)
            found = replace(found, model=_smaller(found.model, units[0], width), state=state)
    if not counts:
        raise ValueError(
            f"{weights.origin} has no channels, experts or heads of zeros in all blocks; train with a prune section "
            "(docs/structure.md), or export it as it is"
        )
    check_model(found.model)
    check_shapes(found.model, found.state, weights.origin)
    # What the run says about widths is no longer so.
    return Shrunk(replace(found, run=None, step=None, tokens=None, origin=f"{weights.origin}, shrunk"), counts)


def _alike(plan: GroupPlan, config: ModelConfig) -> list[list[Unit]]:
    """Units that share a setting of the configuration. Those of factored matrices are left."""
    factored = {place for place, _ in factored_places(config)}
    alike: dict[tuple[str, str], list[Unit]] = {}
    for unit in plan.units:
        if unit.place not in factored:
            alike.setdefault((unit.letter, next(iter(unit.groups.sizes))), []).append(unit)
    return list(alike.values())


def _kept(weights: Weights, plan: GroupPlan, units: list[Unit]) -> dict[str, Tensor]:
    """Indices of the groups that each unit keeps, as many in all of them."""
    alive = {unit.place: _alive(weights, plan, unit) for unit in units}
    groups = units[0].groups
    least = 1 if groups.least is None else getattr(weights.model.block_options(units[0].letter), groups.least)
    width = max(least, *(int(each.sum()) for each in alive.values()))
    return {
        # Those that are not zero, then zeros for the rest, in their order.
        place: (~each).int().argsort(stable=True)[:width].sort().values
        for place, each in alive.items()
    }


def _alive(weights: Weights, plan: GroupPlan, unit: Unit) -> Tensor:
    """Which groups of a unit are not zero throughout, [count] bool."""
    alive = torch.zeros(unit.count, dtype=torch.bool)
    for name, tensor in _tensors_of(weights.state, plan, unit):
        grouping = plan.groupings[name]
        rows = (tensor != 0).transpose(0, grouping.dim).flatten(1).any(dim=1)
        groups = grouping.groups_at(torch.arange(len(rows))) - unit.first
        alive |= torch.zeros(unit.count, dtype=torch.int64).index_add_(0, groups, rows.long()) > 0
    if "expert_bias" in unit.groups.rows:
        bias = weights.state.get(f"{unit.place}expert_bias")
        # A zero expert that the router may choose is not out of the way: it takes weight from the others.
        alive |= torch.ones_like(alive) if bias is None else bias > PRUNED_BIAS / 2
    return alive


def _take(state: dict[str, Tensor], plan: GroupPlan, unit: Unit, kept: Tensor) -> None:
    """Keep of a unit's tensors the groups in `kept`, in place of `state`."""
    is_kept = torch.zeros(unit.count, dtype=torch.bool)
    is_kept[kept] = True
    for name, tensor in list(_tensors_of(state, plan, unit)):
        grouping = plan.groupings[name]
        rows = is_kept[grouping.groups_at(torch.arange(tensor.shape[grouping.dim])) - unit.first]
        state[name] = tensor.index_select(grouping.dim, rows.nonzero().flatten()).contiguous()
    for name in unit.groups.rows:
        if f"{unit.place}{name}" in state:
            state[f"{unit.place}{name}"] = state[f"{unit.place}{name}"][kept].contiguous()


def _tensors_of(state: Mapping[str, Tensor], plan: GroupPlan, unit: Unit) -> list[tuple[str, Tensor]]:
    names = [name for name, grouping in plan.groupings.items() if name.startswith(unit.place)]
    return [(name, state[name]) for name in names if plan.groupings[name].first == unit.first]


def _smaller(config: ModelConfig, unit: Unit, width: int) -> ModelConfig:
    """The configuration with this many groups in the blocks of this unit's kind."""
    options = config.block_options(unit.letter)
    smaller = options.model_copy(update={field: width * units for field, units in unit.groups.sizes.items()})
    return config.with_options(kind_of(unit.letter), smaller)


@dataclass(frozen=True)
class ShrinkReport:
    """What was taken out: groups before and after by place, parameters, and what the verification compared."""

    path: Path
    model: ModelConfig
    counts: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int
    max_logit_difference: float
    compared: str


def shrink_checkpoint(checkpoint: str | Path, out_dir: str | Path, report: Report = silent) -> ShrinkReport:
    """Take groups of zeros out of a checkpoint (or a weights folder) and write OUT, whole or not at all.

    Raises ValueError if nothing is zero or OUT is in use, RuntimeError if logits differ.
    """
    out = Path(out_dir)
    check_free(out)
    weights = read_weights(checkpoint, report)
    if weights.model.lora_mixer is not None:
        raise ValueError(
            f"{weights.origin} has routed updates (model.lora_mixer), which are not made smaller; shrink first"
        )
    shrunk = shrink_weights(weights)
    report("comparing logits before and after")
    tokens_BT, _, compared = proof_text(weights)
    difference = logit_difference(weights, shrunk.weights, tokens_BT)
    if not difference <= RELATIVE_TOLERANCE:  # NaN fails too
        raise RuntimeError(
            f"logits of the shrunk model differ by {difference:.1e} of the largest, at most {RELATIVE_TOLERANCE:.0e} is "
            "allowed; nothing was written"
        )
    write_model(out, shrunk.weights)
    return ShrinkReport(
        out,
        shrunk.weights.model,
        shrunk.counts,
        count_parameters(weights.model).total,
        count_parameters(shrunk.weights.model).total,
        difference,
        compared,
    )
