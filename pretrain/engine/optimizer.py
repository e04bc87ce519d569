"""AdamW and its parameter groups: matrices decay, everything else does not.

Groups carry labels and the names of their parameters, because DeepSpeed flattens and splits them: checkpoints find a
group's settings by label, whatever became of the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.config.schema import OptimizerConfig

NEVER_DECAY = ("bias", "A_log", "D")  # end of the name, after a dot or _; vectors never decay whatever their name


def decays(name: str, shape: torch.Size) -> bool:
    """Whether weight decay applies: to matrices and stacks of them, not to norms, biases, A_log, D and dt_bias."""
    is_kept = any(f"_{name.rsplit('.', 1)[-1]}".endswith(f"_{end}") for end in NEVER_DECAY)
    return not is_kept and len(shape) >= 2


def group_parameters(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort parameters into the groups `decay` and `no_decay`, in the module's order; empty ones are left out.

    `parameter_names` of a group names its parameters, in their order. Experts that are spread over ranks, marked with
    the `group_name` of those that hold the same ones, are groups of their own, of the same label: DeepSpeed reads their
    `name` and `moe`.
    """
    groups: dict[tuple[str, str | None], dict[str, Any]] = {}
    for label, decay in (("decay", weight_decay), ("no_decay", 0.0)):
        groups[label, None] = {"label": label, "weight_decay": decay, "params": [], "parameter_names": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            label = "decay" if decays(name, parameter.shape) else "no_decay"
            spread: str | None = getattr(parameter, "group_name", None)
            if (label, spread) not in groups:
                own = {"params": [], "parameter_names": [], "moe": True, "name": spread}
                groups[label, spread] = groups[label, None] | own
            groups[label, spread]["params"].append(parameter)
            groups[label, spread]["parameter_names"].append(name)
    return [group for group in groups.values() if group["params"]]


def build_adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the groups of `group_parameters`.

    The rate starts at zero: wrappers that step once to allocate their states must not move a weight, and the loop sets
    the schedule's rate before each step.
    """
    return torch.optim.AdamW(
        group_parameters(module, config.weight_decay),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
