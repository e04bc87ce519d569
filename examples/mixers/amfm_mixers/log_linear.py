"""Log-linear Mamba2: a state for each power of two of the distance, and a weight of the token for each of them.

A token at place t of its document sees itself at level 0. For each bit of t that is set, it sees at level bit + 1 the 2^bit tokens
that stand before its place when the bits below are cleared: the pieces of a Fenwick tree, larger further back. What it reads is
the sum over levels of lambda_level times what linear attention with decays would read of that piece.

A level is one decay scan: tokens are cut into blocks of 2^(bit + 1), which the scan takes for documents; the first half of a block
writes, the second reads. So T tokens take log2 T scans. Decoding keeps one state a level, and each token merges those of the
lowest bits of t that are set, as a counter carries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.decay_scan.op import decay_scan
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext, MixerState
from amfm.model.mixers.recurrence import OpenScan, Recurrence, ScanRows, ScanSettings
from amfm.model.mixers.shared_layers import GatedHeadNorm, first_decay_rates, first_time_steps
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec, divide_units
from amfm_mixers.options import LogLinearOptions


class LevelRecurrence(Recurrence):
    """Levels of decay scans; `erase` holds lambda [B, T, H, L], `beta` the places in documents [B, T].

    States are [B, H, (L - 1) K, V], a matrix for each level above 0. A text longer than 2^(L - 1) tokens starts over there.
    """

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in the base class; tokens after a state take a step each."""
        q, k, v, g, place_BT, weight = rows
        assert g is not None and place_BT is not None and weight is not None, "all of them are read"
        if state_BHKV is not None:
            return self._step_through(rows, state_BHKV)
        out = self._own(q, k, v, weight)
        first_BT = torch.ones_like(place_BT, dtype=torch.bool)
        if how.document_ids_BT is not None:
            first_BT[:, 1:] = how.document_ids_BT.diff(dim=1) != 0
        else:
            first_BT[:, 1:] = False
        states = []
        for level in range(1, self.num_levels):
            half = 1 << (level - 1)
            if half >= place_BT.shape[1]:
                states.append(v.new_zeros(len(v), *k.shape[2:], v.shape[-1], dtype=weight.dtype))
                continue
            block_BT, is_late_BT11 = place_BT // (2 * half), (place_BT // half % 2 == 1)[..., None, None]
            starts_BT = first_BT.clone()
            starts_BT[:, 1:] |= block_BT.diff(dim=1) != 0
            blocks = how._replace(document_ids_BT=starts_BT.cumsum(1).to(torch.int32))
            read = (q.to(weight.dtype) * weight[..., level, None]).to(q.dtype).masked_fill(~is_late_BT11, 0.0)
            scanned = decay_scan(read, k.masked_fill(is_late_BT11, 0.0), v, g, **blocks._asdict())
            out = out + scanned.o_BTHV
            states.append(scanned.final_state_BHKV)
        return out, torch.cat(states, dim=2)

    def _step_through(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for token in range(rows.q.shape[1]):
            one = ScanRows(*(None if x is None else x[:, token] for x in rows))  # type: ignore[arg-type]
            o_BHV, state_BHKV = self.step(one, state_BHKV)
            outputs.append(o_BHV)
        return torch.stack(outputs, dim=1), state_BHKV

    def _own(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        """What tokens read of themselves, [..., H, V]."""
        wide = weight.dtype
        return ((q.to(wide) * k.to(wide)).sum(-1, keepdim=True) * weight[..., :1] * v.to(wide)).to(v.dtype)

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """Not there: a state that enters is a tree."""
        raise NotImplementedError("log-linear mixers have no context ranks")

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        q, k, v, g, place_B, weight_BHL = rows
        assert g is not None and place_B is not None and weight_BHL is not None, "all of them are read"
        wide = state_BHKV.dtype
        tree = state_BHKV.unflatten(2, (self.num_levels - 1, -1)) * g.to(wide).exp()[..., None, None, None]
        bits_BL = (place_B[:, None].long() >> torch.arange(self.num_levels - 1, device=place_B.device)) & 1
        seen_BHL = weight_BHL[..., 1:].to(wide) * bits_BL[:, None]
        o_BHV = torch.einsum("bhk,bhlkv,bhl->bhv", q.to(wide), tree, seen_BHL)
        carried_BL = bits_BL.cumprod(1)  # the lowest bits, as far as all are set
        write = k.to(wide)[..., None] * v.to(wide)[:, :, None]
        merged = write + torch.einsum("bhlkv,bl->bhkv", tree, carried_BL.to(wide))
        is_next_BL = functional.pad(carried_BL, (1, 0), value=1)[:, :-1] - carried_BL
        tree = torch.where(is_next_BL[:, None, :, None, None] == 1, merged[:, :, None], tree)
        return o_BHV + self._own(q.to(wide), k, v.to(wide), weight_BHL), tree.flatten(2, 3)

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Forward FLOPs per token of a row in which all levels are; key_dim: K of each of them together."""
        return 5.0 * num_heads * key_dim * value_dim


class LogLinearMixer(LinearMixer):
    """Mamba2's projections and decays; lambda = softplus(L W x) a head and level; heads are normed, times silu(z).

    B and C come in groups of heads. Source: Guo et al. 2025, arXiv 2506.04761, section 3.4.
    """

    options: LogLinearOptions

    def __init__(self, options: LogLinearOptions, build: BuildContext) -> None:
        self.num_groups = divide_units(options.num_groups, build.groups, "num_groups")
        super().__init__(options, build)  # type: ignore[arg-type]
        heads, levels = options.num_heads, options.num_levels()
        self.recurrence = LevelRecurrence(levels)
        by_head = Shard((ShardSpec(0, "tp", (heads,)),))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.L = nn.Parameter(torch.empty(self.num_heads * levels))
        self.shards |= dict.fromkeys(("A_log", "dt_bias", "D"), by_head)
        self.shards["L"] = Shard((ShardSpec(0, "tp", (heads * levels,), (heads,)),))
        self.norm = GatedHeadNorm(self.value_dim, build)

    def parts(self) -> dict[str, Part]:
        """x, B and C; the gate z; the time step; a number a level."""
        own = self.options
        inner = Part(own.num_heads * own.head_dim, own.num_heads)
        by_group = Part(own.num_groups * own.state_size, own.num_groups)
        level = Part(own.num_heads * own.num_levels(), own.num_heads)
        narrow = {"dt": Part(own.num_heads, own.num_heads), "level": level}
        return {"x": inner, "B": by_group, "C": by_group, "z": inner, **narrow}

    def convolved(self) -> tuple[str, ...]:
        """As in Mamba2."""
        return ("x", "B", "C")

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; time steps, decays and weights in float32 for bf16."""
        if self.conv is None:
            parts |= {name: functional.silu(parts[name]) for name in self.convolved()}
        x_BTHV = self.heads(parts["x"])
        wide = torch.promote_types(x_BTHV.dtype, torch.float32)
        dt_BTH = functional.softplus(parts["dt"].to(wide) + self.dt_bias.to(wide))
        scales_HL = self.L.to(wide).view(self.num_heads, -1)
        weight_BTHL = functional.softplus(scales_HL * self.heads(parts["level"]).to(wide))
        q, k = (self._by_head(parts[name]) for name in ("C", "B"))
        v = (x_BTHV.to(wide) * dt_BTH[..., None]).to(x_BTHV.dtype)
        return ScanRows(q, k, v, -self.A_log.to(wide).exp() * dt_BTH, meta.positions_BT, weight_BTHL)

    def _by_head(self, part_BTX: Tensor) -> Tensor:
        """B or C of each head, [B, T, H, N]."""
        groups = part_BTX.unflatten(-1, (self.num_groups, -1))
        return groups.repeat_interleave(self.num_heads // self.num_groups, dim=2)

    def extend(self, parts: dict[str, Tensor], meta: PackMeta, state: MixerState) -> tuple[Tensor, MixerState]:
        """As in the base class; a text that begins is scanned."""
        if not meta.first_continues and meta.positions_BT.shape[1] > 1:
            state = {name: tensor for name, tensor in state.items() if name != "state"} | {"state": None}  # type: ignore[dict-item]
        return super().extend(parts, meta, state)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Add D x, norm by head, times silu(z)."""
        return self.norm(o_BTHV + self.D.to(o_BTHV.dtype)[:, None] * self.heads(parts["x"]), parts["z"])

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the levels that a row of this length has."""
        levels = max(1, min(self.options.num_levels() - 1, (sequence_length - 1).bit_length()))
        return levels * self.recurrence.flops(self.num_heads, self.key_dim, self.value_dim)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw A_log and dt_bias as Mamba2's; D and L begin at 1."""
        if name == "A_log":
            return first_decay_rates(shape, generator)
        if name == "dt_bias":
            return first_time_steps(shape, generator)
        return torch.ones(shape) if name in ("D", "L") else None
