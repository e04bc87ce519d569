"""RWKV-7: the delta rule with a decay per key channel, which removes along another vector than it writes values along.

Each projection reads a mixture of a token and the one before it. A step removes what the state holds under the key of
unit length, in a share a of each channel, and writes under another key: two updates of rank one per token, which the delta scan
takes as two tokens, the first with the decay and the second with the value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.linear.op import linear
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.delta import unit_length
from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState
from amfm.model.mixers.recurrence import DeltaRecurrence, OpenScan, ScanRows, ScanSettings
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_windows
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_mixers.options import Rwkv7Options

# The strongest decay is e^(-e^(-1/2)) (section 4.1), and the norm of heads has this epsilon per channel of a head.
LEAST_LOG_DECAY = -math.exp(-0.5)
NORM_EPSILON = 1e-5
READERS = ("r", "k", "v", "decay_inside", "rate_inside", "gate_inside")


class TwoUpdates(DeltaRecurrence):
    """S <- diag(e^g) S - (a * c) (S^T c)^T + k v^T, with c in `erase` and a [B, T, H, K] in `beta` of the rows."""

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        o_BSHV, state = super().scan(two_tokens(rows), twice(how), state_BHKV)
        return o_BSHV[:, 1::2], state

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """As in the base class."""
        found = super().scan_with_transfer(two_tokens(rows), twice(how))
        return found._replace(o_BTHV=found.o_BTHV[:, 1::2], read=lambda state: found.read(state)[:, 1::2])

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        both = two_tokens(ScanRows(*(None if x is None else x[:, None] for x in rows)))  # type: ignore[arg-type]
        for number in range(2):
            token = ScanRows(*(None if x is None else x[:, number] for x in both))  # type: ignore[arg-type]
            o_BHV, state_BHKV = super().step(token, state_BHKV)
        return o_BHV, state_BHKV

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Of two tokens of the delta rule."""
        return 2 * super().flops(num_heads, key_dim, value_dim)


def two_tokens(rows: ScanRows) -> ScanRows:
    """Rows of 2 T tokens of the delta rule: one that decays and removes, one that writes and reads."""
    q, k, v, g, a, c = rows
    assert g is not None and a is not None and c is not None, "RWKV-7 has decays, rates and keys of unit length"

    def pairs(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], dim=2).flatten(1, 2)

    # The state has decayed when it is asked, and what it held before is removed.
    asked = (c.to(g.dtype) * torch.exp(-g)).to(c.dtype)
    removed = (c.to(a.dtype) * a).to(k.dtype)
    ones = g.new_ones(g.shape[0], 2 * g.shape[1], 1, g.shape[2])
    keys, values = pairs(removed, k).unsqueeze(2), pairs(torch.zeros_like(v), v).unsqueeze(2)
    return ScanRows(
        pairs(q, q), keys, values, pairs(g, torch.zeros_like(g)), ones, pairs(asked, torch.zeros_like(asked))
    )


def twice(how: ScanSettings) -> ScanSettings:
    """How rows of two tokens each are scanned."""
    ids_BT = how.document_ids_BT
    return how if ids_BT is None else how._replace(document_ids_BT=ids_BT.repeat_interleave(2, dim=1))


