"""Optimizers and their parameter groups: matrices decay, everything else does not; Muon takes the matrices inside blocks, and
under muP classes of matrices have rates.

Groups carry labels and the names of their parameters, because DeepSpeed flattens and splits them: checkpoints find a
group's settings by label, whatever became of the tensors.

An installed package's optimizer, as DeepSpeed, ZeRO and checkpoints expect one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from amfm.model.config.mup import WidthScales, width_scales
from amfm.model.hybrid import HybridModel
from amfm.model.matrices import MatrixStack
from amfm.pretrain.config.optimizers import (
    DecayFactors,
    MuonConfig,
    OptimizerSpec,
    RateFactors,
    group_of,
    optimizer_specs,
)
from amfm.pretrain.config.schema import OptimizerConfig
from amfm.pretrain.engine.adamw import MATRICES, MUON, ONE, AdamW, Bf16AdamW, moments_of


class PackageOptimizer(torch.optim.AdamW):
    """Calls a package's `update` on each flat master with its moments, which the label of the group names.

    A subclass of torch's AdamW only for its groups, settings and state: checkpoints and DeepSpeed read these.
    """

    def __init__(self, groups: list[dict[str, Any]], update: Callable[..., None], options: Any, **adamw: Any) -> None:
        super().__init__(groups, **adamw | {"fused": False})
        self.update, self.options = update, options

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the groups of this call, which DeepSpeed may narrow to one."""
        assert closure is None, "gradients come from the engine"
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._step(master, master.grad, group)

    def _step(self, master: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One master."""
        state = self.state[master]
        names = moments_of(str(group["label"]))
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(master) for name in names})
        state["step"] += 1
        # A flat master, or under ZeRO 0 in float32 a parameter in its shape; neither has gaps, so these are views.
        moments = {name: state[name].view(-1) for name in names}
        self.update(master.view(-1), gradient.reshape(-1), moments, int(state["step"]), group, self.options)


NO_SCALES = WidthScales()
NO_RATES, NO_DECAYS = RateFactors(), DecayFactors()
NEVER_DECAY = ("bias", "A_log", "D")  # end of the name, after a dot or _; vectors never decay whatever their name


def decays(name: str, shape: torch.Size) -> bool:
    """Whether weight decay applies: to matrices and stacks of them, not to norms, biases, A_log, D and dt_bias."""
    is_kept = any(f"_{name.rsplit('.', 1)[-1]}".endswith(f"_{end}") for end in NEVER_DECAY)
    return not is_kept and len(shape) >= 2


def _label(decays: bool, scales: WidthScales) -> str:
    """The label of a group; under muP its class is a part of it, because a label has one set of settings."""
    if not decays:
        return "no_decay"
    if scales == NO_SCALES:
        return "decay"
    return "decay_wide" if scales.epsilon != 1.0 else "decay_out"


def part_of(name: str) -> str:
    """The part of a model in which a parameter is used: a block (`blocks.3`), `embedding`, or `head` for what follows."""
    first, _, rest = name.partition(".")
    return f"blocks.{rest.partition('.')[0]}" if first == "blocks" else first if first == "embedding" else "head"


def group_parameters(
    module: nn.Module,
    weight_decay: float,
    *,
    bucket_elements: int | None = None,
    apart: Collection[nn.Parameter] = (),
    epsilon: float = 1e-8,
    scales: Callable[[str], WidthScales] | None = None,
    matrices: Collection[str] = (),
    rates: RateFactors = NO_RATES,
    decay_factors: DecayFactors = NO_DECAYS,
) -> list[dict[str, Any]]:
    """Sort parameters into the groups `muon`, `decay` and `no_decay`, in the module's order; empty ones are left out.

    `parameter_names` of a group names its parameters, in their order. Experts that are spread over ranks, marked with
    the `group_name` of those that hold the same ones, are separate groups, of the same label: DeepSpeed reads their
    `name` and `moe`. `bucket_elements`: close a group of decaying parameters after the part of the module with which it
    comes to so many, which makes it a bucket; `apart`: parameters that make groups of their own. `scales`: of a parameter's
    rate and epsilon by its name; each pair makes groups of its own, `decay_wide` and `decay_out`, whose `rate_scale` the
    step multiplies the schedule's rate by. `matrices`: names of those that Muon steps. `rates`, `decay_factors`: by kind of
    parameter; each kind with factors of its own makes groups of its own, named after an @.
    """
    groups: dict[tuple[str, str | None, bool, int], dict[str, Any]] = {}
    # The present bucket of each kind of group: its number, its elements so far, and the part it came to.
    buckets: dict[tuple[str, str | None, bool], tuple[int, int, str]] = {}
    kept_apart = {id(parameter) for parameter in apart}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        own_scales = NO_SCALES if scales is None else scales(name)
        is_muon, has_decay = name in matrices, decays(name, parameter.shape)
        group_name = group_of(name, is_matrix=has_decay)
        rate = rates.factor(group_name, by_adamw=bool(matrices) and not is_muon)
        decay_factor = decay_factors.factor(group_name) if has_decay else 1.0
        label = MUON if is_muon else _label(has_decay, own_scales)
        if (rate, decay_factor) != (1.0, 1.0) and not is_muon:
            label = f"{label}@{group_name}"
        spread: str | None = getattr(parameter, "group_name", None)
        kind = (label, spread, id(parameter) in kept_apart)
        number, elements, part = buckets.get(kind, (0, 0, part_of(name)))
        is_full = bucket_elements is not None and has_decay and elements >= bucket_elements
        if is_full and part != part_of(name):
            number, elements = number + 1, 0
        buckets[kind] = (number, elements + parameter.numel(), part_of(name))
        own: dict[str, Any] = {} if spread is None else {"moe": True, "name": spread}
        if own_scales != NO_SCALES and label != MUON:
            own |= {"rate_scale": own_scales.rate, "eps": epsilon * own_scales.epsilon}
        if rate != 1.0:
            own["rate_scale"] = rate * own.get("rate_scale", 1.0)
        new = {
            "label": label,
            "weight_decay": weight_decay * decay_factor if has_decay else 0.0,
            "params": [],
            "parameter_names": [],
        }
        group = groups.setdefault((*kind, number), new | own)
        group["params"].append(parameter)
        group["parameter_names"].append(name)
    # Dense before spread, decaying before the others: the norm of all gradients adds up in this order.
    return [
        groups[key]
        for key in sorted(groups, key=lambda key: (key[1] is not None, key[0].startswith("no_decay"), key[2], key[3]))
    ]


def build_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    stacks: Collection[MatrixStack] = (),
    *,
    bucket_elements: int | None = None,
    apart: Collection[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """Build the configured optimizer over the groups of `group_parameters`: fused AdamW (Loshchilov and Hutter 2019, arXiv
    1711.05101), AdamW with bf16 states, one of a package, or Muon and its like, which must be told their matrices, `stacks`
    (`list_matrices`).

    The rate starts at zero: wrappers that step once to allocate their states must not move a weight, and the loop sets
    the schedule's rate before each step.
    """
    model = module.config if isinstance(module, HybridModel) else None
    mup = None if model is None else model.mup
    groups = group_parameters(
        module,
        config.weight_decay,
        bucket_elements=bucket_elements,
        apart=apart,
        epsilon=config.epsilon,
        scales=None if model is None else partial(width_scales, config=model),
        matrices={stack.name for stack in stacks},
        rates=config.rates or NO_RATES,
        decay_factors=config.decays or NO_DECAYS,
    )
    settings: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.epsilon, "fused": True}
    matrices = config.matrix_settings()
    spec = optimizer_specs().get(config.kind)
    if isinstance(spec, OptimizerSpec):
        if spec.num_moments == 1:
            groups = [group | {"label": f"{ONE}{group['label']}"} for group in groups]
        options = getattr(config.options, config.kind) or spec.options()
        return PackageOptimizer(groups, spec.load(), options, **settings)
    if config.state_dtype == "bf16":
        assert matrices is None, "optimizer_problems rejects Muon with bf16 states"
        return Bf16AdamW(groups, **settings)
    if matrices is None:
        return AdamW(groups, **settings)
    from amfm.pretrain.engine.muon.optimizer import Muon

    if not isinstance(matrices, MuonConfig) or matrices.rule != "muon":
        groups = [group | {"label": MATRICES} if group["label"] == MUON else group for group in groups]
    return Muon(groups, matrices, base_width=None if mup is None else mup.base_hidden_size, **settings)
