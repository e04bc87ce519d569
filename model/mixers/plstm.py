"""The one-dimensional pLSTM: linear attention with three gates per head.

The paper's model lives on directed graphs. On a line its recurrence is S_t = t_t S_(t-1) + s_t k_t v_t^T with
o_t = m_t S_t^T q_t, a decay recurrence: source and mark scale values and queries, and the transition is the decay.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.model.config.mixer_options import HeadOptions
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.head_norm import GatedHeadNorm
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec


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
