"""Kimi Delta Attention: the delta rule after a decay of each key channel.

Gated DeltaNet forgets a whole head's state at one rate; here each key channel has its own, as in GLA, so a head can drop some
features and keep others. The gates come from low-rank projections, whose narrow insides every tensor rank computes whole and
whose outputs are cut by head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.linear.op import linear
from amfm.model.config.mixer_options import KdaOptions
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.delta import unit_length
from amfm.model.mixers.head_norm import GatedHeadNorm
from amfm.model.mixers.initial_values import first_decay_rates, first_time_steps
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DeltaRecurrence, ScanRows
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec


class KdaMixer(LinearMixer):
    """S <- diag(e^g) S, then S <- (I - beta k k^T) S + beta k v^T, with q, k and v as Gated DeltaNet has them.

    g = -exp(A_log) softplus(W2 W1 x + dt_bias), a rate a head and a time step a key channel; each head's output is normed
    and multiplied by sigmoid(U2 U1 x). Source: Kimi Team 2025, arXiv 2510.26692, section 3.
    """

    options: KdaOptions
    recurrence = DeltaRecurrence()

    def __init__(self, options: KdaOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        heads = options.num_heads
        by_key = ShardSpec(0, "tp", (heads * self.key_dim,), (heads,))
        by_value = ShardSpec(0, "tp", (heads * self.value_dim,), (heads,))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads * self.key_dim))
        self.decay_proj = nn.Parameter(torch.empty(self.num_heads * self.key_dim, options.rank()))
        self.gate_proj = nn.Parameter(torch.empty(self.num_heads * self.value_dim, options.rank()))
        self.shards |= {
            "A_log": Shard((ShardSpec(0, "tp", (heads,)),)),
            "dt_bias": Shard((by_key,)),
            "decay_proj": Shard((by_key,)),
            "gate_proj": Shard((by_value,)),
        }
        self.norm = GatedHeadNorm(self.value_dim, build, activate=torch.sigmoid)

    def parts(self) -> dict[str, Part]:
        """q, k, v and beta by head; the insides of the decay's and the output gate's projections whole."""
        heads, inside = self.options.num_heads, Part(self.options.rank(), None)
        keys, values = Part(heads * self.key_dim, heads), Part(heads * self.value_dim, heads)
        return {
            "q": keys,
            "k": keys,
            "v": values,
            "beta": Part(heads, heads),
            "decay_inside": inside,
            "gate_inside": inside,
        }

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; beta and the decay in float32 for bf16."""
        if self.conv is None:
            parts |= {name: functional.silu(parts[name]) for name in self.convolved()}
        q_BTHK = unit_length(self.heads(parts["q"])) * self.key_dim**-0.5
        k_BTHK = unit_length(self.heads(parts["k"]))
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        beta_BTH = parts["beta"].to(wide).sigmoid()
        if self.options.allow_negative_eigenvalues:
            beta_BTH = 2.0 * beta_BTH
        step_BTX = linear(parts["decay_inside"], self.decay_proj).to(wide) + self.dt_bias.to(wide)
        g_BTHK = -self.A_log.to(wide).exp()[:, None] * self.heads(functional.softplus(step_BTX))
        # One delta rule a token.
        k_BTNHK, v_BTNHV, beta_BTNH = (x.unsqueeze(2) for x in (k_BTHK, self.heads(parts["v"]), beta_BTH))
        return ScanRows(q_BTHK, k_BTNHK, v_BTNHV, g_BTHK, beta_BTNH)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o by head, times the gate's sigmoid."""
        return self.norm(o_BTHV, linear(parts["gate_inside"], self.gate_proj))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw A_log and dt_bias as Mamba2's: rates by head, time steps by key channel."""
        if name == "A_log":
            return first_decay_rates(shape, generator)
        return first_time_steps(shape, generator) if name == "dt_bias" else None
