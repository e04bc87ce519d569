"""LongVQ (Liu et al. 2024, arXiv 2404.11163) on amfm's scans; formulas, and what is taken from where, in the README.

Keys are their nearest codes. What is in the window is summed key by key with a bias for its distance; a key that leaves it
adds its value to the sum of its code, in a decay scan without a decay whose rows are delayed by the window. With norms
on both sides scores are at most sqrt(K), so that one constant keeps all weights within range, and the two sums simply add.

Tensor ranks have heads; averages and the outer gate are computed by every rank, whose part of their gradient follows from
its heads and its share 1 / ranks of the input. Context ranks: averages and codes pass as states, the window as windows do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from amfm_seqboat.averages import average, first_rates
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.linear.op import linear
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows, ScanSettings, add_initial_state, delay_rows
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_states, receive_windows
from amfm.model.parallel.layers import ColumnLinear, RowLinear
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region, sum_values
from amfm.model.parallel.shards import Shard, ShardSpec, divide
from amfm.model.segments import Segments
from amfm_longvq.spec import LongVqOptions
from amfm_longvq.window import near_sums


class Past(NamedTuple):
    """Keys and values of the tokens before a row [B, W, H, ...], their documents' ids [B, W], -1 for no token, and the sums
    of codes before those, None for zeros."""

    k: Tensor
    v: Tensor
    ids: Tensor
    state: Tensor | None = None


class LongVqMixer(SequenceMixer):
    """m = averages of x; y = f W_o (r softmax(q k^) v) + (1 - f) x with q and k of m, gates r and f of m, v of x."""

    def __init__(self, options: LongVqOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build, groups = options, build, build.groups
        hidden, heads, size, values = build.hidden_size, options.num_heads, options.head_dim, options.value_head_dim
        self.num_heads = divide(heads, groups, "model.mixers.longvq.num_heads")
        self.log_rates, self.shares = (nn.Parameter(torch.empty(hidden, options.averages)) for _ in range(2))
        self.f_proj = nn.Parameter(torch.empty(hidden, hidden))
        self.shards = {name: Shard(partial=("tp",)) for name, _ in self.named_parameters()}
        own = self.num_heads
        self.z_scale, self.z_offset = (nn.Parameter(torch.empty(own, 2, size)) for _ in range(2))
        self.places = nn.Parameter(torch.empty(own, options.window))
        self.codes = nn.Parameter(torch.empty(own, options.num_codes, size))
        by_head = Shard((ShardSpec(0, "tp", (heads,)),))
        self.shards |= dict.fromkeys(("z_scale", "z_offset", "places", "codes"), by_head)
        units = (heads, heads)
        self.zr_proj = ColumnLinear(hidden, (heads * size, heads * values), groups, name="num_heads", units=units)
        self.v_proj = ColumnLinear(hidden, (heads * values,), groups, name="num_heads")
        self.out_proj = RowLinear(heads * values, hidden, groups, name="num_heads")
        self.recurrence = DecayRecurrence()

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D]; with a state it continues from there and returns the next one."""
        assert state is None or isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
        groups, options, segments = self.build.groups, self.options, meta.segments
        x_BTD = enter_tensor_region(x_BTD, groups)
        m_BTD, averages = average(
            x_BTD,
            self.log_rates,
            self.shares,
            meta,
            groups,
            state_BCN=None if state is None else state["averages"],
            chunk_size=options.chunk_size,
            backend=self.build.backend,
        )
        sizes = [self.num_heads * size for size in (options.head_dim, options.value_head_dim)]
        z_BTX, r_BTI = functional.silu(self.zr_proj(m_BTD)).split(sizes, dim=-1)
        z_BTH1K = z_BTX.unflatten(-1, (self.num_heads, 1, -1))
        both_BTH2K = z_BTH1K * self.z_scale + self.z_offset
        q_BTHK, k_BTHK = functional.rms_norm(both_BTH2K, both_BTH2K.shape[-1:]).unbind(-2)
        v_BTHV = functional.silu(self.v_proj(x_BTD)).unflatten(-1, (self.num_heads, -1))
        following: MixerState | None = None
        if segments is not None:
            rows = [segments.as_rows(part) for part in (q_BTHK, k_BTHK, v_BTHV, meta.document_ids_BT)]
            o_BTHV = self.mix(*rows, self.past_of(rows[1], rows[2], segments), segments)[0].reshape(v_BTHV.shape)
        elif state is None:
            o_BTHV, _ = self.mix(q_BTHK, k_BTHK, v_BTHV, meta.document_ids_BT, self.empty_past(len(x_BTD)))
        else:
            slot_W = torch.arange(-options.window, 0, device=x_BTD.device)
            ids_BW = torch.where(slot_W < -meta.positions_BT[:, :1], -1, 0)
            past = Past(state["k"], state["v"], ids_BW, state["state"])
            o_BTHV, sums = self.mix(q_BTHK, k_BTHK, v_BTHV, torch.zeros_like(meta.positions_BT), past)
            kept = {name: torch.cat([state[name], new], 1) for name, new in (("k", k_BTHK), ("v", v_BTHV))}
            kept = {name: both[:, -options.window :] for name, both in kept.items()}
            following = {"averages": averages, "state": sums, **kept}
        f_BTD = linear(m_BTD, self.f_proj).sigmoid()
        part_BTD = f_BTD * self.out_proj(r_BTI * o_BTHV.flatten(-2).to(r_BTI.dtype))
        part_BTD = part_BTD + (1 - f_BTD) * x_BTD / groups.tp.size()
        auxiliary = {"commit": self.distance(k_BTHK)} if self.training and options.commit_weight else None
        return MixerOutput(leave_tensor_region(part_BTD, groups), following, auxiliary)

    def mix(
        self, q_BTHK: Tensor, k: Tensor, v: Tensor, ids_BT: Tensor, past: Past, segments: Segments | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend after the tokens before a row: outputs [B, T, H, V], and the sums of codes after the row."""
        dtype, wide = q_BTHK.dtype, torch.promote_types(q_BTHK.dtype, torch.float32)
        k_BSHK, v_BSHV = torch.cat([past.k, k], dim=1), functional.pad(torch.cat([past.v, v], dim=1), (0, 1), value=1.0)
        ids_BS = torch.cat([past.ids.to(ids_BT.dtype), ids_BT], dim=1)
        codes_HSK, bound = self.unit_codes(), self.options.head_dim**0.5
        scores_BTHS = torch.einsum("bthk,hsk->bths", q_BTHK.to(wide), codes_HSK) / bound
        choice_BSHS = self.choose(k_BSHK)
        k_hat = torch.einsum("bths,hsk->bthk", choice_BSHS, codes_HSK).to(dtype)
        near_BTHV = near_sums(q_BTHK, k_hat[:, 1:], v_BSHV[:, 1:], ids_BS[:, 1:], self.places, bound)
        late = ScanRows((scores_BTHS - bound).exp().to(dtype), choice_BSHS.to(dtype), v_BSHV, None)
        rows = delay_rows(late, self.options.window, ids_BS)
        has_bounds = segments is not None or past.state is None
        how = ScanSettings(ids_BT if has_bounds else None, self.options.chunk_size, self.build.backend)
        if segments is None:
            far_BTHV, sums = self.recurrence.scan(rows, how, past.state)
        else:
            scan = self.recurrence.scan_with_transfer(rows, how)
            final, transfer = (x.unflatten(0, (-1, 2)) for x in (scan.final_BHKV, scan.transfer))
            entering = receive_states(final, transfer, segments, self.build.groups).flatten(0, 1)
            far_BTHV, sums = add_initial_state(scan, entering), scan.final_BHKV
        total_BTHV = near_BTHV + far_BTHV.to(wide)
        return total_BTHV[..., :-1] / total_BTHV[..., -1:], sums

    def unit_codes(self) -> Tensor:
        """Codes of unit mean square, float32 at least."""
        wide = torch.promote_types(self.codes.dtype, torch.float32)
        return functional.rms_norm(self.codes.to(wide), (self.options.head_dim,))

    def choose(self, k_BSHK: Tensor) -> Tensor:
        """The nearest code of each key, one of S [B, S, H, S]; with the gradient of a soft choice, as the hard one has none."""
        nearness = torch.einsum("bthk,hsk->bths", k_BSHK.to(self.unit_codes().dtype), self.unit_codes())
        soft = (nearness * self.options.head_dim**-0.5).softmax(-1)
        hard = functional.one_hot(nearness.argmax(-1), self.options.num_codes).to(soft.dtype)
        return hard + (soft - soft.detach())

    def distance(self, k_BTHK: Tensor) -> Tensor:
        """Weighted mean square between keys and their codes, each drawn to the other, over all ranks' heads and tokens."""
        codes_HSK = self.unit_codes()
        k_BTHK = k_BTHK.to(codes_HSK.dtype)
        nearest = torch.einsum("bths,hsk->bthk", self.choose(k_BTHK).detach(), codes_HSK)
        apart = (k_BTHK - nearest.detach()).square().sum() + (k_BTHK.detach() - nearest).square().sum()
        groups = self.build.groups
        numbers = k_BTHK.numel() * groups.tp.size() * groups.cp.size()
        return sum_values(apart * (self.options.commit_weight / numbers), groups)

    def past_of(self, k_RLHK: Tensor, v_RLHV: Tensor, segments: Segments) -> Past:
        """The keys and values in the window before each of this rank's segments."""
        width = self.options.window
        both_RWX = receive_windows(torch.cat([k_RLHK, v_RLHV], -1).flatten(2), width, segments, self.build.groups)
        k, v = both_RWX.unflatten(2, (self.num_heads, -1)).split([k_RLHK.shape[-1], v_RLHV.shape[-1]], dim=-1)
        own_RL = segments.as_rows(segments.take(segments.document_ids_BT))
        return Past(k, v, torch.where(segments.window_mask(width).flatten(0, 1), own_RL[:, :1], -1))

    def empty_past(self, num_rows: int) -> Past:
        """Slots without tokens."""
        options, new = self.options, self.out_proj.weight.new_zeros
        k, v = (
            new(num_rows, options.window, self.num_heads, size) for size in (options.head_dim, options.value_head_dim)
        )
        return Past(k, v, torch.full((num_rows, options.window), -1, device=k.device))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Codes in all directions, averages as SeqBoat's, queries and keys a quarter apart, and no bias."""
        if name == "log_rates":
            return first_rates(shape, generator)
        if name == "shares":
            return torch.randn(shape, generator=generator) * shape[1] ** -0.5
        if name == "z_scale":
            return 1 + torch.randn(shape, generator=generator) / 4
        if name == "codes":
            return torch.randn(shape, generator=generator)
        return torch.zeros(shape) if name in ("z_offset", "places") else None

    def empty_state(self, num_rows: int) -> MixerState:
        """Zero averages and sums, and slots for the window, which a token enters before it leaves for its code's sum."""
        past, options = self.empty_past(num_rows), self.options
        shape = (num_rows, self.num_heads, options.num_codes, options.value_head_dim + 1)
        averages = torch.zeros(num_rows, self.log_rates.numel(), 1, device=past.k.device)
        return {"averages": averages, "state": torch.zeros(shape, device=past.k.device), "k": past.k, "v": past.v}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of averages, window, nearest codes and their sums."""
        options, heads = self.options, self.num_heads
        keys = min(options.window, sequence_length)
        near = 2.0 * keys * heads * (options.head_dim + options.value_head_dim)
        chosen = 4.0 * heads * options.num_codes * options.head_dim
        far = self.recurrence.flops(heads, options.num_codes, options.value_head_dim + 1)
        return 5.0 * self.log_rates.numel() + near + chosen + far
