"""SeqBoat (Ren et al. 2023, arXiv 2306.11197): a gated attention unit for the tokens that ask for it; formulas in the README.

Active tokens of a row are moved to its front, in time, so that attention computes a short row and not a mask. How many
there are is data; the length of the short row is not: `capacity` sets it. What is after the active tokens there is its
own document, and does not come back.

Tensor ranks: values and gates are cut by channel. All else is computed by every rank, of which each adds 1 / ranks to the
stream, so that what it computes has a part of the gradient, as the unit's projections have. Context ranks: averages pass as
states do; each segment shows its last window - 1 active tokens to all ranks, and how many it has.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.linear.op import linear
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import gather_rows
from amfm.model.parallel.layers import ColumnLinear, RowLinear
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region
from amfm.model.parallel.shards import Shard, divide
from amfm.model.segments import Segments
from amfm_seqboat.averages import average, first_rates
from amfm_seqboat.spec import SeqBoatOptions
from amfm_seqboat.window import attend_near

EMPTY = -1  # the id of a slot without a token


class Active(NamedTuple):
    """Places of a row's active tokens, in time [B, C]; whether there is one there [B, C]; the probability of each token
    [B, T]; the share of all tokens that asked."""

    place_BC: Tensor
    is_there_BC: Tensor
    probability_BT: Tensor
    asked: Tensor


class SeqBoatMixer(SequenceMixer):
    """m = silu(averages of x), [choice; h] = W m; y = h + p W_o (r (attention of z) v) where p > 1/2, else y = h."""

    def __init__(self, options: SeqBoatOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        hidden, size, groups = build.hidden_size, options.head_dim, build.groups
        self.inner = divide(options.inner_size, groups, "model.mixers.seqboat.inner_size")
        self.log_rates, self.shares = (nn.Parameter(torch.empty(hidden, options.averages)) for _ in range(2))
        self.h_proj = nn.Parameter(torch.empty(hidden, hidden))
        self.router = nn.Parameter(torch.empty(2, hidden))
        self.temperature = nn.Parameter(torch.empty(1))
        self.z_proj = nn.Parameter(torch.empty(size, hidden))
        self.z_scale, self.z_offset = (nn.Parameter(torch.empty(2, size)) for _ in range(2))
        self.places = nn.Parameter(torch.empty(options.window))
        self.shards = {name: Shard(partial=("tp",)) for name, _ in self.named_parameters()}
        inner = options.inner_size
        self.in_proj = ColumnLinear(hidden, (inner, inner), groups, name="inner_size")
        self.out_proj = RowLinear(inner, hidden, groups, name="inner_size")

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D]; with a state it continues from there and returns the next one."""
        assert state is None or isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
        groups, segments = self.build.groups, meta.segments
        x_BTD = enter_tensor_region(x_BTD, groups)
        averaged_BTD, averages = average(
            x_BTD,
            self.log_rates,
            self.shares,
            meta,
            groups,
            state_BCN=None if state is None else state["averages"],
            chunk_size=self.options.chunk_size,
            backend=self.build.backend,
        )
        m_BTD, ids_BT = functional.silu(averaged_BTD), meta.document_ids_BT
        if segments is not None:  # rows of their own
            m_BTD, ids_BT = segments.as_rows(m_BTD), segments.as_rows(ids_BT)
        h_BTD = linear(m_BTD, self.h_proj)
        active = self.choose(m_BTD, segments, decodes=state is not None)
        chosen_BCD = m_BTD.gather(1, active.place_BC[..., None].expand(-1, -1, m_BTD.shape[-1]))
        q_BCK, k_BCK, v_BCE, r_BCE = self.unit(chosen_BCD)
        following: MixerState | None = None
        if state is None:
            ids_BC = torch.where(active.is_there_BC, ids_BT.gather(1, active.place_BC), EMPTY)
            past = self.empty_past(len(ids_BC)) if segments is None else self.past(k_BCK, v_BCE, ids_BC, segments)
            o_BCE, _ = self.attend(q_BCK, k_BCK, v_BCE, ids_BC, past)
        else:
            ids_BC = torch.where(active.is_there_BC, 0, EMPTY)
            slot_W = torch.arange(1 - self.options.window, 0, device=ids_BC.device)
            ids_BW = torch.where(slot_W < -state["count"][:, None], EMPTY, 0)
            o_BCE, last = self.attend(q_BCK, k_BCK, v_BCE, ids_BC, (state["k"], state["v"], ids_BW))
            count = state["count"] + active.is_there_BC.sum(1)
            following = {"averages": averages, "k": last[0], "v": last[1], "count": count}
        found_BCD = self.out_proj(r_BCE * o_BCE)
        share_BC = active.probability_BT.gather(1, active.place_BC) * active.is_there_BC
        place_BCD = active.place_BC[..., None].expand_as(found_BCD)
        part_BTD = h_BTD if groups.tp.size() == 1 else h_BTD / groups.tp.size()
        part_BTD = part_BTD.scatter_add(1, place_BCD, found_BCD * share_BC[..., None].to(found_BCD.dtype))
        y_BTD = leave_tensor_region(part_BTD.reshape(x_BTD.shape), groups)
        return MixerOutput(y_BTD, following, {"active": active.asked / groups.cp.size()} if self.training else None)

    def choose(self, m_BTD: Tensor, segments: Segments | None, *, decodes: bool) -> Active:
        """Which tokens are active, the earliest of a whole row within its capacity."""
        wide = torch.promote_types(m_BTD.dtype, torch.float32)
        logits_BT2 = linear(m_BTD, self.router).to(wide) / self.temperature.to(wide)
        asks_BT = logits_BT2[..., 1] > logits_BT2[..., 0]
        tokens = m_BTD.shape[1] * (1 if segments is None else segments.count)
        most = tokens if decodes else math.ceil(self.options.capacity * tokens)
        number_BT = asks_BT.cumsum(1)
        if segments is not None:
            number_BT = number_BT + self._before(asks_BT.sum(1), segments)[:, None]
        is_active_BT = asks_BT & (number_BT <= most)
        order_BT = torch.argsort((~is_active_BT).to(torch.int8), dim=1, stable=True)
        place_BC = order_BT[:, : min(most, m_BTD.shape[1])]
        asked = asks_BT.to(wide).mean()
        return Active(place_BC, is_active_BT.gather(1, place_BC), logits_BT2.softmax(-1)[..., 1], asked)

    def _before(self, asked_R: Tensor, segments: Segments) -> Tensor:
        """How many tokens of the same row ask in the segments before each of this rank's, [R]."""
        slots = as_slots(segments, 1)
        by_segment_BZ = gather_rows(asked_R.view(1, -1, 2), slots, self.build.groups)[0]
        before_BZ = by_segment_BZ.cumsum(1) - by_segment_BZ
        return torch.stack([before_BZ[:, number] for number in segments.own], dim=1).flatten()

    def unit(self, m_BCD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k [B, C, K] of one shared projection, v and r [B, C, channels of this rank]."""
        z_BCK = functional.silu(linear(m_BCD, self.z_proj))
        q_BCK, k_BCK = (z_BCK * scale + offset for scale, offset in zip(self.z_scale, self.z_offset))
        r_BCE, v_BCE = functional.silu(self.in_proj(m_BCD)).chunk(2, dim=-1)
        return q_BCK, k_BCK, v_BCE, r_BCE

    def attend(
        self, q_BCK: Tensor, k_BCK: Tensor, v_BCE: Tensor, ids_BC: Tensor, past: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Attend to active tokens and the window - 1 slots before them; and those slots after the row's active tokens."""
        k_BSK, v_BSE, ids_BS = (torch.cat(pair, dim=1) for pair in zip(past, (k_BCK, v_BCE, ids_BC)))
        o_BCE = attend_near(q_BCK, k_BSK, v_BSE, ids_BS, self.places, self.options.attention)
        # The last active ones, of which each row has another number.
        arrived_B = (ids_BC != EMPTY).sum(1)
        last_BW = arrived_B[:, None] + torch.arange(self.options.window - 1, device=ids_BC.device)
        k, v = (x.gather(1, last_BW[..., None].expand(-1, -1, x.shape[-1])) for x in (k_BSK, v_BSE))
        return o_BCE, (k, v, ids_BS.gather(1, last_BW))

    def empty_past(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots without tokens."""
        kept, new = self.options.window - 1, self.z_proj.new_zeros
        ids_BW = torch.full((num_rows, kept), EMPTY, dtype=torch.int64, device=self.z_proj.device)
        return new(num_rows, kept, self.options.head_dim), new(num_rows, kept, self.inner), ids_BW

    def past(self, k_RCK: Tensor, v_RCE: Tensor, ids_RC: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """The last window - 1 active tokens before each of this rank's segments, out of those of all segments before it."""
        groups, kept, size = self.build.groups, self.options.window - 1, self.options.head_dim
        empty = self.empty_past(len(ids_RC))
        _, (k, v, ids) = self.attend(k_RCK[:, :0], k_RCK, v_RCE, ids_RC, empty)
        slots = as_slots(segments, kept)
        both_BSX = gather_rows(torch.cat([k, v], -1).reshape(1, -1, 2 * kept, size + self.inner), slots, groups)[0]
        ids_BS = gather_rows(ids.reshape(1, -1, 2 * kept), slots, groups)[0]
        found = []
        for number in segments.own:
            first_B1 = segments.document_ids_BT[:, number * segments.length, None]
            before_BS = ids_BS[:, : number * kept]
            before_BS = torch.where(before_BS == first_B1, before_BS, EMPTY)
            before_BS = torch.cat([before_BS.new_full((len(before_BS), kept), EMPTY), before_BS], dim=1)
            last_BW = torch.argsort((before_BS != EMPTY).to(torch.int8), dim=1, stable=True)[:, -kept:]
            rows = functional.pad(both_BSX[:, : number * kept], (0, 0, kept, 0))
            found.append(
                (rows.gather(1, last_BW[..., None].expand(-1, -1, rows.shape[-1])), before_BS.gather(1, last_BW))
            )
        both_RWX, ids_RW = (torch.stack(pair, dim=1).flatten(0, 1) for pair in zip(*found))
        return *both_RWX.split([size, self.inner], dim=-1), ids_RW

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Rates log-uniform, shares that keep the size of x, q and k as z, no bias, and the temperature sqrt(D)."""
        if name == "log_rates":
            return first_rates(shape, generator)
        if name == "shares":
            return torch.randn(shape, generator=generator) * shape[1] ** -0.5
        constants = {"temperature": self.build.hidden_size**0.5, "z_scale": 1.0, "z_offset": 0.0, "places": 0.0}
        return torch.full(shape, constants[name]) if name in constants else None

    def empty_state(self, num_rows: int) -> MixerState:
        """Zero averages, and slots for the keys and values of window - 1 active tokens."""
        k, v, _ = self.empty_past(num_rows)
        averages = torch.zeros(num_rows, self.log_rates.numel(), 1, device=k.device)
        return {
            "averages": averages,
            "k": k,
            "v": v,
            "count": torch.zeros(num_rows, dtype=torch.int64, device=k.device),
        }

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the averages, and of attention where the capacity is used up."""
        keys = min(self.options.window, self.options.capacity * sequence_length)
        attended = 2.0 * keys * (self.options.head_dim + self.inner)
        return 5.0 * self.log_rates.numel() + self.options.capacity * attended


def as_slots(segments: Segments, number: int) -> Segments:
    """The same cut of rows that have this many slots a segment instead of tokens."""
    ids_BS = segments.document_ids_BT.new_zeros(len(segments.document_ids_BT), segments.count * number)
    return replace(segments, document_ids_BT=ids_BS, document_ends=())
