"""Relative positions of Music Transformer (Huang et al. 2018, arXiv 1809.04281); see the README for the formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.layers import ColumnLinear, RowLinear
from amfm.model.parallel.regions import leave_tensor_region, project_stream
from amfm.model.parallel.shards import Shard, ShardSpec, divide
from amfm_relative_attention.spec import RelativeAttentionOptions

MAX_TOKENS = 4096  # scores of all pairs are kept for the backward pass


class RelativeAttentionMixer(SequenceMixer):
    """softmax((q_i k_j + q_i R_(i-j)) / sqrt(K)) v inside each document; every rank of `groups.tp` must call it."""

    def __init__(self, options: RelativeAttentionOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        heads, width = options.num_heads, options.num_heads * options.head_dim
        self.num_heads = divide(heads, build.groups, "num_heads")
        self.in_proj = ColumnLinear(build.hidden_size, (width,) * 3, build.groups, name="num_heads", units=(heads,) * 3)
        self.distance_vectors = nn.Parameter(torch.empty(self.num_heads, options.max_distance, options.head_dim))
        self.shards = {"distance_vectors": Shard((ShardSpec(0, "tp", (heads,)),))}
        self.out_proj = RowLinear(width, build.hidden_size, build.groups, name="num_heads")

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D]; with a state the tokens also see its keys. Raises ValueError for more than MAX_TOKENS keys."""
        (projected_BTX,) = project_stream(x_BTD, [self.in_proj.weight], self.build.groups)
        q_BTHK, k_BSHK, v_BSHK = (part.unflatten(-1, (self.num_heads, -1)) for part in projected_BTX.chunk(3, dim=-1))
        following: MixerState | None = None
        if state is not None:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            k_BSHK, v_BSHK = torch.cat([state["k"], k_BSHK], dim=1), torch.cat([state["v"], v_BSHK], dim=1)
            following = {"k": k_BSHK, "v": v_BSHK}
        if k_BSHK.shape[1] > MAX_TOKENS:
            raise ValueError(
                f"relative_attention got sequences of {k_BSHK.shape[1]} tokens and takes {MAX_TOKENS}: it keeps the scores of all "
                "pairs; shorten train.sequence_length, or use attention with positions: rope"
            )
        o_BTHK = self._attend(q_BTHK, k_BSHK, v_BSHK, meta.boundaries_BT())
        return MixerOutput(leave_tensor_region(self.out_proj(o_BTHK.flatten(-2)), self.build.groups), following)

    def _attend(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, ids_BT: Tensor | None) -> Tensor:
        """The last T of the S keys are those of the queries; softmax in float32 at least."""
        queries, keys = q_BTHK.shape[1], k_BSHK.shape[1]
        row_T = torch.arange(keys - queries, keys, device=q_BTHK.device)
        distance_TS = row_T[:, None] - torch.arange(keys, device=q_BTHK.device)
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK).to(wide)
        # Of each query what it says to every distance, then to the distance of each key.
        by_distance_BHTW = torch.einsum("bthk,hwk->bhtw", q_BTHK, self.distance_vectors).to(wide)
        place_TS = distance_TS.clamp(0, self.options.max_distance - 1)
        scores_BHTS = scores_BHTS + by_distance_BHTW.gather(-1, place_TS.expand_as(scores_BHTS))
        seen_BTS = (distance_TS >= 0)[None]
        if ids_BT is not None:
            seen_BTS = seen_BTS & (ids_BT[:, :, None] == ids_BT[:, None, :])
        scores_BHTS = (scores_BHTS * self.options.head_dim**-0.5).masked_fill(~seen_BTS[:, None], -torch.inf)
        return torch.einsum("bhts,bshk->bthk", scores_BHTS.softmax(-1).to(v_BSHK.dtype), v_BSHK)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Distances begin alike: a vector of zeros each."""
        return torch.zeros(shape) if name == "distance_vectors" else None

    def empty_state(self, num_rows: int) -> MixerState:
        """No keys and no values yet, [B, 0, H, K]; it grows with the text."""
        empty = self.out_proj.weight.new_zeros(num_rows, 0, self.num_heads, self.options.head_dim)
        return {"k": empty, "v": empty}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of two products with half of a row's keys, and one with the vectors of all distances."""
        vectors = (sequence_length + 1) + self.options.max_distance
        return 2.0 * vectors * self.num_heads * self.options.head_dim
