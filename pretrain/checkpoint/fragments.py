"""The optimizer's state on one rank, translated between DeepSpeed's flat tensors and ranges of named parameters.

DeepSpeed keeps float32 masters and moments in shapes of its own. ZeRO 0: a tensor for each parameter. ZeRO 1 and 2: one
flat tensor for each group, cut by rank wherever that falls inside a parameter. ZeRO 3: every parameter cut into equal
ranges. Here each becomes `Part`s (a master tensor) with `Span`s (which range of which parameter lies where in it), and what
saves and loads knows nothing else: that is why a checkpoint of one ZeRO stage loads under another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.parallel.shards import parameter_shards
from pretrain.checkpoint.reader import MOMENTS
from pretrain.parallel import set_deepspeed_accelerator

set_deepspeed_accelerator()

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: E402
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402

# Settings of a parameter group that a checkpoint carries; the rest of a torch group says how to run, not what to do.
GROUP_SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Span:
    """A contiguous range of one flattened parameter, and its place in a flat master tensor."""

    name: str
    start: int
    numel: int
    flat_start: int


@dataclass(frozen=True)
class Part:
    """One float32 master tensor that the optimizer steps, with the parameter ranges inside it.

    `data_ranks`: the global ranks that hold the same shards of parameters, over which ZeRO spreads them. `replicated`:
    it spreads nothing, every one of them holds the same part (ZeRO 0).
    """

    master: Tensor
    group: int
    spans: tuple[Span, ...]
    data_ranks: tuple[int, ...]
    replicated: bool


@dataclass(frozen=True)
class Fragment:
    """One range of this rank's shard of a parameter: three flat float32 views, and who else has a share of the shard.

    Of a frozen parameter (group `frozen`) it is one view, of the weight.
    """

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]
    optimizer_step: int
    group: str
    data_ranks: tuple[int, ...]
    replicated: bool

    def share(self, rank: int) -> Fragment | None:
        """Cut out what this rank writes: all, or an equal share where every data rank holds the same; None for nothing."""
        if not self.replicated:
            return self
        place, count = self.data_ranks.index(rank), len(self.data_ranks)
        low, high = self.numel * place // count, self.numel * (place + 1) // count
        if low == high:
            return None
        tensors = {kind: flat[low:high] for kind, flat in self.tensors.items()}
        return dataclasses.replace(self, start=self.start + low, numel=high - low, tensors=tensors)


def parameter_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 has partitioned its data away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def name_parameters(module: torch.nn.Module) -> dict[int, str]:
    """Global name by identity of the parameter object; a tied parameter keeps its first name."""
    return {id(parameter): name for name, parameter, _ in parameter_shards(module)}


def base_optimizer(engine: Any) -> torch.optim.Adam:
    """Find the torch optimizer that steps the master weights, below DeepSpeed's wrapper.

    Raises TypeError for an optimizer other than torch's Adam and AdamW: its state would not be understood.
    """
    inner = engine.basic_optimizer
    if not isinstance(inner, torch.optim.Adam):
        raise TypeError(f"checkpoints hold the state of torch's AdamW and Adam, not of {type(inner).__name__}")
    return inner


def name_groups(optimizer: torch.optim.Adam) -> list[str]:
    """Labels of the parameter groups (`decay`, `no_decay`), in the optimizer's order.

    A label may come several times: DeepSpeed takes the experts of a group into groups of their own.
    """
    return [str(group["label"]) for group in optimizer.param_groups]


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
        data_ranks = list_ranks(engine.data_parallel_group)
        parts = list(_list_replicas(optimizer.fp16_groups, optimizer.fp32_groups, data_ranks, names))
        members = [parameter for group in optimizer.fp16_groups for parameter in group]
    elif isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
        parts = list(_list_replicas(groups, groups, list_ranks(engine.data_parallel_group), names))
        members = [parameter for group in groups for parameter in group]
    else:
        raise TypeError(f"DeepSpeed wrapped the optimizer in {type(optimizer).__name__}, which checkpoints can't read")
    trainable = {names[id(parameter)] for parameter in engine.module.parameters() if parameter.requires_grad}
    outside = trainable - {names[id(parameter)] for parameter in members}
    assert not outside, f"parameters outside the optimizer can't be saved: {sorted(outside)}"
    for part in parts:
        assert part.master.dtype == torch.float32, f"master weights must be float32, not {part.master.dtype}"
    return parts


def _list_stage3(optimizer: Any, names: dict[int, str]) -> Iterator[Part]:
    """ZeRO 3: each parameter is cut into equal ranges, and a sub-group's ranges of this rank lie in one flat tensor."""
    data_ranks = list_ranks(optimizer.dp_process_group)
    for index, members in enumerate(optimizer.fp16_groups):
        spans = []
        for parameter in members:
            _, flat_start, range_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = range_numel * optimizer._get_param_partition_rank(parameter)
            numel = min(range_numel, parameter.ds_numel - start)  # The last ranges hold padding, or nothing else.
            if numel > 0:
                spans.append(Span(names[id(parameter)], start, numel, flat_start))
        master = optimizer.fp32_partitioned_groups_flat[index]
        yield Part(master, optimizer.sub_group_to_group_id[index], tuple(spans), data_ranks, replicated=False)


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
        yield Part(master, index, tuple(spans), list_ranks(process_group), replicated=False)


