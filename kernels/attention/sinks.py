"""Attention with sinks by kernels that know none: through their log-sum-exp, or with one more channel and key.

A sink z adds e^z to a head's sum of weights and nothing to its values, so with lse' = log(e^lse + e^z) the output is
o' = o e^(lse - lse'). Backward of attention reads only o and lse besides its inputs. Given o' and lse' in their place it makes
the probabilities with sinks and all gradients of them, and the sink's is -sum e^(z - lse') <do, o'>. So a library's own forward
and backward serve, of which PyTorch's for processors hands the log-sum-exp out.

Elsewhere a key of one more channel stands before the others: q' = [q, z / scale], k' = [0, 1], v' = 0. Its score is z, any
attention computes it, and heads become a few channels wider.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of tensor cores' operands are multiples of this many channels.
_CHANNELS = 8


def attend_with_sinks(
    q_BHTK: Tensor,
    k_BJSK: Tensor,
    v_BJSK: Tensor,
    sinks_H: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    causal: bool,
) -> Tensor:
    """As scaled_dot_product_attention of q [B, H, T, K], k and v [B, J, S, K] -> [B, H, T, K]; mask [.., T, S] of bools, or None."""
    if k_BJSK.shape[1] != q_BHTK.shape[1]:
        repeat = q_BHTK.shape[1] // k_BJSK.shape[1]
        k_BJSK, v_BJSK = (x.repeat_interleave(repeat, dim=1) for x in (k_BJSK, v_BJSK))
    if not _has_log_sums(q_BHTK):
        return _attend_wider(q_BHTK, k_BJSK, v_BJSK, sinks_H, mask, scale, causal=causal)
    if mask is not None:
        mask = q_BHTK.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    y: Tensor = _FlashWithSinks.apply(q_BHTK, k_BJSK, v_BJSK, sinks_H, mask, scale, causal)
    return y


def _has_log_sums(q: Tensor) -> bool:
    """Whether PyTorch's attention for this device hands its log-sum-exp out."""
    return q.device.type == "cpu"


class _FlashWithSinks(torch.autograd.Function):
    """PyTorch's flash attention for processors, its output and log-sum-exp replaced by those with sinks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        together = torch.logaddexp(lse, sinks_H[:, None].to(lse.dtype))
        o = o * (lse - together).exp()[..., None].to(o.dtype)
        ctx.scale, ctx.causal = scale, causal
        ctx.save_for_backward(q, k, v, sinks_H, o, together, mask)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, o, together, mask = ctx.saved_tensors
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0], q, k, v, o, together, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        weights = (sinks_H[:, None].to(together.dtype) - together).exp()
        d_sinks = -(weights * torch.linalg.vecdot(grads[0], o).to(together.dtype)).sum((0, 2))
        return d_q, d_k, d_v, d_sinks.to(sinks_H.dtype), None, None, None


def _attend_wider(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, mask: Tensor | None, scale: float, *, causal: bool
) -> Tensor:
    """The same with one more key, and one more query so that a causal call stays one; differentiated by PyTorch."""
    batch, heads, _, size = q.shape
    more = _CHANNELS - size % _CHANNELS
    # A query and a key more, before the others; of the query's channels the first new one is the sink's.
    score_H1 = (sinks_H.to(torch.promote_types(q.dtype, torch.float32)) / scale).to(q.dtype)[:, None]
    channel = score_H1.expand(batch, heads, q.shape[2])[..., None]
    wide_q = F.pad(torch.cat([q, channel], dim=-1), (0, more - 1, 1 if causal else 0, 0))
    key = F.pad(k.new_ones(batch, heads, 1, 1), (size, more - 1))
    wide_k = torch.cat([key, F.pad(k, (0, more))], dim=2)
    wide_v = F.pad(v, (0, more, 1, 0))
    wide_mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    y = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=wide_mask, is_causal=causal, scale=scale)
    return y[:, :, 1 if causal else 0 :, :size]
