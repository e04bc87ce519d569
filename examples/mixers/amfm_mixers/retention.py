"""Linear mixers whose decay is a constant of the head: retention and lightning attention.

Nothing decides what is forgotten but the head: rates are spread over heads, so that some look near and others far. They are
buffers and no parameters, computed in float64 for the heads of all ranks and cut for this one: a checkpoint does not hold
them, and any layout gives a head the same rate.

The one-dimensional pLSTM: linear attention with three gates per head.

The paper's model lives on directed graphs. On a line its recurrence is S_t = t_t S_(t-1) + s_t k_t v_t^T with
o_t = m_t S_t^T q_t, a decay recurrence: source and mark scale values and queries, and the transition is the decay.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.rope.op import qk_norm_rope, rope_frequencies
from amfm.model.config.mixer_options import HeadOptions
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.mixers.shared_layers import GatedHeadNorm
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_mixers.options import LightningOptions, RetentionOptions


class PlstmMixer(LinearMixer):
    """Three gates per head: source (what enters), transition (what stays), mark (what is read), all sigmoids.

    Source: Poeppel et al. 2025, arXiv 2506.11997, section 3, for a sequence: the graph of a line.
    """

    options: HeadOptions
    recurrence = DecayRecurrence()
    gates: ClassVar[tuple[str, ...]] = ("source", "transition", "mark")

    def __init__(self, options: HeadOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.gate_bias = nn.Parameter(torch.empty(len(self.gates), self.num_heads))
        self.shards["gate_bias"] = Shard((ShardSpec(1, "tp", (options.num_heads,)),))
        self.norm = GatedHeadNorm(self.value_dim, build)

    def parts(self) -> dict[str, Part]:
        """q, k, v and the three gates, each by head."""
        heads = self.options.num_heads
        keys = Part(heads * self.key_dim, heads)
        parts = {"q": keys, "k": keys, "v": Part(heads * self.value_dim, heads)}
        return parts | dict.fromkeys(self.gates, Part(heads, heads))

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; gates in float32 for bf16."""
        dtype = parts["q"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        source, transition, mark = (
            parts[name].to(wide) + bias for name, bias in zip(self.gates, self.gate_bias.to(wide))
        )
        q_BTHK = self.heads(parts["q"]) * (mark.sigmoid() * self.key_dim**-0.5).to(dtype)[..., None]
        v_BTHV = self.heads(parts["v"]) * source.sigmoid().to(dtype)[..., None]
        return ScanRows(q_BTHK, self.heads(parts["k"]), v_BTHV, functional.logsigmoid(transition))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o [B, T, H, V] by head -> [B, T, H V]."""
        return self.norm(o_BTHV, None)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Start gates half open for what enters and is read; transitions from 0.88 in the first head to 0.998 in the last."""
        if name != "gate_bias":
            return None
        bias = torch.zeros(shape)
        bias[self.gates.index("transition")] = torch.linspace(2.0, 6.0, shape[1])
        return bias


class ConstantDecayMixer(LinearMixer):
    """q, k, v and an output gate from one projection; the decay of each head is a buffer."""

    options: RetentionOptions | LightningOptions
    recurrence = DecayRecurrence()

    def __init__(self, options: RetentionOptions | LightningOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.norm = GatedHeadNorm(self.value_dim, build)
        self.log_decay_H: Tensor
        self.register_buffer("log_decay_H", torch.empty(self.num_heads, dtype=torch.float32), persistent=False)

    def parts(self) -> dict[str, Part]:
        """q, k, v, gate, each by head."""
        heads = self.options.num_heads
        keys, values = Part(heads * self.key_dim, heads), Part(heads * self.value_dim, heads)
        return {"q": keys, "k": keys, "v": values, "gate": values}

    def reset_buffers(self) -> None:
        """Compute the decays of this rank's heads, float32 on the device of the weights."""
        first = self.build.groups.tp.rank() * self.num_heads
        own = self.all_log_decays()[first : first + self.num_heads]
        self.log_decay_H = own.to(self.out_proj.weight.device, torch.float32)

    @abstractmethod
    def all_log_decays(self) -> Tensor:
        """Compute the logarithm of each head's decay, [heads of all ranks], float64."""

    def constant_rows(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> ScanRows:
        """Build scan rows with the constant decays, [H] expanded to [B, T, H] without a copy."""
        return ScanRows(q_BTHK, k_BTHK, v_BTHV, self.log_decay_H.expand(*q_BTHK.shape[:3]))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o by head, times the gate's SiLU."""
        return self.norm(o_BTHV, parts["gate"])


class RetentionMixer(ConstantDecayMixer):
    """Retention: rotary queries and keys, keys scaled by 1 / sqrt(K), head h decays by 1 - 2^(-5 - h) a token.

    Source: Sun et al. 2023, arXiv 2307.08621, sections 2.1 and 2.2; its heads' group norm is an RMSNorm here.
    """

    options: RetentionOptions

    def __init__(self, options: RetentionOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", torch.empty(self.key_dim // 2), persistent=False)

    def all_log_decays(self) -> Tensor:
        """log(1 - 2^(-5 - h))."""
        heads = torch.arange(self.options.num_heads, dtype=torch.float64)
        return torch.log1p(-torch.exp2(-5.0 - heads))

    def reset_buffers(self) -> None:
        """Compute decays and rotary frequencies, on the device of the weights."""
        super().reset_buffers()
        frequencies, _ = rope_frequencies(self.key_dim, theta=self.options.rope_theta)
        self.inverse_frequencies = frequencies.to(self.out_proj.weight.device)

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Rotate queries and keys; positions restart at documents, as the state does."""
        q_BTHK, k_BTHK = qk_norm_rope(
            self.heads(parts["q"]),
            self.heads(parts["k"]) * self.key_dim**-0.5,
            meta.positions_BT,
            self.inverse_frequencies,
            1.0,
            backend=self.build.backend,
        )
        return self.constant_rows(q_BTHK, k_BTHK, self.heads(parts["v"]))


class LightningMixer(ConstantDecayMixer):
    """Lightning attention: SiLU on q, k and v; head h of H decays by e^(-2^(-8 (h + 1) / H)), less in deeper layers.

    Source: Qin et al. 2024, arXiv 2401.04658, section 3; the factor 1 - layer / (layers - 1) of the exponent is that of
    MiniMax-01, arXiv 2501.08313, section 2.2.
    """

    def all_log_decays(self) -> Tensor:
        """-2^(-8 (h + 1) / H) (1 - order / (count - 1)), and never quite 0."""
        heads = torch.arange(1, self.options.num_heads + 1, dtype=torch.float64)
        depth = 1.0 - self.build.order / (self.build.count - 1 + 1e-5) + 1e-5
        return -torch.exp2(-8.0 * heads / self.options.num_heads) * depth

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time."""
        q, k, v = (functional.silu(self.heads(parts[name])) for name in ("q", "k", "v"))
        return self.constant_rows(q, k, v)