def _list_replicas(
    groups: list[Any], masters: list[Any], data_ranks: tuple[int, ...], names: dict[int, str]
) -> Iterator[Part]:
    """ZeRO 0: each parameter has its own master tensor (itself in float32), the same on every data rank."""
    for index, (members, group_masters) in enumerate(zip(groups, masters, strict=True)):
        for parameter, master in zip(members, group_masters, strict=True):
            span = Span(names[id(parameter)], 0, parameter.numel(), 0)
            yield Part(master, index, (span,), data_ranks, replicated=True)


def list_ranks(process_group: Any) -> tuple[int, ...]:
    """Global ranks of a process group."""
    return tuple(torch.distributed.get_process_group_ranks(process_group))


def collect_fragments(engine: Any, parts: Sequence[Part]) -> list[Fragment]:
    """Collect views (no copies) of all parameter state on this rank, from the parts of `list_parts`.

    A part that was never stepped has no moments yet; it gets zeros and step 0, which is what AdamW will start from.
    """
    optimizer = base_optimizer(engine)
    group_names = name_groups(optimizer)
    fragments = []
    for part in parts:
        state = optimizer.state.get(part.master, {})
        flats = {"weight": part.master.detach().reshape(-1)}
        for moment in MOMENTS:
            value = state.get(moment)
            flats[moment] = torch.zeros_like(flats["weight"]) if value is None else value.detach().reshape(-1)
        optimizer_step = int(state.get("step", 0))
        for span in part.spans:
            views = {kind: flat[span.flat_start : span.flat_start + span.numel] for kind, flat in flats.items()}
            group = group_names[part.group]
            fragments.append(
                Fragment(
                    span.name, span.start, span.numel, views, optimizer_step, group, part.data_ranks, part.replicated
                )
            )
    return fragments


def collect_group_settings(engine: Any) -> dict[str, dict[str, Any]]:
    """Collect the hyper-parameters of the parameter groups by label, as JSON can hold them."""
    optimizer = base_optimizer(engine)
    settings: dict[str, dict[str, Any]] = {}
    for name, group in zip(name_groups(optimizer), optimizer.param_groups, strict=True):
        own = {key: _to_json(group[key]) for key in GROUP_SETTINGS if key in group}
        assert settings.setdefault(name, own) == own, f"two groups of label {name} have different settings"
    return settings


def _to_json(value: Any) -> Any:
    """Convert tensors to numbers and tuples to lists, as JSON has neither."""
    if isinstance(value, Tensor):
        return value.item()
    return [_to_json(item) for item in value] if isinstance(value, tuple | list) else value


def restore_group_settings(engine: Any, settings: dict[str, dict[str, Any]]) -> None:
    """Put saved hyper-parameters back into the groups of the same labels."""
    optimizer = base_optimizer(engine)
    for name, group in zip(name_groups(optimizer), optimizer.param_groups, strict=True):
        for key, value in settings[name].items():
            group[key] = tuple(value) if isinstance(value, list) else value


def create_state(engine: Any, part: Part, optimizer_step: int) -> dict[str, Tensor]:
    """Create the optimizer state of a part at a given step with zero moments, and return flat views to fill, by kind.

    Padding between and behind the spans stays zero in all three, as in an engine that never stopped.
    """
    optimizer = base_optimizer(engine)
    group = optimizer.param_groups[part.group]
    # torch keeps the counter of the fused and capturable kernels beside the weights, else on the CPU.
    device = part.master.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    state = optimizer.state[part.master]
    state["step"] = torch.tensor(float(optimizer_step), dtype=torch.float32, device=device)
    for moment in MOMENTS:
        state[moment] = torch.zeros_like(part.master, memory_format=torch.preserve_format)
    flats = {kind: state[kind].view(-1) for kind in MOMENTS}
    flats["weight"] = part.master.detach().view(-1)
    flats["weight"].zero_()
    return flats


@torch.no_grad()
def refresh_working_weights(engine: Any) -> None:
    """Derive the weights that the model computes with from the restored masters, as DeepSpeed does after a step.

    All data ranks must call it: ZeRO gathers the ranges.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            # Small parameters stay gathered: drop the stale copies (without writing them back), gather again.
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for members, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(members, masters, strict=True):
                parameter.copy_(master)
