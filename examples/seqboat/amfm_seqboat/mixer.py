"""SeqBoat (Ren et al. 2023, arXiv 2306.11197): attention for the tokens that ask for it; see the README for the formulas.

Active tokens of a row are moved to its front, in time, so that attention computes a short row and not a mask. How many
there are is data; the length of the short row is not: `capacity` sets it. What is behind the active tokens there is a document
of its own, and does not come back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amfm.kernels.attention.op import attention
from amfm.kernels.diag_scan.op import diag_scan
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.layers import Linear
from amfm_seqboat.spec import SeqBoatOptions

ONE_STEP = math.log(math.e - 1)  # softplus of it is 1
SLOWEST, FASTEST = 0.01, 1.0  # rates of the first averages: half is forgotten in 69 tokens to one


class Active(NamedTuple):
    """Places of a row's active tokens, in time [B, C]; whether there is one there [B, C]; the probability of each token [B, T]."""

    place_BC: Tensor
    is_there_BC: Tensor
    probability_BT: Tensor


class SeqBoatMixer(SequenceMixer):
    """y = h + p attention(h) where p > 1/2, else y = h, with h moving averages of x; on one rank of tensor and context."""

    def __init__(self, options: SeqBoatOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        hidden, width = build.hidden_size, options.num_heads * options.head_dim
        self.log_rates = nn.Parameter(torch.empty(hidden, options.averages))
        self.shares = nn.Parameter(torch.empty(hidden, options.averages))
        self.router = Linear(hidden, 2, build.groups)
        self.temperature = nn.Parameter(torch.empty(1))
        self.in_proj = Linear(hidden, 3 * width, build.groups)
        self.out_proj = Linear(width, hidden, build.groups)

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D]; with a state it goes on from there and returns the next one."""
        assert meta.segments is None, "context ranks are refused before"
        assert state is None or isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
        h_BTD, averages = self.average(x_BTD, meta, None if state is None else state["averages"])
        active = self.choose(h_BTD, 1.0 if state is not None else self.options.capacity)
        chosen_BCD = h_BTD.gather(1, active.place_BC[..., None].expand(-1, -1, h_BTD.shape[-1]))
        q, k, v = (
            part.unflatten(-1, (self.options.num_heads, -1)) for part in self.in_proj(chosen_BCD).chunk(3, dim=-1)
        )
        following: MixerState | None = None
        if state is None:
            ids_BC = meta.document_ids_BT.gather(1, active.place_BC)
            # Ids must not fall inside a row: the rest is a document after all others.
            ids_BS = torch.where(active.is_there_BC, ids_BC, torch.iinfo(ids_BC.dtype).max)
        else:
            k, v, ids_BS, following = self._join(k, v, active, state)
            following["averages"] = averages
        o_BCHK = attention(q, k, v, document_ids_BS=ids_BS, window=self.options.window, backend=self.build.backend)
        found_BCD = self.out_proj(o_BCHK.flatten(-2))
        share_BC = active.probability_BT.gather(1, active.place_BC) * active.is_there_BC
        place_BCD = active.place_BC[..., None].expand_as(found_BCD)
        y_BTD = h_BTD.scatter_add(1, place_BCD, found_BCD * share_BC[..., None].to(found_BCD.dtype))
        return MixerOutput(y_BTD, following)

    def average(self, x_BTD: Tensor, meta: PackMeta, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """h = sum_n shares_n avg_n, avg_t = e^(-rate) avg_(t-1) + (1 - e^(-rate)) x_t a channel; and the averages after it."""
        number, wide = self.options.averages, torch.promote_types(x_BTD.dtype, torch.float32)
        # Each average is a channel of its own with one state number.
        x_BTC = x_BTD.repeat_interleave(number, dim=-1)
        ones_BTN = x_BTC.new_ones(*x_BTC.shape[:2], 1)
        channels = self.log_rates.numel()
        log_rates_C1 = self.log_rates.to(wide).reshape(channels, 1)
        scanned = diag_scan(
            x_BTC,
            x_BTC.new_full(x_BTC.shape, ONE_STEP, dtype=wide),
            log_rates_C1,
            ones_BTN,
            ones_BTN,
            x_BTC.new_zeros(channels),
            x_BTC.new_zeros(channels),
            document_ids_BT=meta.boundaries_BT(),
            initial_state_BCN=state,
            chunk_size=self.options.chunk_size,
            backend=self.build.backend,
        )
        gain_C = self.shares.to(wide).flatten() * (1 - (-log_rates_C1[:, 0].exp()).exp())
        h_BTD = (scanned.y_BTC.to(wide) * gain_C).unflatten(-1, (-1, number)).sum(-1)
        return h_BTD.to(x_BTD.dtype), scanned.final_state_BCN

    def choose(self, h_BTD: Tensor, capacity: float) -> Active:
        """Which tokens are active, the earliest of a row within its capacity."""
        wide = torch.promote_types(h_BTD.dtype, torch.float32)
        logits_BT2 = self.router(h_BTD).to(wide) / self.temperature.to(wide)
        is_active_BT = logits_BT2[..., 1] > logits_BT2[..., 0]
        kept = math.ceil(capacity * h_BTD.shape[1])
        order_BT = torch.argsort((~is_active_BT).to(torch.int8), dim=1, stable=True)
        place_BC = order_BT[:, :kept]
        return Active(place_BC, is_active_BT.gather(1, place_BC), logits_BT2.softmax(-1)[..., 1])

    def _join(
        self, k: Tensor, v: Tensor, active: Active, state: MixerState
    ) -> tuple[Tensor, Tensor, Tensor, MixerState]:
        """Keys and values after those of a state, their ids (-1: an empty slot, 0: active, 1: the rest), and the next state."""
        kept = self.options.window - 1
        k, v = torch.cat([state["k"], k], dim=1), torch.cat([state["v"], v], dim=1)
        slot_W = torch.arange(-kept, 0, device=k.device)
        filled_BW = torch.where(slot_W < -state["count"][:, None], -1, 0)
        ids_BS = torch.cat([filled_BW, torch.where(active.is_there_BC, 0, 1)], dim=1)
        arrived_B = active.is_there_BC.sum(1)
        # The last active ones, of which each row has another number.
        last_BW = (arrived_B[:, None] + torch.arange(kept, device=k.device))[..., None, None]
        last_k, last_v = (x.gather(1, last_BW.expand(-1, -1, *x.shape[2:])) for x in (k, v))
        return k, v, ids_BS, {"k": last_k, "v": last_v, "count": state["count"] + arrived_B}

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Rates log-uniform, shares that keep the size of x, and the temperature sqrt(D)."""
        if name == "log_rates":
            return torch.empty(shape).uniform_(math.log(SLOWEST), math.log(FASTEST), generator=generator)
        if name == "shares":
            return torch.randn(shape, generator=generator) * shape[1] ** -0.5
        return torch.full(shape, self.build.hidden_size**0.5) if name == "temperature" else None

    def empty_state(self, num_rows: int) -> MixerState:
        """Zero averages, and slots for the keys and values of window - 1 active tokens."""
        weight, options = self.out_proj.weight, self.options
        slots = weight.new_zeros(num_rows, options.window - 1, options.num_heads, options.head_dim)
        averages = torch.zeros(num_rows, self.log_rates.numel(), 1, device=weight.device)
        count = torch.zeros(num_rows, dtype=torch.int64, device=weight.device)
        return {"averages": averages, "k": slots, "v": slots, "count": count}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs a token of the averages, and of attention where the capacity is used up."""
        keys = min(self.options.window, self.options.capacity * sequence_length)
        attended = 4.0 * keys * self.options.num_heads * self.options.head_dim
        return 5.0 * self.log_rates.numel() + self.options.capacity * attended
