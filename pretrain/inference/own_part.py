"""A rank's part of the weights of a whole model, read without the rest."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from amfm.model.hybrid import HybridModel
from amfm.model.on_demand import OnDemand, cut_rows
from amfm.model.parallel.shards import REPLICATED, parameter_shards
from amfm.model.routed_updates import ENDS
from amfm.pretrain.checkpoint.placement import place_shard, whole_dim

DEPTH_PREFIX = "mtp."
READER = re.compile(r"(blocks\.\d+\.|final_)stream\.")  # of a residual stream that begins as the sum


@torch.no_grad()
def take_own_part(model: HybridModel, state: OnDemand, names: Collection[str] | None = None) -> None:
    """Copy what this rank's model holds: its blocks, and of each parameter its shard, reading the rows that have a part in it.

    Buffers, such as the router's balancing bias, are copied whole. MTP layers, routed updates and readers of another residual stream that
    `state` lacks stay as they are, and so does all but `names` where these are given.
    """
    parameters = {name: (parameter, shard) for name, parameter, shard in parameter_shards(model)}
    for name, own in model.state_dict(keep_vars=True).items():
        if name not in state and (name.startswith(DEPTH_PREFIX) or name.endswith(ENDS) or READER.match(name)):
            continue
        if names is not None and name not in names:
            continue
        parameter, shard = parameters.get(name, (own, REPLICATED))
        if not parameter.dim():
            parameter.copy_(state[name])
            continue
        placement, taken = place_shard(parameter.shape, shard, model.groups), 0
        for first, last in placement.intervals[0]:
            for start, stop in cut_rows(last - first, state.shape(name)):
                rows = state.rows(name, (first + start, first + stop))
                for dim, intervals in enumerate(placement.intervals[1:], start=1):
                    if intervals != whole_dim(rows.shape[dim]):
                        rows = torch.cat([rows.narrow(dim, low, high - low) for low, high in intervals], dim=dim)
                parameter[taken : taken + len(rows)].copy_(rows)
                taken += len(rows)
