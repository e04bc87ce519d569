"""MesaNet: linear attention that reads as the best linear map from keys to values would.

Linear attention reads S^T q with S = sum of w_s beta_s k_s v_s^T, w the decays since; here q is first divided by what keys have in
common: o = S^T x, where (H + diag(lambda)) x = q and H = sum of w_s beta_s k_s k_s^T. S^T x is then the prediction at q of the ridge
regression from all keys of the document so far to their values.

H of every token is never there: conjugate gradients only multiply it by a vector, and H_t p_t of all tokens is what a decay scan
reads that writes keys as values. So a solve of n iterations is n scans, in float32. Backward solves the same equation once more for the
gradient of x, in place of differentiating the iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.kernels.decay_scan.op import decay_scan, decay_step
from amfm.model.mixers.base import LinearMixer, Part
from amfm.model.mixers.delta import unit_length
from amfm.model.mixers.interface import BuildContext
from amfm.model.mixers.recurrence import OpenScan, Recurrence, ScanRows, ScanSettings
from amfm.model.mixers.shared_layers import GatedHeadNorm
from amfm.model.packing import PackMeta
from amfm.model.parallel.shards import Shard, ShardSpec
from amfm_mixers.options import MesaOptions

Apply = Callable[[Tensor], Tensor]


class MesaRecurrence(Recurrence):
    """Reads x of (H + diag(lambda)) x = q; `erase` holds lambda [B, T, H, K]. States are [B, H, K, K + V]: H, then S."""

    def __init__(self, num_iterations: int) -> None:
        self.num_iterations = num_iterations

    def scan(self, rows: ScanRows, how: ScanSettings, state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        assert rows.beta is not None and rows.g is not None and rows.erase is not None, "all of them are read"
        wide = torch.promote_types(rows.q.dtype, torch.float32)
        q, k, v, beta, ridge = (x.to(wide) for x in (rows.q, rows.k, rows.v, rows.beta, rows.erase))
        written, gate, size = beta[..., None] * k, rows.g, k.shape[-1]
        entered = None if state_BHKV is None else state_BHKV[..., :size].contiguous()

        def apply(p: Tensor) -> Tensor:
            scanned = decay_scan(p, written, k, gate, initial_state_BHKV=entered, **how._asdict())
            return scanned.o_BTHV + ridge * p

        solve = partial(conjugate_gradients, apply, num_iterations=self.num_iterations)
        with torch.no_grad():
            x = solve(q)
        x = _Solved.apply(q - apply(x), x, solve)
        both = torch.cat([k, v], dim=-1)
        scanned = decay_scan(x, written, both, gate, initial_state_BHKV=state_BHKV, **how._asdict())
        return scanned.o_BTHV[..., size:].to(rows.v.dtype), scanned.final_state_BHKV

    def scan_with_transfer(self, rows: ScanRows, how: ScanSettings) -> OpenScan:
        """Not there: what is read is not linear in the state that enters."""
        raise NotImplementedError("MesaNet has no context ranks")

    def step(self, rows: ScanRows, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        assert rows.beta is not None and rows.g is not None and rows.erase is not None, "all of them are read"
        wide, size = torch.promote_types(rows.q.dtype, state_BHKV.dtype), rows.k.shape[-1]
        q, k, v, beta, ridge = (x.to(wide) for x in (rows.q, rows.k, rows.v, rows.beta, rows.erase))
        _, state = decay_step(q, beta[..., None] * k, torch.cat([k, v], dim=-1), rows.g, state_BHKV)

        def apply(p: Tensor) -> Tensor:
            return torch.einsum("bhkj,bhj->bhk", state[..., :size], p) + ridge * p

        x = conjugate_gradients(apply, q, self.num_iterations)
        return torch.einsum("bhk,bhkv->bhv", x, state[..., size:]), state

    def flops(self, num_heads: int, key_dim: int, value_dim: int) -> float:
        """Forward FLOPs per token: a decay scan of K x K and 10 for each channel an iteration, and the scan that reads.

        value_dim: K + V, the columns of the state. One scan more says what of q the solution leaves.
        """
        solve = (self.num_iterations + 1) * (5.0 * key_dim + 10.0) * key_dim
        return num_heads * (solve + 5.0 * key_dim * value_dim)


def conjugate_gradients(apply: Apply, q: Tensor, num_iterations: int) -> Tensor:
    """Solve A x = q for vectors of the last dim, of a symmetric positive definite A; 0 for q = 0.

    Source: Hestenes and Stiefel 1952, "Methods of Conjugate Gradients for Solving Linear Systems", section 3.
    """
    tiny = torch.finfo(q.dtype).tiny
    x, rest, p = torch.zeros_like(q), q, q
    size = rest.square().sum(-1, keepdim=True)
    for _ in range(num_iterations):
        applied = apply(p)
        step = size / (p * applied).sum(-1, keepdim=True).clamp(min=tiny)
        x, rest = x + step * p, rest - step * applied
        left = rest.square().sum(-1, keepdim=True)
        p, size = rest + left / size.clamp(min=tiny) * p, left
    return x


class _Solved(torch.autograd.Function):
    """x of A x = q, given what of q it leaves: q - A x, whose gradient is A^-1 times that of x."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, x: Tensor, solve: Apply) -> Tensor:
        ctx.solve = solve
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.solve(grads[0]), None, None


