"""The optimizer's state on one rank, as ranges of named parameters: master weights, moments and settings, to save and to fill.

The parts of the state (pretrain/engine/parts.py) say which range of which parameter is where; here their moments join
them, AdamW's two or Muon's one, by the group of the parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amfm.pretrain.engine.adamw import AVERAGE, AdamW, moments_of
from amfm.pretrain.engine.parts import Part
from amfm.pretrain.parallel import set_deepspeed_accelerator

if TYPE_CHECKING:
    from amfm.pretrain.engine.engine import ZeroEngine

set_deepspeed_accelerator()

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: E402
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402

# Settings of a parameter group that a checkpoint carries; the rest of a torch group says how to run, not what to do.
GROUP_SETTINGS = ("lr", "initial_lr", "betas", "eps", "momentum", "weight_decay")


@dataclass(frozen=True)
class Fragment:
    """One range of this rank's shard of a parameter: flat views of weight and moments, and who else has a share.

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


def base_optimizer(engine: Any) -> torch.optim.Adam:
    """Find the torch optimizer that steps the master weights, below DeepSpeed's wrapper.

    Raises TypeError for an optimizer other than torch's Adam and AdamW, and Muon, which is one: its state would not be
    understood.
    """
    inner = engine.basic_optimizer
    if not isinstance(inner, torch.optim.Adam):
        raise TypeError(
            f"checkpoints hold the state of torch's AdamW and Adam, and of Muon, not of {type(inner).__name__}"
        )
    return inner


def name_groups(optimizer: torch.optim.Adam) -> list[str]:
    """Labels of the parameter groups (`muon`, `decay`, `no_decay`), in the optimizer's order.

    A label may come several times: DeepSpeed takes the experts of a group into separate groups.
    """
    return [str(group["label"]) for group in optimizer.param_groups]


def collect_fragments(
    engine: Any, parts: Sequence[Part], averages: Mapping[int, Tensor] = MappingProxyType({})
) -> list[Fragment]:
    """Collect views (no copies) of all parameter state on this rank, from the parts of `list_parts`.

    averages: of the master weights of parts, by the part's number, where a run keeps them.

    A part that was never stepped has no moments yet; it gets zeros and step 0, which is what the optimizer starts from.
    """
    optimizer = base_optimizer(engine)
    group_names = name_groups(optimizer)
    fragments = []
    for number, part in enumerate(parts):
        state = optimizer.state.get(part.master, {})
        flats = {"weight": part.master.detach().reshape(-1)}
        for moment in moments_of(group_names[part.group]):
            value = state.get(moment)
            flats[moment] = torch.zeros_like(flats["weight"]) if value is None else value.detach().reshape(-1)
        if number in averages:
            flats[AVERAGE] = averages[number]
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


def owned_states(engine: Any) -> dict[str, Tensor]:
    """States of whole matrices that this rank keeps as their owner, by the name that they have among a checkpoint's buffers."""
    optimizer = base_optimizer(engine)
    return optimizer.owned_states() if isinstance(optimizer, AdamW) else {}


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

    Padding between and after the spans stays zero in all of them, as in an engine that never stopped.
    """
    optimizer = base_optimizer(engine)
    group = optimizer.param_groups[part.group]
    # torch keeps the counter of the fused kernels next to the weights, else on the CPU.
    device = part.master.device if group.get("fused") else torch.device("cpu")
    state = optimizer.state[part.master]
    state["step"] = torch.tensor(float(optimizer_step), dtype=torch.float32, device=device)
    moments = moments_of(str(group["label"]))
    for moment in moments:
        state[moment] = torch.zeros_like(part.master, memory_format=torch.preserve_format)
    flats = {moment: state[moment].view(-1) for moment in moments}
    flats["weight"] = part.master.detach().view(-1)
    flats["weight"].zero_()
    return flats


@torch.no_grad()
def refresh_working_weights(engine: ZeroEngine) -> None:
    """Derive the weights that the model computes with from the restored master weights, as DeepSpeed does after a step.

    All data ranks must call it: ZeRO gathers the ranges, after what is left of the gathers of the step before.
    """
    engine.wait_for_weights()
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
