"""S4D (Gu et al. 2022, arXiv 2206.11893) on amfm's decay scan; see the README for the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_s4d.spec import S4DOptions

DT_MIN, DT_MAX = 1e-3, 1e-1
REAL_PART = 0.5


class S4DMixer(LinearMixer):
    """y = out_proj(GELU(S4D(in_proj(x)))): no gate and no convolution before, so all that mixes tokens is one kernel a head."""

    options: S4DOptions
    recurrence = DecayRecurrence()

    def __init__(self, options: S4DOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        by_head = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
        self.log_dt, self.log_decay = (nn.Parameter(torch.empty(self.num_heads)) for _ in range(2))
        self.C = nn.Parameter(torch.empty(self.num_heads, self.key_dim))
        self.skip = nn.Parameter(torch.empty(self.num_heads, self.value_dim))
        self.shards |= dict.fromkeys(("log_dt", "log_decay", "C", "skip"), by_head)

    def parts(self) -> dict[str, Part]:
        """u, by head."""
        return {"u": Part(self.options.num_heads * self.value_dim, self.options.num_heads)}

    def convolved(self) -> tuple[str, ...]:
        """Nothing: the options have no convolution."""
        return ()

    def kernel_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log decay a token [H], angle a token [H, N], C times the held input [H, N] complex), in float64."""
        dt_H, rate_H = self.log_dt.double().exp(), self.log_decay.double().exp()
        number_N = torch.arange(self.key_dim // 2, dtype=torch.float64, device=dt_H.device)
        eigenvalue_HN = torch.complex(
            -rate_H[:, None].expand(-1, len(number_N)), (math.pi * number_N).expand(len(dt_H), -1)
        )
        held_HN = ((eigenvalue_HN * dt_H[:, None]).exp() - 1) / eigenvalue_HN
        real_HN, imaginary_HN = self.C.double().chunk(2, dim=-1)
        return -rate_H * dt_H, math.pi * number_N * dt_H[:, None], torch.complex(real_HN, imaginary_HN) * held_HN

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Keys turn with the position, queries are the coefficients turned as far."""
        u_BTHV = self.heads(parts["u"])
        log_decay_H, angle_HN, coefficient_HN = self.kernel_terms()
        turned_BTHN = meta.positions_BT.double()[..., None, None] * angle_HN
        cos, sin = turned_BTHN.cos(), turned_BTHN.sin()
        read_BTHN = 2 * coefficient_HN * torch.complex(cos, sin)
        q_BTHK = torch.cat([read_BTHN.real, read_BTHN.imag], dim=-1)
        k_BTHK = torch.cat([cos, sin], dim=-1)
        g_BTH = log_decay_H.to(torch.promote_types(u_BTHV.dtype, torch.float32)).expand(*u_BTHV.shape[:3])
        return ScanRows(q_BTHK.to(u_BTHV.dtype), k_BTHK.to(u_BTHV.dtype), u_BTHV, g_BTH)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Add D u, then GELU."""
        return functional.gelu((o_BTHV + self.skip * self.heads(parts["u"])).flatten(-2))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Time steps log-uniform, real parts -1/2, C and D normal."""
        if name == "log_dt":
            low, high = math.log(DT_MIN), math.log(DT_MAX)
            return torch.empty(shape).uniform_(low, high, generator=generator)
        if name == "log_decay":
            return torch.full(shape, math.log(REAL_PART))
        return torch.randn(shape, generator=generator) if name in ("C", "skip") else None