class Rwkv7Mixer(LinearMixer):
    """Time mixing of RWKV-7 without the values of the first block, which later blocks would mix in.

    Source: Peng et al. 2025, arXiv 2503.14456, sections 4.1 (token shift, equations of r, k, v, d, a, g), 4.2 (the state)
    and 4.3 (norm, bonus and gate). Every rank of `groups.tp` and `groups.cp` must call.
    """

    has_in_out_updates = False
    is_graphable = False
    options: Rwkv7Options  # type: ignore[assignment]
    recurrence = TwoUpdates()
    decay_proj: Tensor
    rate_proj: Tensor
    gate_proj: Tensor
    decay_bias: Tensor
    rate_bias: Tensor
    removal_scale: Tensor
    write_mix: Tensor
    bonus: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, options: Rwkv7Options, build: BuildContext) -> None:
        super().__init__(options, build)  # type: ignore[arg-type]
        width, rank = self.num_heads * self.key_dim, options.rank()
        by_head = Shard((ShardSpec(0, "tp", (options.num_heads * self.key_dim,), (options.num_heads,)),))
        for name in ("decay", "rate", "gate"):
            setattr(self, f"{name}_proj", nn.Parameter(torch.empty(width, rank)))
        for name in ("decay_bias", "rate_bias", "removal_scale", "write_mix", "bonus", "norm_weight", "norm_bias"):
            setattr(self, name, nn.Parameter(torch.empty(width)))
            self.shards[name] = by_head
        self.shards |= {f"{name}_proj": by_head for name in ("decay", "rate", "gate")}
        self.shift_bias = nn.Parameter(torch.empty(len(READERS), build.hidden_size))
        self.shards["shift_bias"] = Shard(partial=("tp",))

    def parts(self) -> dict[str, Part]:
        """r, k and v by head; the insides of decay, rate and gate whole."""
        by_head, inside = Part(self.options.num_heads * self.key_dim, self.options.num_heads), None
        return {"r": by_head, "k": by_head, "v": by_head} | {
            name: Part(self.options.rank(), inside) for name in READERS[3:]
        }

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state it continues from there and returns the next one."""
        x_BTD = enter_tensor_region(x_BTD, self.build.groups)
        moved_BTD = self.before(x_BTD, meta, state) - x_BTD
        weights = dict(zip(self._cut_sizes, self.in_proj.weight.split(list(self._cut_sizes.values()))))
        assert self.shared_proj is not None, "insides of low-rank projections are whole"
        weights |= dict(zip(self._whole_sizes, self.shared_proj.split(list(self._whole_sizes.values()))))
        mixed = (x_BTD + moved_BTD * shift_D for shift_D in self.shift_bias)
        parts = {name: linear(own_BTD, weights[name]) for name, own_BTD in zip(READERS, mixed, strict=True)}
        following: MixerState | None = None
        if meta.segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            o_BTHV = self._scan_segments(parts, meta, meta.segments)
        elif state is None:
            o_BTHV = self.mix(parts, meta)
        else:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            o_BTHV, following = self.extend(parts, meta, state)
            following["token"] = x_BTD[:, -1:]
        y_BTI = self.output(o_BTHV, parts)
        return MixerOutput(leave_tensor_region(self.out_proj(y_BTI), self.build.groups), following)

    def before(self, x_BTD: Tensor, meta: PackMeta, state: BlockState) -> Tensor:
        """The token before each, [B, T, D]; zeros where a document begins."""
        segments, ids_BT = meta.segments, meta.boundaries_BT()
        if segments is not None:
            rows_BTD, ids_BT = segments.as_rows(x_BTD), segments.as_rows(meta.document_ids_BT)
            first_B1D = receive_windows(rows_BTD, 1, segments, self.build.groups)
        else:
            rows_BTD = x_BTD
            first_B1D = x_BTD.new_zeros(len(x_BTD), 1, x_BTD.shape[2])
            if state is not None:
                assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
                first_B1D = state["token"].to(x_BTD.dtype)
        moved_BTD = torch.cat([first_B1D, rows_BTD[:, :-1]], dim=1)
        if ids_BT is not None:
            is_same_BT = functional.pad(ids_BT[:, 1:] == ids_BT[:, :-1], (1, 0), value=True)
            moved_BTD = torch.where(is_same_BT[..., None], moved_BTD, torch.zeros_like(moved_BTD))
        return moved_BTD.reshape(x_BTD.shape)

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; decay and rate in float32 for bf16. Leaves the key that is written, and the gate, in the parts."""
        r_BTX, k_BTX = parts["r"], parts["k"]
        wide = torch.promote_types(k_BTX.dtype, torch.float32)
        decay_BTX = linear(parts["decay_inside"].tanh(), self.decay_proj).to(wide) + self.decay_bias.to(wide)
        rate_BTX = (linear(parts["rate_inside"], self.rate_proj).to(wide) + self.rate_bias.to(wide)).sigmoid()
        c_BTHK = unit_length(self.heads(k_BTX * self.removal_scale))
        written_BTX = (k_BTX.to(wide) * (1.0 + (rate_BTX - 1.0) * self.write_mix.to(wide))).to(k_BTX.dtype)
        parts["written"] = written_BTX
        g_BTHK = self.heads(LEAST_LOG_DECAY * decay_BTX.sigmoid())
        r, k, v, a = (self.heads(part) for part in (r_BTX, written_BTX, parts["v"], rate_BTX))
        return ScanRows(r, k, v, g_BTHK, a, c_BTHK)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm each head with its mean, add the bonus of the token's own value, and multiply by the gate."""
        size = self.value_dim
        wide = torch.promote_types(o_BTHV.dtype, torch.float32)
        normed = functional.layer_norm(o_BTHV.to(wide), (size,), eps=NORM_EPSILON * size).flatten(2)
        normed = normed * self.norm_weight.to(wide) + self.norm_bias.to(wide)
        own = self.heads(parts["r"].to(wide) * parts["written"].to(wide) * self.bonus.to(wide)).sum(-1, keepdim=True)
        total = normed + (own * self.heads(parts["v"]).to(wide)).flatten(2)
        gate_BTX = linear(parts["gate_inside"].sigmoid(), self.gate_proj)
        return (total * gate_BTX.to(wide)).to(o_BTHV.dtype)

    def empty_state(self, num_rows: int) -> MixerState:
        """As in the base class, and no token before."""
        token = self.out_proj.weight.new_zeros(num_rows, 1, self.build.hidden_size)
        return super().empty_state(num_rows) | {"token": token}

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Decays from slow to fast over the channels, removal of most of what a key holds, no bonus; shifts rise over channels."""
        if name == "shift_bias":
            return torch.linspace(0.0, 1.0, shape[1]).expand(shape).clone()
        if name == "decay_bias":
            return torch.linspace(-6.0, 1.0, shape[0])
        first: dict[str, float] = {
            "rate_bias": 0.0,
            "removal_scale": 0.85,
            "write_mix": 1.0,
            "bonus": 0.0,
            "norm_weight": 1.0,
            "norm_bias": 0.0,
        }
        return torch.full(shape, first[name]) if name in first else None
