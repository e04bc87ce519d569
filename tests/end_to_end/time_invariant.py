"""The ablation of selection: Mamba2's recurrence with constants instead of its time step, B and C, and no gate.

What is left of it is a convolution whose kernel is learned. The gate goes too because it selects by content as well. A
plugin, as docs/mixers.md describes them: no one would train a model of it, so it is not a mixer of ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.common.limits import DECAY_LIMITS
from amfm.model.config.kinds import Kind
from amfm.model.config.mixer_options import HeadOptions
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.mixers.shared_layers import GatedHeadNorm, first_decay_rates, first_time_steps
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec


class TimeInvariantOptions(HeadOptions):
    """Mamba2 whose time step, B and C are constants of the head."""

    scan_limits = DECAY_LIMITS


class TimeInvariantMixer(LinearMixer):
    """Linear and time-invariant up to the SiLU of its short convolution and the norm of each head."""

    options: TimeInvariantOptions
    recurrence = DecayRecurrence()

    def __init__(self, options: TimeInvariantOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        by_head = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
        self.B = nn.Parameter(torch.empty(self.num_heads, self.key_dim))
        self.C = nn.Parameter(torch.empty(self.num_heads, self.key_dim))
        self.A_log, self.dt_bias, self.D = (nn.Parameter(torch.empty(self.num_heads)) for _ in range(3))
        self.shards |= dict.fromkeys(("B", "C", "A_log", "dt_bias", "D"), by_head)
        self.norm = GatedHeadNorm(self.value_dim, build)

    def parts(self) -> dict[str, Part]:
        """x, by head."""
        return {"x": Part(self.options.num_heads * self.value_dim, self.options.num_heads)}

    def convolved(self) -> tuple[str, ...]:
        """x."""
        return ("x",)

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """The same q, k and g at every token."""
        x_BTHV = self.heads(parts["x"])
        dt_H = functional.softplus(self.dt_bias)
        every_token = (*x_BTHV.shape[:2], -1)
        q_BTHK, k_BTHK = (constant.expand(*every_token, -1).contiguous() for constant in (self.C, self.B))
        g_BTH = (-self.A_log.exp() * dt_H).expand(every_token).contiguous()
        return ScanRows(q_BTHK, k_BTHK, x_BTHV * dt_H[:, None], g_BTH)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """D x next to what was read; a norm a head."""
        return self.norm(o_BTHV + self.heads(parts["x"]) * self.D[:, None], None)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """As Mamba2's decay starts; B and C of length 1 or so."""
        if name == "A_log":
            return first_decay_rates(shape, generator)
        if name == "dt_bias":
            return first_time_steps(shape, generator)
        if name == "D":
            return torch.ones(shape)
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if name in ("B", "C") else None


SPEC = Kind("time_invariant", f"{__name__}:TimeInvariantMixer", TimeInvariantOptions)
