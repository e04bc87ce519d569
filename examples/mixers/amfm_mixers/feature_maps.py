"""Linear mixers without decay that put queries and keys through a positive feature map: TransNormer and Hedgehog.

With features phi, attention's weight exp(q k) becomes phi(q) phi(k), and the sum over tokens is the state
S = sum phi(k) v^T (Katharopoulos et al. 2020, arXiv 2006.16236, section 3). Positive features keep all weights positive, so
that dividing by their sum is safe; TransNormer norms the output of a head in place of it. Both use the decay recurrence with
a log decay of 0.

Nothing here tells near from far. Rotary positions can. Before the features they keep weights positive, and a shift of the
text changes them a little. After the features weights are exact functions of the distance (Su et al. 2021, arXiv 2104.09864,
section 3.3), and some are negative, so that only a norm may follow.

Magnitude-aware linear attention, which is experimental in language models.

Dividing by the sum of weights, as linear attention does, cancels the length of the query. Here a token's weights are scaled
and shifted so that they sum to 1 and still sharpen with that length. One recurrence computes all sums: q k v, q k, the sum of
v and the count are entries of one enlarged state, which two queries a head read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.rope.op import qk_norm_rope, rope_frequencies
from amfm.model.mixers.base import LinearMixer, Part, no_decay, query_key_value
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import DecayRecurrence, OpenScan, Recurrence, ScanRows, ScanSettings
from amfm.model.mixers.shared_layers import GatedHeadNorm
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_mixers.options import FeatureMapOptions


class FeatureMapMixer(LinearMixer):
    """q, k and v by head, and rotary positions of queries and keys where the options have them."""

    options: FeatureMapOptions
    recurrence: Recurrence = DecayRecurrence()

    def __init__(self, options: FeatureMapOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.inverse_frequencies: Tensor | None
        self.register_buffer("inverse_frequencies", None, persistent=False)

    def parts(self) -> dict[str, Part]:
        """q, k, v, each by head."""
        return query_key_value(self.options)

    def reset_buffers(self) -> None:
        """Compute the rotary frequencies, on the device of the weights."""
        if self.options.positions != "none":
            frequencies, _ = rope_frequencies(self.key_dim, theta=self.options.rope_theta)
            self.inverse_frequencies = frequencies.to(self.out_proj.weight.device)

    def placed(self, q_BTHK: Tensor, k_BTHK: Tensor, meta: PackMeta, where: str) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions if the options rotate there, `rope_before` or `rope_after` the features."""
        if self.options.positions != where:
            return q_BTHK, k_BTHK
        return qk_norm_rope(
            q_BTHK, k_BTHK, meta.positions_BT, self.inverse_frequencies, 1.0, backend=self.build.backend
        )


class TransNormerMixer(FeatureMapMixer):
    """Features elu + 1 and a norm of each head's output where linear attention divides by the sum of its weights.

    Source: Qin et al. 2022, arXiv 2210.10340, section 3.2; its block-local softmax in early layers is the mixer `W`.
    """

    def __init__(self, options: FeatureMapOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.norm = GatedHeadNorm(self.value_dim, build)

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time."""
        q, k = self.placed(self.heads(parts["q"]), self.heads(parts["k"]), meta, "rope_before")
        q, k = functional.elu(q) + 1.0, functional.elu(k) + 1.0
        q, k = self.placed(q, k, meta, "rope_after")
        return ScanRows(q, k, self.heads(parts["v"]), no_decay(q))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o [B, T, H, V] by head -> [B, T, H V]."""
        return self.norm(o_BTHV, None)


class HedgehogMixer(FeatureMapMixer):
    """Learned features [softmax(W x), softmax(-W x)] a head, each side its own W; weights that sum to 1.

    The sum of weights is the last channel of the state's values: v gets a column of ones.
    Source: Zhang et al. 2024, arXiv 2402.04347, section 4.1.
    """

    def __init__(self, options: FeatureMapOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        by_head = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
        shape = (self.num_heads, self.key_dim, self.key_dim)
        self.query_features = nn.Parameter(torch.empty(shape))
        self.key_features = nn.Parameter(torch.empty(shape))
        self.shards |= {"query_features": by_head, "key_features": by_head}

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; softmax in float32 for bf16."""
        q, k = self.placed(self.heads(parts["q"]), self.heads(parts["k"]), meta, "rope_before")
        q, k = self._features(q, self.query_features), self._features(k, self.key_features)
        v = functional.pad(self.heads(parts["v"]), (0, 1), value=1.0)
        return ScanRows(q, k, v, no_decay(q))

    def _features(self, x_BTHK: Tensor, weight_HKK: Tensor) -> Tensor:
        """Map queries or keys [B, T, H, K] to positive features [B, T, H, 2 K], in the dtype of x."""
        mapped = torch.einsum("bthk,hjk->bthj", x_BTHK, weight_HKK)
        wide = mapped.to(torch.promote_types(mapped.dtype, torch.float32))
        return torch.cat([wide.softmax(-1), (-wide).softmax(-1)], dim=-1).to(x_BTHK.dtype)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Divide the weighted values by the sum of weights, the last channel, which is positive."""
        return (o_BTHV[..., :-1] / o_BTHV[..., -1:]).flatten(-2)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Start the feature matrices as identities: features of the queries and keys themselves."""
        return torch.eye(shape[-1]).expand(shape).clone() if name.endswith("features") else None


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
