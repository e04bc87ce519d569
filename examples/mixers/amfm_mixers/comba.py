"""Comba: Gated DeltaNet that feeds back less than it writes, and reads with a correction.

In terms of control the delta rule is feedback: what the state returns for a key is subtracted from what is written. Comba scales that
feedback by a learned b of each head, S <- e^g S, then S <- S + beta k (v - b S^T k)^T, and reads with q - D b k, so that a token's own
write does not pass through the state alone. With b between 0 and 1 that is the delta rule of strength beta b that writes v / b.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amfm.model.mixers.delta import GatedDeltaNetMixer, unit_length
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import ScanRows
from amfm.model.mixers.shared_layers import GatedHeadNorm
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_mixers.options import CombaOptions


class CombaMixer(GatedDeltaNetMixer):
    """Gated DeltaNet with feedback b = sigmoid(feedback_logit) and queries of unit length along q - D b k, one number per head each.

    The output gate is a sigmoid. Source: Hu et al. 2025, arXiv 2506.02475, section 3.
    """

    options: CombaOptions  # type: ignore[assignment]

    def __init__(self, options: CombaOptions, build: BuildContext) -> None:
        super().__init__(options, build)  # type: ignore[arg-type]
        by_head = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
        self.feedback_logit = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.shards |= {"feedback_logit": by_head, "D": by_head}
        self.norm = GatedHeadNorm(self.value_dim, build, act="sigmoid")

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; what scales keys, values and beta in float32 for bf16."""
        found = super().rows(parts, meta)
        q_BTHK, k_BTHK = self.heads(parts["q"]), self.heads(parts["k"])
        assert found.beta is not None, "Gated DeltaNet has a beta"
        wide = found.beta.dtype
        b_H1 = self.feedback_logit.to(wide).sigmoid()[:, None]
        q_BTHK = (q_BTHK.to(wide) - self.D.to(wide)[:, None] * b_H1 * k_BTHK.to(wide)).to(q_BTHK.dtype)
        v = (found.v.to(wide) / b_H1).to(found.v.dtype)
        q_BTHK = unit_length(q_BTHK) * self.key_dim**-0.5
        return found._replace(q=q_BTHK, v=v, beta=found.beta * b_H1[:, 0])

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Start b at sigmoid(1), and D at the option `correction`."""
        first = {"feedback_logit": 1.0, "D": self.options.correction}
        return torch.full(shape, first[name]) if name in first else super().init_parameter(name, shape, generator)
