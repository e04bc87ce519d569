"""Tells DeepSpeed which experts are spread over ranks, and so over which ranks it must sum their gradients.

It asks for its own mixture-of-experts module, for groups in its registry, and for parameter groups that hold only
experts. Ours are none of that, so the module is shown while DeepSpeed looks, the registry gets Megatron-core's groups, and
`pretrain/engine/optimizer.py` divides the parameter groups. Private names: a contract test holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from torch import nn

from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.parallel import set_deepspeed_accelerator

set_deepspeed_accelerator()

from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.utils import groups as registry  # noqa: E402

SIGN = "deepspeed_experts"


class DeepSpeedMoeMarker(MoE):
    """Marker by which DeepSpeed recognises a model with routed experts; computes nothing and has no parameters."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: DeepSpeed would build expert groups here, and ours exist already."""


@contextmanager
def register_experts_with_deepspeed(module: nn.Module, groups: ProcessGroupCollection) -> Iterator[None]:
    """Let DeepSpeed find experts and their groups inside the block, around `initialize`; nothing without spread experts.

    The marks on the parameters stay: gradients of experts are summed over `groups.expt_dp`, and ZeRO spreads their
    optimizer state over it. DeepSpeed divides by the data ranks of dense weights for them too, which is what a loss
    multiplied by that number asks for. Every rank must call this.
    """
    experts = [(parameter, shard) for _, parameter, shard in parameter_shards(module) if shard.per_expert]
    if groups.ep.size() == 1 or not experts:
        yield
        return
    name = f"ep_size_{groups.ep.size()}"  # DeepSpeed reads the size off the name
    for (parallel, ranks), group in (
        ((registry._EXPERT_PARALLEL_GROUP, registry._EXPERT_PARALLEL_GROUP_RANKS), groups.ep),
        ((registry._EXPERT_DATA_PARALLEL_GROUP, registry._EXPERT_DATA_PARALLEL_GROUP_RANKS), groups.expt_dp),
    ):
        parallel.clear()
        ranks.clear()
        parallel[name], ranks[name] = group, torch.distributed.get_process_group_ranks(group)
    for parameter, _ in experts:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = name  # type: ignore[attr-defined]
    # DeepSpeed keeps the number for checkpoints of its own, which are not written here; variants may have others.
    most_experts = max(shard.cuts[0].segments[0] for _, shard in experts)
    module.add_module(SIGN, DeepSpeedMoeMarker(most_experts))
    yield
    delattr(module, SIGN)
