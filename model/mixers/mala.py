"""Magnitude-aware linear attention, which is experimental in language models.

Dividing by the sum of weights, as linear attention does, cancels the length of the query. Here a token's weights are scaled
and shifted so that they sum to 1 and still sharpen with that length. One recurrence computes all sums: q k v, q k, the sum of
v and the count are entries of one enlarged state, which two queries a head read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amfm.model.config.mixer_options import FeatureMapOptions
from amfm.model.mixers.feature_maps import FeatureMapMixer, no_decay
from amfm.model.mixers.head_norm import GatedHeadNorm
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DecayRecurrence, OpenScan, ScanRows, ScanSettings
from amfm.model.packing import PackMeta


class MalaMixer(FeatureMapMixer):
    """o = (1 + 1 / Z) sum_j (q k_j) v_j - Z mean_j v_j with Z = q sum_j k_j over the document so far, then a norm a head.

    Weights of a token sum to 1, but some are negative and untrained ones reach tens: hence the norm, which the paper's
    vision models do without. The state has a row more than keys, for the sum of values, and a column more than values,
    for the sum of keys and the count; each token reads both from it.
    Source: Fan et al. 2025, arXiv 2507.00698, section 3.
    """

    def __init__(self, options: FeatureMapOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.recurrence = TwoReads()
        self.norm = GatedHeadNorm(self.value_dim, build)

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Features elu + 1; two queries per head, one for keys and one for the sums. Pointwise in time.

        In float32 for bf16: the output is a difference of two large numbers.
        """
        wide = torch.promote_types(parts["q"].dtype, torch.float32)
        q, k = (self.heads(parts[name]).to(wide) for name in ("q", "k"))
        q, k = self.placed(q, k, meta, "rope_before")
        q, k = functional.elu(q) + 1.0, functional.elu(k) + 1.0
        weighted, summed = functional.pad(q, (0, 1)), functional.pad(torch.zeros_like(q), (0, 1), value=1.0)
        k, v = (functional.pad(x, (0, 1), value=1.0) for x in (k, self.heads(parts["v"]).to(wide)))
        return ScanRows(torch.cat([weighted, summed], dim=2), k, v, no_decay(k))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Combine the two reads of each head, and norm the result."""
        weighted, summed = o_BTHV.chunk(2, dim=2)
        # The last column is Z in the first read and the number of tokens in the second.
        total = weighted[..., -1:]
        mean = summed[..., :-1] / summed[..., -1:]
        mixed = (1.0 + 1.0 / total) * weighted[..., :-1] - total * mean
        return self.norm(mixed.to(parts["v"].dtype), None)


class TwoReads(DecayRecurrence):
    """A decay recurrence whose state two queries read: q [B, T, 2 H, K], all first queries before all second ones."""

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scan once for each query; both outputs, [B, T, 2 H, V], and the one state."""
        first, second = (
            super(TwoReads, self).scan(rows._replace(q=q), how, state_BHKV) for q in rows.q.chunk(2, dim=2)
        )
        return torch.cat([first[0], second[0]], dim=2), first[1]

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """Scan once for each query; both outputs, and a read of both queries."""
        first, second = (
            super(TwoReads, self).scan_with_transfer(rows._replace(q=q), how) for q in rows.q.chunk(2, dim=2)
        )
        return OpenScan(
            torch.cat([first.o_BTHV, second.o_BTHV], dim=2),
            lambda state_BHKV: torch.cat([first.read(state_BHKV), second.read(state_BHKV)], dim=2),
            first.final_BHKV,
            first.transfer,
        )

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one token: both outputs [B, 2 H, V] and the one state."""
        first, second = (super(TwoReads, self).step(rows._replace(q=q), state_BHKV) for q in rows.q.chunk(2, dim=1))
        return torch.cat([first[0], second[0]], dim=1), first[1]

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Forward FLOPs per token: two more for each state number than with one read."""
        return super().flops(num_heads, key_dim, value_dim) + 2.0 * num_heads * key_dim * value_dim
