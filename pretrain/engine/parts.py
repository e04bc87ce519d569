"""What of the optimizer's state is on this rank, whatever DeepSpeed has made of it: parts, and ranges of parameters inside.

DeepSpeed keeps master weights in its own shapes. ZeRO 0: a tensor for each parameter. ZeRO 1 and 2: one flat tensor for
each group, cut by rank wherever that falls inside a parameter. ZeRO 3: every parameter cut into equal ranges. Here each
becomes `Part`s (a master tensor) with `Span`s (which range of which parameter is where in it). Checkpoints and Muon know
nothing else: that is why a checkpoint of one ZeRO stage loads under another, and why Muon steps alike under all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.parallel import set_deepspeed_accelerator

set_deepspeed_accelerator()

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: E402
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402


@dataclass(frozen=True)
class Span:
    """A contiguous range of one flattened parameter, and its place in a flat master tensor."""

    name: str
    start: int
    numel: int
    flat_start: int


@dataclass(frozen=True)
class Part:
    """One master tensor, float32 or bf16, that the optimizer steps, with the parameter ranges inside it.

    `data_ranks`: the global ranks that hold the same shards of parameters, over which ZeRO spreads them, and
    `data_group` their process group. `replicated`: it spreads nothing, every one of them holds the same part (ZeRO 0).
    `spans_of`: the ranges of the data rank of that number; those of this rank are `spans`.
    """

    master: Tensor
    group: int
    spans: tuple[Span, ...]
    data_ranks: tuple[int, ...]
    replicated: bool
    data_group: Any = field(compare=False)
    spans_of: Callable[[int], tuple[Span, ...]] = field(compare=False)


def parameter_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 has partitioned its data away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def name_parameters(module: torch.nn.Module) -> dict[int, str]:
    """Global name by identity of the parameter object; a tied parameter keeps its first name."""
    return {id(parameter): name for name, parameter, _ in parameter_shards(module)}


def list_parts(engine: Any) -> list[Part]:
    """List the parts of the optimizer's state on this rank, for every wrapper that DeepSpeed may choose.

    `engine` is a `deepspeed.DeepSpeedEngine`. No communication. Asserts that each trainable parameter belongs to the
    optimizer, because one left out would be lost without a word.
    """
    names = name_parameters(engine.module)
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        parts = list(_list_stage3(optimizer, names))
        members = [parameter for group in optimizer.fp16_groups for parameter in group]
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        groups = optimizer.bit16_groups
        masters = optimizer.single_partition_of_fp32_groups
        parts = list(_list_partitions(groups, masters, optimizer.real_dp_process_group, names))
        members = [parameter for group in groups for parameter in group]
    elif isinstance(optimizer, BF16_Optimizer):
        groups = optimizer.bf16_groups
        masters = optimizer.fp32_groups_flat_partition
        parts = list(_list_partitions(groups, masters, optimizer.real_dp_process_group, names))
        members = [parameter for group in groups for parameter in group]
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        data_group = engine.data_parallel_group
        parts = list(_list_replicas(optimizer.fp16_groups, optimizer.fp32_groups, data_group, names))
        members = [parameter for group in optimizer.fp16_groups for parameter in group]
    elif isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
        parts = list(_list_replicas(groups, groups, engine.data_parallel_group, names))
        members = [parameter for group in groups for parameter in group]
    else:
        raise TypeError(f"DeepSpeed wrapped the optimizer in {type(optimizer).__name__}, whose parts are unknown")
    trainable = {names[id(parameter)] for parameter in engine.module.parameters() if parameter.requires_grad}
    outside = trainable - {names[id(parameter)] for parameter in members}
    assert not outside, f"parameters outside the optimizer are never stepped or saved: {sorted(outside)}"
    for part in parts:
        known = (torch.float32, torch.bfloat16)
        assert part.master.dtype in known, f"master weights must be float32 or bf16, not {part.master.dtype}"
    return parts


def _list_stage3(optimizer: Any, names: dict[int, str]) -> Iterator[Part]:
    """ZeRO 3: each parameter is cut into equal ranges, and a sub-group's ranges of this rank are in one flat tensor."""
    group = optimizer.dp_process_group
    for index, members in enumerate(optimizer.fp16_groups):
        ranges = []
        for parameter in members:
            _, flat_start, range_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            ranges.append((names[id(parameter)], int(parameter.ds_numel), int(range_numel), int(flat_start)))
        spans_of = partial(_equal_ranges, ranges)
        own = spans_of(optimizer._get_param_partition_rank(members[0])) if members else ()
        master = optimizer.fp32_partitioned_groups_flat[index]
        number = optimizer.sub_group_to_group_id[index]
        yield Part(master, number, own, list_ranks(group), replicated=False, data_group=group, spans_of=spans_of)


def _equal_ranges(ranges: Sequence[tuple[str, int, int, int]], rank: int) -> tuple[Span, ...]:
    """Cut parameters, (name, length, length of a range, place of the range), for one rank."""
    spans = []
    for name, numel, range_numel, flat_start in ranges:
        start = range_numel * rank
        held = min(range_numel, numel - start)  # The last ranges hold padding, or nothing else.
        if held > 0:
            spans.append(Span(name, start, held, flat_start))
    return tuple(spans)


def _list_partitions(
    groups: list[Any], masters: list[Tensor], process_groups: list[Any], names: dict[int, str]
) -> Iterator[Part]:
    """ZeRO 1 and 2: each group is one flat tensor cut by rank, wherever that falls inside a parameter."""
    for index, (members, master, process_group) in enumerate(zip(groups, masters, process_groups, strict=True)):
        spans = []
        for parameter in members:
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                spans.append(Span(names[id(parameter)], here.start, here.numel, flat.start))
        lengths = [(names[id(parameter)], parameter.numel()) for parameter in members]
        yield Part(
            master,
            index,
            tuple(spans),
            list_ranks(process_group),
            replicated=False,
            data_group=process_group,
            spans_of=partial(cut_evenly, lengths, master.numel()),
        )


def cut_evenly(lengths: Sequence[tuple[str, int]], share: int, rank: int) -> tuple[Span, ...]:
    """Cut parameters that are one after the other, (name, length), into shares; the ranges of one rank's share."""
    spans = []
    ends = accumulate(length for _, length in lengths)
    for (name, length), end in zip(lengths, ends):
        low, high = max(end - length, share * rank), min(end, share * (rank + 1))
        if low < high:
            spans.append(Span(name, low - (end - length), high - low, low - share * rank))
    return tuple(spans)


def _list_replicas(groups: list[Any], masters: list[Any], data_group: Any, names: dict[int, str]) -> Iterator[Part]:
    """ZeRO 0: each parameter has its own master tensor (itself in float32), the same on every data rank."""
    data_ranks = list_ranks(data_group)
    for index, (members, group_masters) in enumerate(zip(groups, masters, strict=True)):
        for parameter, master in zip(members, group_masters, strict=True):
            spans = (Span(names[id(parameter)], 0, parameter.numel(), 0),)
            yield Part(
                master,
                index,
                spans,
                data_ranks,
                replicated=True,
                data_group=data_group,
                spans_of=partial(_same_ranges, spans),
            )


def _same_ranges(spans: tuple[Span, ...], rank: int) -> tuple[Span, ...]:
    """The ranges of a replica: those of any rank."""
    return spans


def list_ranks(process_group: Any) -> tuple[int, ...]:
    """Global ranks of a process group."""
    return tuple(torch.distributed.get_process_group_ranks(process_group))
