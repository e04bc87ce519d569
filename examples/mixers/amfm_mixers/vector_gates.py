"""Linear mixers that forget by a gate of each key channel: GLA, LightNet and Gated DeltaNet-2.

The state's row of a key channel is multiplied by the channel's gate in (0, 1) at each token. Gates are carried as logarithms
in float32: the scan adds them over a chunk, where products of gates would underflow.

LightNet's additive decay: keys are shares of a running softmax over the document so far. A token's key is e^(k_t) over the
sum of e^(k_j) up to it, and the state is decayed by the ratio of the old sum to the new one, which keeps the shares of all
earlier tokens up to date. So the state is a weighted mean of values, and the decay follows from the keys without its own
projection. The sum is carried as its logarithm z in float32, because e^k overflows.

Gated DeltaNet-2 is Kimi Delta Attention with vectors in place of beta: one says which key channels erase what the state
holds, one which value channels are written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.linear.op import linear
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.delta import KdaMixer
from amfm.model.mixers.interface import BuildContext, MixerState
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.mixers.shared_layers import GatedHeadNorm
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_mixers.options import GlaOptions, LightNetOptions

# Tokens over which a running softmax is summed by doubling, before blocks are joined.
BLOCK_TOKENS = 64


class LightNetMixer(LinearMixer):
    """With z_t = log(e^(k_1) + ... + e^(k_t)) a key channel: key e^(k_t - z_t), decay e^(z_(t-1) - z_t), low-rank gate.

    Source: Qin et al. 2024, arXiv 2405.21022, section 4.
    """

    options: LightNetOptions
    recurrence = DecayRecurrence()

    def __init__(self, options: LightNetOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        by_head = ShardSpec(0, "tp", (options.num_heads * self.value_dim,), (options.num_heads,))
        self.gate_proj = nn.Parameter(torch.empty(self.num_heads * self.value_dim, options.gate_rank))
        self.shards["gate_proj"] = Shard((by_head,))
        self.norm = GatedHeadNorm(self.value_dim, build)

    def parts(self) -> dict[str, Part]:
        """q, k, v by head; the inside of the gate's projection whole."""
        heads = self.options.num_heads
        keys = Part(heads * self.key_dim, heads)
        parts = {"q": keys, "k": keys, "v": Part(heads * self.value_dim, heads)}
        return parts | {"low_rank": Part(self.options.gate_rank, None)}

    def accumulate(self, parts: dict[str, Tensor], meta: PackMeta, state: MixerState | None) -> MixerState:
        """Add z of each token as part `z` and of the token before as `z_before`; returns the last z for the state."""
        k_BTX = parts["k"]
        z_BTX = documents_logcumsumexp(k_BTX.to(torch.promote_types(k_BTX.dtype, torch.float32)), meta.boundaries_BT())
        entered_BX = z_BTX.new_full(z_BTX[:, 0].shape, -torch.inf) if state is None else state["z"].to(z_BTX.dtype)
        if state is not None:
            z_BTX = torch.logaddexp(z_BTX, entered_BX[:, None])
        before_BTX = torch.cat([entered_BX[:, None], z_BTX[:, :-1]], dim=1)
        if meta.boundaries_BT() is not None:
            is_new_BT = functional.pad(meta.document_ids_BT.diff(dim=1) != 0, (1, 0))
            before_BTX = before_BTX.masked_fill(is_new_BT[..., None], -torch.inf)
        parts["z"], parts["z_before"] = z_BTX, before_BTX
        return {"z": z_BTX[:, -1]}

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Gates in float32 for bf16. Before a document's first token there is nothing to forget."""
        q_BTX, z_BTX, before_BTX = functional.silu(parts["q"]), parts["z"], parts["z_before"]
        g_BTX = torch.where(before_BTX.isinf(), z_BTX, before_BTX) - z_BTX
        k_BTX = (parts["k"].to(z_BTX.dtype) - z_BTX).exp().to(q_BTX.dtype)
        return ScanRows(self.heads(q_BTX), self.heads(k_BTX), self.heads(parts["v"]), self.heads(g_BTX).clamp(max=0.0))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o by head, times the low-rank gate's SiLU."""
        return self.norm(o_BTHV, linear(parts["low_rank"], self.gate_proj))

    def empty_state(self, num_rows: int) -> MixerState:
        """Build the base class's state and z of no tokens, minus infinity."""
        state = super().empty_state(num_rows)
        shape = (num_rows, self.num_heads * self.key_dim)
        return state | {"z": torch.full(shape, -torch.inf, device=state["state"].device)}


