"""LSSL (Gu et al. 2021, arXiv 2110.13985), the linear state space layer with a whole state matrix; formulas in the README.

S_t = A S_(t-1) + B u_t is walked in chunks: a chunk's own tokens pass a kernel of C A^i B, what came before enters as one
state. Powers of A up to a chunk are made once for all rows; documents stop kernels by a mask, and states at their ends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import OpenScan, Recurrence, ScanRows, ScanSettings
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_s4d.lssl_spec import LsslOptions
from amfm_s4d.mixer import DT_MAX, DT_MIN


class LsslMixer(LinearMixer):
    """y = out_proj(GELU(C S + D u)), S_t = A S_(t-1) + B u_t with u = in_proj(x): nothing depends on the content of a token."""

    options: LsslOptions

    def __init__(self, options: LsslOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.recurrence = MatrixRecurrence(self)
        by_head = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
        heads, states = self.num_heads, self.key_dim
        # The matrix is lower triangular, as HiPPO's, with -exp on its diagonal: it stays stable.
        self.below = nn.Parameter(torch.empty(heads, states, states))
        self.log_rates, self.inputs = (nn.Parameter(torch.empty(heads, states)) for _ in range(2))
        self.log_dt = nn.Parameter(torch.empty(heads))
        self.C = nn.Parameter(torch.empty(heads, self.value_dim, states))
        self.skip = nn.Parameter(torch.empty(heads, self.value_dim))
        for name in ("below", "log_rates", "inputs", "log_dt"):
            getattr(self, name).requires_grad_(options.trains_state)
        self.shards |= dict.fromkeys(("below", "log_rates", "inputs", "log_dt", "C", "skip"), by_head)

    def parts(self) -> dict[str, Part]:
        """u, by head."""
        return {"u": Part(self.options.num_heads * self.value_dim, self.options.num_heads)}

    def convolved(self) -> tuple[str, ...]:
        """Nothing: the options have no convolution."""
        return ()

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """The recurrence reads only u."""
        u_BTHV = self.heads(parts["u"])
        return ScanRows(u_BTHV, u_BTHV, u_BTHV)

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Add D u, then GELU."""
        return functional.gelu((o_BTHV + self.skip * self.heads(parts["u"])).flatten(-2))

    def discretize(self) -> tuple[Tensor, Tensor]:
        """A [H, N, N] and B [H, N] of one token by the bilinear rule (section 2), in float64."""
        dt_H11 = self.log_dt.double().exp()[:, None, None]
        matrix_HNN = self.below.double().tril(-1) - self.log_rates.double().exp().diag_embed()
        one_NN = torch.eye(self.key_dim, dtype=torch.float64, device=matrix_HNN.device)
        both = torch.cat([one_NN + dt_H11 / 2 * matrix_HNN, dt_H11 * self.inputs.double()[..., None]], dim=-1)
        solved = torch.linalg.solve_triangular(one_NN - dt_H11 / 2 * matrix_HNN, both, upper=False)
        return solved[..., :-1], solved[..., -1]

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """HiPPO-LegS, with time steps log-uniform; C and D normal."""
        root_N = (2 * torch.arange(shape[-1] if shape else 1, dtype=torch.float32) + 1).sqrt()
        if name == "below":
            return -(root_N[:, None] * root_N).tril(-1).expand(shape).clone()
        if name == "log_rates":
            return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(shape).clone()
        if name == "inputs":
            return root_N.expand(shape).clone()
        if name == "log_dt":
            return torch.empty(shape).uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator)
        return torch.randn(shape, generator=generator) if name in ("C", "skip") else None


class Powers(NamedTuple):
    """Of one token's A and B, in the dtype of states: A^(i + 1) [L, H, N, N], A^i B [L, H, N]."""

    matrix_LHNN: Tensor
    written_LHN: Tensor


