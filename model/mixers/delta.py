"""Linear mixers that overwrite: DeltaNet, Gated DeltaNet and DeltaProduct.

Plain linear attention only adds to its state, so what a key holds blurs with every write. The delta rule first removes
what the state holds for the key: one step of gradient descent on |S^T k - v|^2 with rate beta. With k of unit length the
transition I - beta k k^T has the eigenvalue 1 - beta along k, and beta = 2 (`allow_negative_eigenvalues`) makes it a
reflection. Recurrences whose transitions have only positive real eigenvalues cannot solve parity at all lengths in finite
precision (Grazzi et al. 2024, arXiv 2411.12537, theorem 1).

Kimi Delta Attention: the delta rule after a decay of each key channel.

Gated DeltaNet forgets a whole head's state at one rate; here each key channel has its own, as in GLA, so a head can drop some
features and keep others. The gates come from low-rank projections, whose narrow insides every tensor rank computes whole and
whose outputs are cut by head.

Delta mixers as one operation, from their projections to their output: on the Triton backend, whole rows and segments of rows.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.delta_block.op import DeltaSizes, delta_mix
from amfm.kernels.linear.op import linear
from amfm.model.config.mixer_options import (
    ChannelDeltaOptions,
    DeltaNetOptions,
    DeltaProductOptions,
    GatedDeltaNetOptions,
    KdaOptions,
)
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DeltaRecurrence, ScanRows
from amfm.model.mixers.shared_layers import GatedHeadNorm, first_decay_rates, first_time_steps
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import SegmentExchange
from amfm.model.parallel.shards import Shard, ShardSpec, divide_units


class DeltaBlock(LinearMixer):
    """A linear mixer on the delta rule that may run as one operation (kernels/delta_block), which keeps less for backward.

    The parts run in turn on the torch backend, for decode states, without a convolution, under LoRA, and in classes of
    packages, which may change any part.
    """

    norm: GatedHeadNorm

    @abstractmethod
    def delta_sizes(self) -> DeltaSizes:
        """Sizes and forms of this rank's part, as the operation takes them."""

    def gates_apart(self, whole_BTX: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Raw numbers of decay and output gate that in_proj does not give."""
        return None, None

    def at_once(self, cut_BTX: Tensor, whole_BTX: Tensor | None, meta: PackMeta) -> Tensor | None:
        """As in the base class."""
        is_own = type(self).__module__.startswith("amfm.model.mixers.")
        if self.build.backend != "triton" or self.conv is None or self.out_proj.lora is not None or not is_own:
            return None
        decay_BTX, gate_BTI = self.gates_apart(whole_BTX)
        starts_BT, exchange, segments = meta.document_starts_BT(), None, meta.segments
        projected_BTX = cut_BTX
        if segments is not None:
            exchange = SegmentExchange(segments, self.build.groups)
            projected_BTX = segments.as_rows(cut_BTX)
            decay_BTX, gate_BTI, starts_BT = (
                None if x is None else segments.as_rows(x) for x in (decay_BTX, gate_BTI, starts_BT)
            )
        mixed_BTD = delta_mix(
            projected_BTX,
            self.conv.weight,
            getattr(self, "A_log", None),
            getattr(self, "dt_bias", None),
            self.norm.weight,
            self.out_proj.weight,
            self.delta_sizes(),
            decay_BTX=decay_BTX,
            gate_BTI=gate_BTI,
            document_starts_BT=starts_BT,
            chunk_size=self.options.chunk_size,
            exchange=exchange,
            backend=self.build.backend,
        )
        return mixed_BTD.view(*cut_BTX.shape[:2], -1)


class DeltaNetMixer(DeltaBlock):
    """q and k of unit length per head, v, and a strength beta = sigmoid(b): S <- (I - beta k k^T) S + beta k v^T.

    q, k and v pass the short convolution with SiLU, q is scaled by 1 / sqrt(K), each head's output is normed.
    Source: Yang et al. 2024, arXiv 2406.06484, section 3.
    """

    options: DeltaNetOptions
    num_steps = 1
    has_decay = False
    has_gate = False

    def __init__(self, options: DeltaNetOptions, build: BuildContext) -> None:
        self.num_key_heads = divide_units(options.key_heads(), build.groups, "num_key_heads")
        super().__init__(options, build)
        self.recurrence = DeltaRecurrence(self.num_steps)
        epsilon = options.head_norm_epsilon if isinstance(options, GatedDeltaNetOptions) else None
        self.norm = GatedHeadNorm(self.value_dim, build, epsilon=epsilon)
        if self.has_decay:
            self.A_log = nn.Parameter(torch.empty(self.num_heads))
            self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
            by_head = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
            self.shards |= {"A_log": by_head, "dt_bias": by_head}

    def parts(self) -> dict[str, Part]:
        """q, k and v; beta; what decides how much is forgotten; the output gate. Steps stand inside a head."""
        heads, key_heads = self.options.num_heads, self.options.key_heads()
        parts = {
            "q": Part(key_heads * self.key_dim, key_heads),
            "k": Part(key_heads * self.num_steps * self.key_dim, key_heads),
            "v": Part(heads * self.num_steps * self.value_dim, heads),
            "beta": Part(heads * self.num_steps, heads),
        }
        if self.has_decay:
            parts["decay"] = Part(heads, heads)
        if self.has_gate:
            parts["gate"] = Part(heads * self.value_dim, heads)
        return parts

    def delta_sizes(self) -> DeltaSizes:
        """As in the base class."""
        return DeltaSizes(
            self.num_key_heads,
            self.num_heads,
            self.key_dim,
            self.value_dim,
            self.num_steps,
            "softplus" if self.has_decay else "none",
            False,
            "silu" if self.has_gate else "none",
            self.norm.epsilon,
            2.0 if self.options.allow_negative_eigenvalues else 1.0,
        )

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; beta and the decay in float32 for bf16."""
        if self.conv is None:
            parts |= {name: functional.silu(parts[name]) for name in self.convolved()}
        q_BTGK = unit_length(parts["q"].unflatten(-1, (self.num_key_heads, self.key_dim))) * self.key_dim**-0.5
        k_BTGNK = unit_length(parts["k"].unflatten(-1, (self.num_key_heads, self.num_steps, self.key_dim)))
        v_BTHNV = parts["v"].unflatten(-1, (self.num_heads, self.num_steps, self.value_dim))
        wide = torch.promote_types(q_BTGK.dtype, torch.float32)
        beta_BTHN = parts["beta"].unflatten(-1, (self.num_heads, self.num_steps)).to(wide).sigmoid()
        if self.options.allow_negative_eigenvalues:
            beta_BTHN = 2.0 * beta_BTHN
        g_BTH = None
        if self.has_decay:
            g_BTH = -self.A_log.to(wide).exp() * functional.softplus(parts["decay"].to(wide) + self.dt_bias.to(wide))
        return ScanRows(q_BTGK, k_BTGNK.transpose(2, 3), v_BTHNV.transpose(2, 3), g_BTH, beta_BTHN.transpose(2, 3))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o by head, times the gate's SiLU if there is one."""
        return self.norm(o_BTHV, parts.get("gate"))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw A_log and dt_bias as Mamba2's, if there is a decay."""
        if name == "A_log":
            return first_decay_rates(shape, generator)
        return first_time_steps(shape, generator) if name == "dt_bias" else None


class GatedDeltaNetMixer(DeltaNetMixer):
    """The delta rule after a decay e^(-exp(A_log) softplus(a + dt_bias)) a head, and an output gate.

    Source: Yang et al. 2024, arXiv 2412.06464, sections 3.1 and 3.3.
    """

    has_decay = True
    has_gate = True


class DeltaProductMixer(DeltaNetMixer):
    """num_steps delta rules per token, so that one token's transition is a product of as many reflections.

    Source: Siems et al. 2025, arXiv 2502.10297, section 3.
    """

    options: DeltaProductOptions
    has_gate = True

    def __init__(self, options: DeltaProductOptions, build: BuildContext) -> None:
        self.num_steps, self.has_decay = options.num_steps, options.decay
        super().__init__(options, build)


def unit_length(x: Tensor) -> Tensor:
    """Divide each vector of the last dim by its length, in the dtype of x, computed in float32; zero stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class KdaMixer(DeltaBlock):
    """S <- diag(e^g) S, then S <- (I - beta k k^T) S + beta k v^T, with q, k and v as Gated DeltaNet has them.

    g = -exp(A_log) softplus(W2 W1 x + dt_bias), a rate a head and a time step a key channel, or with a floor
    floor sigmoid(exp(A_log) (W2 W1 x + dt_bias)); each head's output is normed and multiplied by sigmoid(U2 U1 x). W2 W1 and U2 U1 may
    be a matrix each. Source: Kimi Team 2025, arXiv 2510.26692, section 3.
    """

    options: ChannelDeltaOptions
    recurrence = DeltaRecurrence()

    def __init__(self, options: ChannelDeltaOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        heads, self.floor = options.num_heads, options.decay_floor if isinstance(options, KdaOptions) else None
        by_key = ShardSpec(0, "tp", (heads * self.key_dim,), (heads,))
        by_value = ShardSpec(0, "tp", (heads * self.value_dim,), (heads,))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads * self.key_dim))
        self.shards |= {"A_log": Shard((ShardSpec(0, "tp", (heads,)),)), "dt_bias": Shard((by_key,))}
        if not self.has_whole_gates:
            self.decay_proj = nn.Parameter(torch.empty(self.num_heads * self.key_dim, options.rank()))
            self.gate_proj = nn.Parameter(torch.empty(self.num_heads * self.value_dim, options.rank()))
            self.shards |= {"decay_proj": Shard((by_key,)), "gate_proj": Shard((by_value,))}
        self.norm = GatedHeadNorm(self.value_dim, build, act="sigmoid")

    @property
    def has_whole_gates(self) -> bool:
        """Whether decay and output gate have one matrix each."""
        return isinstance(self.options, KdaOptions) and self.options.gates == "full"

    def parts(self) -> dict[str, Part]:
        """q, k, v and beta by head; the insides of the decay's and the output gate's projections whole, or both by head."""
        heads, inside = self.options.num_heads, Part(self.options.rank(), None)
        keys, values = Part(heads * self.key_dim, heads), Part(heads * self.value_dim, heads)
        own = {"q": keys, "k": keys, "v": values, **self.strengths()}
        if self.has_whole_gates:
            return own | {"decay": keys, "gate": values}
        return own | {"decay_inside": inside, "gate_inside": inside}

    def strengths(self) -> dict[str, Part]:
        """What says how strongly a token erases and writes: beta by head."""
        return {"beta": Part(self.options.num_heads, self.options.num_heads)}

    def delta_sizes(self) -> DeltaSizes:
        """As in the base class."""
        own = self.options
        return DeltaSizes(
            self.num_heads,
            self.num_heads,
            self.key_dim,
            self.value_dim,
            1,
            "softplus" if self.floor is None else "floor",
            True,
            "sigmoid",
            self.norm.epsilon,
            2.0 if isinstance(own, KdaOptions) and own.allow_negative_eigenvalues else 1.0,
            self.floor or 0.0,
        )

    def gates_apart(self, whole_BTX: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """As in the base class: raw decays and output gates of low-rank projections."""
        if whole_BTX is None:
            return None, None
        inside = self.split_whole(whole_BTX)
        return linear(inside["decay_inside"], self.decay_proj), linear(inside["gate_inside"], self.gate_proj)

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; beta and the decay in float32 for bf16."""
        if self.conv is None:
            parts |= {name: functional.silu(parts[name]) for name in self.convolved()}
        q_BTHK = unit_length(self.heads(parts["q"])) * self.key_dim**-0.5
        k_BTHK = unit_length(self.heads(parts["k"]))
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        raw_BTX = parts["decay"] if self.has_whole_gates else linear(parts["decay_inside"], self.decay_proj)
        step_BTX, rate_H1 = raw_BTX.to(wide) + self.dt_bias.to(wide), self.A_log.to(wide).exp()[:, None]
        if self.floor is None:
            g_BTHK = -rate_H1 * self.heads(functional.softplus(step_BTX))
        else:
            g_BTHK = self.floor * (rate_H1 * self.heads(step_BTX)).sigmoid()
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
        gate_BTI = parts["gate"] if self.has_whole_gates else linear(parts["gate_inside"], self.gate_proj)
        return self.norm(o_BTHV, gate_BTI)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw A_log and dt_bias as Mamba2's: rates by head, time steps by key channel."""
        if name == "A_log":
            return first_decay_rates(shape, generator)
        return first_time_steps(shape, generator) if name == "dt_bias" else None
