"""Kimi Delta Attention, and Gated DeltaNet-2: the delta rule after a decay of each key channel.

Gated DeltaNet forgets a whole head's state at one rate; here each key channel has its own, as in GLA, so a head can drop some
features and keep others. The gates come from low-rank projections, whose narrow insides every tensor rank computes whole and
whose outputs are cut by head. Gated DeltaNet-2 also has vectors in place of beta: one says which key channels erase what the
state holds, one which value channels are written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.linear.op import linear
from amfm.model.config.mixer_options import ChannelDeltaOptions, KdaOptions
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

    options: ChannelDeltaOptions
    recurrence = DeltaRecurrence()

    def __init__(self, options: ChannelDeltaOptions, build: BuildContext) -> None:
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
        shared = {"decay_inside": inside, "gate_inside": inside}
        return {"q": keys, "k": keys, "v": values, **self.strengths(), **shared}

    def strengths(self) -> dict[str, Part]:
        """What says how strongly a token erases and writes: beta by head."""
        return {"beta": Part(self.options.num_heads, self.options.num_heads)}

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; beta and the decay in float32 for bf16."""
        if self.conv is None:
            parts |= {name: functional.silu(parts[name]) for name in self.convolved()}
        q_BTHK = unit_length(self.heads(parts["q"])) * self.key_dim**-0.5
        k_BTHK = unit_length(self.heads(parts["k"]))
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        step_BTX = linear(parts["decay_inside"], self.decay_proj).to(wide) + self.dt_bias.to(wide)
        g_BTHK = -self.A_log.to(wide).exp()[:, None] * self.heads(functional.softplus(step_BTX))
        return self.written(q_BTHK, k_BTHK, self.heads(parts["v"]), g_BTHK, parts)

    def written(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHK: Tensor, parts: dict[str, Tensor]
    ) -> ScanRows:
        """Report how strongly tokens erase and write: one delta rule a token."""
        beta_BTH = parts["beta"].to(g_BTHK.dtype).sigmoid()
        if isinstance(self.options, KdaOptions) and self.options.allow_negative_eigenvalues:
            beta_BTH = 2.0 * beta_BTH
        k_BTNHK, v_BTNHV, beta_BTNH = (x.unsqueeze(2) for x in (k_BTHK, v_BTHV, beta_BTH))
        return ScanRows(q_BTHK, k_BTNHK, v_BTNHV, g_BTHK, beta_BTNH)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o by head, times the gate's sigmoid."""
        return self.norm(o_BTHV, linear(parts["gate_inside"], self.gate_proj))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw A_log and dt_bias as Mamba2's: rates by head, time steps by key channel."""
        if name == "A_log":
            return first_decay_rates(shape, generator)
        return first_time_steps(shape, generator) if name == "dt_bias" else None


class Gdn2Mixer(KdaMixer):
    """S <- diag(e^g) S, then S <- S + k (w * v - S^T (b * k))^T, with b = sigmoid(W_b x) by key channel, w = sigmoid(W_w x) by value channel.

    All else as Kimi Delta Attention; b = w = beta makes it that. b stays below 1: beyond, steps that are not
    contraction would make the state grow without bound. Source: Gated DeltaNet-2 as flash-linear-attention has it
    (fla/ops/gdn2).
    """

    def strengths(self) -> dict[str, Part]:
        """b and w by head, with a number each channel."""
        heads = self.options.num_heads
        return {"erase": Part(heads * self.key_dim, heads), "write": Part(heads * self.value_dim, heads)}

    def written(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHK: Tensor, parts: dict[str, Tensor]
    ) -> ScanRows:
        """Gates in float32 for bf16, and what they multiply in the dtype of the rows."""
        wide = g_BTHK.dtype
        erase_BTHK = (k_BTHK.to(wide) * self.heads(parts["erase"]).to(wide).sigmoid()).to(k_BTHK.dtype)
        v_BTHV = (v_BTHV.to(wide) * self.heads(parts["write"]).to(wide).sigmoid()).to(v_BTHV.dtype)
        ones_BTNH = g_BTHK.new_ones(*v_BTHV.shape[:2], 1, self.num_heads)
        return ScanRows(q_BTHK, k_BTHK.unsqueeze(2), v_BTHV.unsqueeze(2), g_BTHK, ones_BTNH, erase_BTHK)
