"""Tells DeepSpeed which experts are spread over ranks, and so over which ranks it must sum their gradients.

It asks for its own mixture-of-experts module, for groups in its registry, and for parameter groups that hold only
experts. Ours are none of that, so the module is shown while DeepSpeed looks, the registry gets Megatron-core's groups, and
`pretrain/engine/optimizer.py` divides the parameter groups. Private names: a contract test holds them.

Lets ZeRO-3 see the tensors inside dataclasses that modules return.

DeepSpeed gathers a module's weights for the backward pass from hooks on the tensors of its output, and looks for them
in tensors, lists, tuples and dicts only. Our blocks return dataclasses. Around DeepSpeed's own forward hooks stand two
of ours: the first replaces the dataclass by a tuple of its differentiable tensors, the last puts DeepSpeed's versions of
them back into the dataclass.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed
from torch import Tensor, nn

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


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Find the tensors that take part in a backward pass, in a fixed order."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from find_tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_tensors(item)


def replace_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Copy a value with the tensors that `find_tensors` found replaced, in its order."""
    if isinstance(value, Tensor):
        return next(tensors) if value.requires_grad else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            field.name: replace_tensors(getattr(value, field.name), tensors) for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changes)
    if isinstance(value, dict):
        return {key: replace_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(replace_tensors(item, tensors) for item in value)
    if isinstance(value, list | tuple):
        return type(value)(replace_tensors(item, tensors) for item in value)
    return value


class DataclassOutputHooks:
    """Two hooks on every module: `open` before `deepspeed.initialize`, `close` after it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.outputs: list[Any] = []

    def open(self) -> None:
        """Return tuples of tensors from modules, which DeepSpeed understands."""
        for module in self.module.modules():
            module.register_forward_hook(self._flatten)

    def close(self) -> None:
        """Return the dataclass to the caller again."""
        for module in self.module.modules():
            module.register_forward_hook(self._rebuild)

    def _flatten(self, module: nn.Module, inputs: Any, output: Any) -> tuple[Tensor, ...]:
        """First hook: remember the output and return its differentiable tensors."""
        self.outputs.append(output)
        return tuple(find_tensors(output))

    def _rebuild(self, module: nn.Module, inputs: Any, tensors: tuple[Tensor, ...]) -> Any:
        """Last hook: put DeepSpeed's versions of the tensors back into the remembered output."""
        return replace_tensors(self.outputs.pop(), iter(tensors))


def is_not_about_types(record: logging.LogRecord) -> bool:
    """Filter DeepSpeed's warning that it cannot look into a type: the hooks did so for it."""
    return record.funcName != "apply_to_tensors_only"
