"""HGRN2, a linear mixer that forgets by a gate of each key channel.

The state's row of a key channel is multiplied by the channel's gate in (0, 1) at each token. Gates are carried as logarithms
in float32: the scan adds them over a chunk, where products of gates would underflow. Key and gate are tied: what is
forgotten makes room for what is written (key = 1 - gate), which saves a projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.model.config.mixer_options import Hgrn2Options
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.mixers.shared_layers import GatedHeadNorm
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec

# The least share of the state that the first block keeps when training begins.
FIRST_BOUND = 1 / 64


class Hgrn2Mixer(LinearMixer):
    """HGRN2: a forget gate f a key channel with a lower bound that rises with depth, and 1 - f as the key.

    f = bound + (1 - bound) sigmoid(W x). Source: Qin et al. 2024, arXiv 2404.07904, section 3. The paper's bounds are
    cumulative shares of one parameter over all layers, which would tie every pipeline stage to all others; here each block
    has its own, which begins at its share of the depth.
    """

    options: Hgrn2Options
    recurrence = DecayRecurrence()

    def __init__(self, options: Hgrn2Options, build: BuildContext) -> None:
        super().__init__(options, build)
        by_head = ShardSpec(0, "tp", (options.num_heads * self.key_dim,), (options.num_heads,))
        self.bound_logit = nn.Parameter(torch.empty(self.num_heads * self.key_dim))
        self.shards["bound_logit"] = Shard((by_head,))
        self.norm = GatedHeadNorm(self.value_dim, build)

    def parts(self) -> dict[str, Part]:
        """q, the forget gate, v, each by head."""
        heads = self.options.num_heads
        keys = Part(heads * self.key_dim, heads)
        return {"q": keys, "forget": keys, "v": Part(heads * self.value_dim, heads)}

    def convolved(self) -> tuple[str, ...]:
        """Name all parts."""
        return ("q", "forget", "v")

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; the gate in float32 for bf16, as a logarithm, so that no gate is quite closed."""
        q_BTX = parts["q"] if self.conv is not None else functional.silu(parts["q"])
        wide = torch.promote_types(q_BTX.dtype, torch.float32)
        bound = self.bound_logit.to(wide)
        forget_BTX = functional.logsigmoid(parts["forget"].to(wide)) + functional.logsigmoid(-bound)
        g_BTX = torch.logaddexp(functional.logsigmoid(bound), forget_BTX)
        k_BTX = -torch.expm1(g_BTX)
        return ScanRows(self.heads(q_BTX), self.heads(k_BTX.to(q_BTX.dtype)), self.heads(parts["v"]), self.heads(g_BTX))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o [B, T, H, V] by head -> [B, T, H V]."""
        return self.norm(o_BTHV, None)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Start the bounds at this block's share of the depth, in all channels."""
        if name != "bound_logit":
            return None
        bound = max(FIRST_BOUND, self.build.order / self.build.count)
        return torch.logit(torch.full(shape, bound))
