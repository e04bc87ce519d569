"""Forgetting attention: softmax attention whose scores fade by forget gates that data decides.

Between a query at i and a key at j, the score has the sum of log f over the tokens after j up to i, c_i - c_j with c the running sum
of the document. c_i is the same for all keys of a query, so softmax does not see it: what is left is -c_j, one more channel
of a key that queries multiply by 1. So every attention kernel computes it, and no matrix of pairs is needed. In few bits
a number of c is three channels, the rounded value and what rounding left, twice: their products with 1 are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amfm.kernels.rope.op import qk_norm_rope
from amfm.model.mixers.attention import attend
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.mixers.shared_layers import HeadNorm, gate_heads, gate_projection
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import gather_rows
from amfm.model.parallel.layers import ColumnLinear, RowLinear, project_layers
from amfm.model.parallel.shards import divide, divide_units
from amfm_mixers.options import FoxOptions

# Kernels take heads of multiples of this.
CHANNELS = 16


class FoxMixer(SequenceMixer):
    """Causal grouped-query attention without positions, o_i = softmax over j of (q_i k_j / sqrt(K) + c_i - c_j) v_j.

    c is the sum of log sigmoid(W_f x + b_f) of a query head over the document so far, in float32 for bf16. The decode state has keys,
    values and c of all tokens. Context ranks gather all three. Source: Lin et al. 2025, arXiv 2503.02130, section 3.
    """

    def __init__(self, options: FoxOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        groups, hidden, size, name = build.groups, build.hidden_size, options.head_dim, "model.mixers.fox.num_heads"
        heads, kv_heads = options.num_heads, options.kv_heads()
        self.num_heads = divide(heads, groups, name)
        self.num_kv_heads = divide_units(kv_heads, groups, "model.mixers.fox.num_kv_heads")
        widths, units = (heads * size, kv_heads * size, kv_heads * size), (heads, kv_heads, kv_heads)
        self.in_proj = ColumnLinear(hidden, widths, groups, name=name, units=units)
        self.f_proj = ColumnLinear(hidden, (heads,), groups, name=name, units=(heads,), bias=True)
        self.g_proj = gate_projection(options.gate, hidden, heads, size, groups, name=name)
        self.out_proj = RowLinear(heads * size, hidden, groups, name=name)
        self.q_norm = HeadNorm(size) if options.qk_norm else None
        self.k_norm = HeadNorm(size) if options.qk_norm else None

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state the tokens also see its keys, and the longer state is returned."""
        groups = self.build.groups
        layers = [self.in_proj, self.f_proj, *([] if self.g_proj is None else [self.g_proj])]
        projected_BTX, forget_BTH, *gate_BTX = project_layers(x_BTD, layers, groups)
        q_BTHK, k_BSJK, v_BSJK = self._heads(projected_BTX, meta)
        wide = torch.promote_types(forget_BTH.dtype, torch.float32)
        log_BTH = functional.logsigmoid(forget_BTH.to(wide))
        following: MixerState | None = None
        if meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            (log_BSH,) = gather_rows(log_BTH.unsqueeze(0), meta.segments, groups)
            sums_BSH = meta.segments.take(sum_in_documents(log_BSH, meta.segments.document_ids_BT))
        else:
            sums_BSH = sum_in_documents(log_BTH, meta.boundaries_BT())
        if state is not None:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            before_BSH = state["sums"]
            if before_BSH.shape[1]:
                sums_BSH = sums_BSH + before_BSH[:, -1:]
            k_BSJK, v_BSJK = (torch.cat([state[key], new], dim=1) for key, new in (("k", k_BSJK), ("v", v_BSJK)))
            sums_BSH = torch.cat([before_BSH.to(wide), sums_BSH], dim=1)
            following = {"k": k_BSJK, "v": v_BSJK, "sums": sums_BSH}
        o_BTHK = self._attend(q_BTHK, k_BSJK, v_BSJK, sums_BSH, meta)
        if gate_BTX:
            o_BTHK = gate_heads(o_BTHK, gate_BTX[0])
        return MixerOutput(self.out_proj.leave(o_BTHK.flatten(-2), groups), following)

    def _heads(self, projected_BTX: Tensor, meta: PackMeta) -> tuple[Tensor, Tensor, Tensor]:
        """Split the projection into q [B, T, H, K], k and v [B, T, J, K]; q and k normed where set."""
        size = self.options.head_dim
        widths = [self.num_heads * size, self.num_kv_heads * size, self.num_kv_heads * size]
        q_BTHK, k_BTJK, v_BTJK = (part.unflatten(-1, (-1, size)) for part in projected_BTX.split(widths, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            weights = {"q_weight_K": self.q_norm.weight, "k_weight_K": self.k_norm.weight}
            epsilon, backend = self.build.norm_epsilon, self.build.backend
            q_BTHK, k_BTJK = qk_norm_rope(
                q_BTHK, k_BTJK, meta.positions_BT, None, 1.0, **weights, epsilon=epsilon, backend=backend
            )
        return q_BTHK, k_BTJK, v_BTJK

    def _attend(self, q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, sums_BSH: Tensor, meta: PackMeta) -> Tensor:
        """Attend, with sums of forget gates in further channels of keys: those of all heads that share one."""
        size, dtype = self.options.head_dim, k_BSJK.dtype
        scale, shared = size**-0.5, self.num_heads // self.num_kv_heads
        forgotten_BSJX = split_exactly(sums_BSH.unflatten(-1, (self.num_kv_heads, shared)) / -scale, dtype)
        # A head multiplies its own sums by 1, and those of the heads next to it by 0.
        own_HR = torch.eye(shared, dtype=dtype, device=q_BTHK.device).repeat(self.num_kv_heads, 1)
        own_HX = own_HR.repeat(1, forgotten_BSJX.shape[-1] // shared)
        q = torch.cat([q_BTHK, own_HX.expand(*q_BTHK.shape[:2], -1, -1)], dim=-1)
        k = torch.cat([k_BSJK, forgotten_BSJX], dim=-1)
        q, k = (functional.pad(x, (0, -x.shape[-1] % CHANNELS)) for x in (q, k))
        v = functional.pad(v_BSJK, (0, k.shape[-1] - size))
        return attend(q, k, v, meta, self.build.groups, scale=scale, backend=self.build.backend)[..., :size]

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """The bias of forget gates begins at 0."""
        return torch.zeros(shape) if name.endswith(".bias") else None

    def empty_state(self, num_rows: int) -> MixerState:
        """Build the state before the first token: no keys, values [B, 0, J, K] and sums [B, 0, H]."""
        weight = self.out_proj.weight
        empty = weight.new_zeros(num_rows, 0, self.num_kv_heads, self.options.head_dim)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return {"k": empty, "v": empty, "sums": weight.new_zeros(num_rows, 0, self.num_heads, dtype=wide)}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of two products with the keys that it sees on average in a row of this length, and their sums."""
        return (sequence_length + 1) * self.num_heads * (2 * self.options.head_dim + 1.0)


def sum_in_documents(x_BTH: Tensor, ids_BT: Tensor | None) -> Tensor:
    """Sum x [B, T, H] over the tokens of the document up to each one; in log2 T steps of pairs, so that no other document rounds it."""
    tokens, reach = x_BTH.shape[1], 1
    while reach < tokens:
        before_BTH = functional.pad(x_BTH[:, :-reach], (0, 0, reach, 0))
        if ids_BT is not None:
            is_same_BT = functional.pad(ids_BT[:, reach:] == ids_BT[:, :-reach], (reach, 0))
            before_BTH = before_BTH.masked_fill(~is_same_BT[..., None], 0.0)
        x_BTH, reach = x_BTH + before_BTH, 2 * reach
    return x_BTH


def split_exactly(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [..., R] as channels [..., X] of a dtype that products of few bits leave exact: R of float64, else 3 R of bf16.

    Their sum is x to 24 bits. The gradient goes through the first; all channels have the same.
    """
    if dtype == torch.float64:
        return x
    rest, channels = x.detach(), []
    for _ in range(3):
        part = rest.to(torch.bfloat16).to(x.dtype)
        channels.append(part.to(dtype))
        rest = rest - part
    # A gradient through the rounding would be rounded with it.
    channels[0] = channels[0] + (x - x.detach()).to(dtype)
    return torch.cat(channels, dim=-1)