class MesaMixer(LinearMixer):
    """q and k of unit length, v as it is projected, beta and decay = sigmoid, lambda = softplus + `least_ridge` a channel; heads are normed.

    Source: von Oswald et al. 2025, arXiv 2506.05233, section 3.
    """

    options: MesaOptions

    def __init__(self, options: MesaOptions, build: BuildContext) -> None:
        super().__init__(options, build)
        self.recurrence = MesaRecurrence(options.num_iterations)
        by_head = Shard((ShardSpec(0, "tp", (options.num_heads,)),))
        by_key = ShardSpec(0, "tp", (options.num_heads * self.key_dim,), (options.num_heads,))
        self.beta_bias = nn.Parameter(torch.empty(self.num_heads))
        self.decay_bias = nn.Parameter(torch.empty(self.num_heads))
        self.ridge_logit = nn.Parameter(torch.empty(self.num_heads * self.key_dim))
        self.shards |= {"beta_bias": by_head, "decay_bias": by_head, "ridge_logit": Shard((by_key,))}
        self.norm = GatedHeadNorm(self.value_dim, build)

    def parts(self) -> dict[str, Part]:
        """q, k and v, beta and decay, each by head."""
        heads = self.options.num_heads
        keys = Part(heads * self.key_dim, heads)
        return {"q": keys, "k": keys, "v": Part(heads * self.value_dim, heads)} | dict.fromkeys(
            ("beta", "decay"), Part(heads, heads)
        )

    def convolved(self) -> tuple[str, ...]:
        """Name q and k."""
        return ("q", "k")

    def rows(self, parts: dict[str, Tensor], meta: PackMeta) -> ScanRows:
        """Pointwise in time; all but q, k and v in float32 for bf16."""
        if self.conv is None:
            parts |= {name: functional.silu(parts[name]) for name in self.convolved()}
        q_BTHK, k_BTHK = (unit_length(self.heads(parts[name])) for name in self.convolved())
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        beta_BTH = (parts["beta"].to(wide) + self.beta_bias.to(wide)).sigmoid()
        g_BTH = functional.logsigmoid(parts["decay"].to(wide) + self.decay_bias.to(wide))
        ridge_HK = self.heads(functional.softplus(self.ridge_logit.to(wide)) + self.options.least_ridge)
        return ScanRows(q_BTHK, k_BTHK, self.heads(parts["v"]), g_BTH, beta_BTH, ridge_HK.expand_as(q_BTHK))

    def output(self, o_BTHV: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Norm o by head: [B, T, H, V] -> [B, T, H V]."""
        return self.norm(o_BTHV, None)

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Start biases at 0, and lambda at 1 or at the least that it can be."""
        if name == "ridge_logit":
            return torch.full(shape, max(1.0 - self.options.least_ridge, 1e-3)).expm1().log()
        return torch.zeros(shape) if name in ("beta_bias", "decay_bias") else None