def documents_logcumsumexp(x_BTX: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Compute the log of the sum of e^x over the document up to each token, [B, T, X].

    First within blocks of tokens, then over the blocks' last tokens, whose sums enter the next block: a token costs the same
    in rows of any length. Ids differ between all documents of a row.
    """
    num_tokens = x_BTX.shape[1]
    if num_tokens <= BLOCK_TOKENS:
        return _by_doubling(x_BTX, document_ids_BT)
    padding = -num_tokens % BLOCK_TOKENS
    x_BLQX = functional.pad(x_BTX, (0, 0, 0, padding)).unflatten(1, (-1, BLOCK_TOKENS))
    ids_BLQ = None
    if document_ids_BT is not None:
        ids_BLQ = functional.pad(document_ids_BT, (0, padding), value=-1).unflatten(1, (-1, BLOCK_TOKENS))
    inside_BLQX = _by_doubling(x_BLQX.flatten(0, 1), None if ids_BLQ is None else ids_BLQ.flatten(0, 1)).view_as(x_BLQX)
    ends_BL = None if ids_BLQ is None else ids_BLQ[:, :-1, -1]
    entering_BLX = documents_logcumsumexp(inside_BLQX[:, :-1, -1], ends_BL)[:, :, None]
    if ids_BLQ is not None and ends_BL is not None:
        entering_BLX = torch.where((ids_BLQ[:, 1:] == ends_BL[..., None])[..., None], entering_BLX, -torch.inf)
    later_BLQX = torch.logaddexp(inside_BLQX[:, 1:], entering_BLX)
    return torch.cat([inside_BLQX[:, :1], later_BLQX], dim=1).flatten(1, 2)[:, :num_tokens]


def _by_doubling(x_BTX: Tensor, document_ids_BT: Tensor | None) -> Tensor:
    """Compute `documents_logcumsumexp` in log2(T) rounds over all tokens: round r adds the sum that ends 2^r before."""
    num_tokens, shift = x_BTX.shape[1], 1
    while shift < num_tokens:
        earlier_BTX = functional.pad(x_BTX[:, :-shift], (0, 0, shift, 0), value=-torch.inf)
        if document_ids_BT is not None:
            is_other_BT = document_ids_BT != functional.pad(document_ids_BT[:, :-shift], (shift, 0), value=-1)
            earlier_BTX = earlier_BTX.masked_fill(is_other_BT[..., None], -torch.inf)
        x_BTX = torch.logaddexp(x_BTX, earlier_BTX)
        shift *= 2
    return x_BTX


# A gate is divided by it, so that it starts near 1 (Yang et al. 2023, section 4.4).
GLA_GATE_DIVISOR = 16.0


class GlaMixer(LinearMixer):
    """Gated linear attention: a decay a key channel from a low-rank projection, an output gate.

    g = logsigmoid(W2 W1 x + b) / 16. Source: Yang et al. 2023, arXiv 2312.06635, section 4.4.
    """

    options: GlaOptions
    recurrence = DecayRecurrence()

    def __init__(self, options: GlaOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        width = self.num_heads * self.key_dim
        by_head = ShardSpec(0, "tp", (options.num_heads * self.key_dim,), (options.num_heads,))
        self.gate_proj = nn.Parameter(torch.empty(width, options.gate_rank))
        self.gate_bias = nn.Parameter(torch.empty(width))
        self.shards |= {"gate_proj": Shard((by_head,)), "gate_bias": Shard((by_head,))}
        self.norm = GatedHeadNorm(self.value_dim, build)

    def parts(self) -> dict[str, Part]:
        """q, k, v, the output gate by head; the inside of the decay's projection whole."""
        heads = self.options.num_heads
        keys, values = Part(heads * self.key_dim, heads), Part(heads * self.value_dim, heads)
        return {"q": keys, "k": keys, "v": values, "gate": values, "low_rank": Part(self.options.gate_rank, None)}

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; the decay in float32 for bf16."""
        logits_BTX = linear(parts["low_rank"], self.gate_proj)
        wide = torch.promote_types(logits_BTX.dtype, torch.float32)
        g_BTX = functional.logsigmoid(logits_BTX.to(wide) + self.gate_bias.to(wide)) / GLA_GATE_DIVISOR
        q_BTHK = self.heads(parts["q"]) * self.key_dim**-0.5
        return ScanRows(q_BTHK, self.heads(parts["k"]), self.heads(parts["v"]), self.heads(g_BTX))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o by head, times the gate's SiLU."""
        return self.norm(o_BTHV, parts["gate"])

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Start the gate's bias at 0."""
        return torch.zeros(shape) if name == "gate_bias" else None


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