class MatrixRecurrence(Recurrence):
    """S_t = A S_(t-1) + B u_t, o_t = C S_t, with A, B and C of a mixer."""

    def __init__(self, mixer: LsslMixer) -> None:
        self.mixer = mixer

    def powers(self, length: int, wide: torch.dtype) -> Powers:
        """Multiply up to a chunk, by doubling."""
        matrix_HNN, written_HN = self.mixer.discretize()
        matrices, written = matrix_HNN[None], written_HN[None]
        while len(matrices) < length:
            last = matrices[-1]
            written = torch.cat([written, torch.einsum("hnk,lhk->lhn", last, written)])
            matrices = torch.cat([matrices, last @ matrices])
        return Powers(matrices[:length].to(wide), written[:length].to(wide))

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        u_BTHV, wide = rows.v, torch.promote_types(rows.v.dtype, torch.float32)
        tokens, chunk = u_BTHV.shape[1], min(how.chunk_size, u_BTHV.shape[1])
        if how.backend == "reference":
            chunk = 1
        powers, C_HVN = self.powers(chunk, wide), self.mixer.C.to(wide)
        ids_BT = how.document_ids_BT
        if ids_BT is None:
            ids_BT = torch.zeros(u_BTHV.shape[:2], dtype=torch.int32, device=u_BTHV.device)
        state = u_BTHV.new_zeros(len(u_BTHV), *self.mixer.state_shape(), dtype=wide)
        state = state if state_BHKV is None else state_BHKV.to(wide)
        before_B, outputs = ids_BT[:, 0], []
        for start in range(0, tokens, chunk):
            ids_BL = ids_BT[:, start : start + chunk]
            o_BLHV, state = self._walk(
                u_BTHV[:, start : start + chunk].to(wide), ids_BL, before_B, state, powers, C_HVN
            )
            outputs.append(o_BLHV)
            before_B = ids_BL[:, -1]
        return torch.cat(outputs, dim=1).to(u_BTHV.dtype), state

    def _walk(
        self, u_BLHV: Tensor, ids_BL: Tensor, before_B: Tensor, state: Tensor, powers: Powers, C_HVN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One chunk: its outputs, and the state after it."""
        length = u_BLHV.shape[1]
        kernel_LHV = torch.einsum("hvn,lhn->lhv", C_HVN, powers.written_LHN[:length])
        back_LL = torch.arange(length, device=u_BLHV.device)[:, None] - torch.arange(length, device=u_BLHV.device)
        seen_BLL = (back_LL >= 0) & (ids_BL[:, :, None] == ids_BL[:, None])
        weights = kernel_LHV[back_LL.clamp(min=0)]
        own = torch.einsum("bij,ijhv,bjhv->bihv", seen_BLL.to(u_BLHV.dtype), weights, u_BLHV)
        goes_on_BL = (ids_BL == before_B[:, None]).to(u_BLHV.dtype)
        moved = torch.einsum("lhnk,bhkv->blhnv", powers.matrix_LHNN[:length], state)
        read = torch.einsum("hvn,blhnv->blhv", C_HVN, moved) * goes_on_BL[..., None, None]
        late_BL = seen_BLL[:, -1].to(u_BLHV.dtype)
        added = torch.einsum("bl,lhn,blhv->bhnv", late_BL, powers.written_LHN[:length].flip(0), u_BLHV)
        return own + read, moved[:, -1] * goes_on_BL[:, -1, None, None, None] + added

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """As in the base class; what an entering state does to outputs is a scan of zeros."""
        o_BTHV, final = self.scan(rows, how, None)
        zeros = rows._replace(v=torch.zeros_like(rows.v))
        tokens, ids_BT = rows.v.shape[1], how.document_ids_BT
        whole_B = o_BTHV.new_ones(len(o_BTHV)) if ids_BT is None else (ids_BT[:, 0] == ids_BT[:, -1]).to(o_BTHV.dtype)
        power_HNN = torch.linalg.matrix_power(self.mixer.discretize()[0], tokens).to(final.dtype)
        transfer = power_HNN * whole_B.to(final.dtype)[:, None, None, None]
        return OpenScan(o_BTHV, lambda state: self.scan(zeros, how, state)[0], final, transfer)

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        wide = state_BHKV.dtype
        matrix_HNN, written_HN = (part.to(wide) for part in self.mixer.discretize())
        state = matrix_HNN @ state_BHKV + written_HN[..., None] * rows.v.to(wide)[:, :, None]
        return torch.einsum("hvn,bhnv->bhv", self.mixer.C.to(wide), state).to(rows.v.dtype), state

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Forward FLOPs per token: the matrix times a state, its input, and its read."""
        return num_heads * value_dim * (2.0 * key_dim**2 + 4.0 * key_dim)
