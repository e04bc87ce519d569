"""Mamba2's mixer up to its second projection on a CPU: one operation each way in C (native.c), in float32.

In bf16 inputs are widened for the C code and results rounded; what is kept between the two ways, but inputs, stays float32.

It keeps the projection, the convolved channels, y before the norm, the states that enter chunks of 64 tokens, dt with its
decays, and the norm's r; gradients of z, x, B, C and dt are slices of one buffer. Bits are the same for any number of threads.
Rows are the unit of work where they are two a thread; else blocks of tokens and groups of heads are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from amfm.kernels.common.custom_op import differentiate, fake_of
from amfm.kernels.common.limits import NATIVE_CHUNK as CHUNK
from amfm.kernels.common.limits import NATIVE_MULTIPLE as MULTIPLE
from amfm.kernels.common.limits import refuse_native_sizes
from amfm.kernels.mamba2.rank_part import MixerSizes
from amfm.kernels.runtime.native import MAMBA2, MAMBA2_STEP, call_native, find_openmp

_BLOCK = 128  # tokens a job of the convolution and of the norm
_JOBS = 8  # a group's heads are scanned in parts where rows and groups are fewer
_TENSORS = (
    *("projected", "taps", "conv_bias", "A_log", "D", "dt_bias", "norm_weight", "starts"),
    *("convolved", "y", "states", "gates", "reciprocal", "out", "d_out"),
    *("d_projected", "d_convolved", "d_y", "d_shared", "d_taps", "d_heads", "d_norm"),
    *("taps_by_job", "heads_by_row", "norm_by_job", "scratch", "window", "entering", "leaving"),
)


def mix_native(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    sizes: MixerSizes,
    document_starts_BT: Tensor | None,
    chunk_size: int,
) -> Tensor:
    """The normed rows [B, T, I] of `reference.mix_by_steps`, in the dtype of the projection: float32 or bf16.

    Raises ValueError for another dtype and for sizes that the code does not take.
    """
    refusal = refuse_native_sizes(chunk_size, sizes.state, sizes.head_dim)
    given = (projected_BTX, conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_I)
    others = {x.dtype for x in given if x is not None} - {torch.float32, torch.bfloat16}
    if refusal is None and others:
        refusal = f"native code takes float32 and bf16; got {', '.join(sorted(map(str, others)))}"
    if refusal is not None:
        raise ValueError(f'{refusal}: use backend "torch"')
    starts = None if document_starts_BT is None else document_starts_BT.int().contiguous()
    packed = (None if x is None else x.contiguous() for x in given)
    return _forward(*packed, starts, sizes.numbers, sizes.epsilon)[0]


def continue_native(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    window_BWC: Tensor,
    state_BHPN: Tensor,
    sizes: MixerSizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `step_native`, for T tokens of one document in each row: normed [B, T, I], window and state after them."""
    weights = conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_I
    if projected_BTX.shape[1] == 1:
        normed_BI, next_BWC, next_BHPN = step_native(projected_BTX[:, 0], *weights, window_BWC, state_BHPN, sizes)
        return normed_BI[:, None], next_BWC, next_BHPN
    projected = projected_BTX.contiguous()
    _, inputs_BTC, _ = projected.split(sizes.parts(), dim=-1)
    seen_BSC = torch.cat([window_BWC.new_zeros(len(projected), 3, sizes.channels), window_BWC, inputs_BTC], dim=1)
    width = window_BWC.shape[1]
    tensors = dict(
        zip(("out", "convolved", "y", "states", "gates", "reciprocal"), _results_like(projected, sizes)),
        window=seen_BSC[:, width : width + 3].contiguous(),
        entering=state_BHPN.transpose(-1, -2).contiguous(),
        leaving=state_BHPN.new_empty(*state_BHPN.shape[:2], sizes.state, sizes.head_dim),
    )
    _call("mix_forward", projected, sizes, {**_inputs(projected, *weights, None), **tensors})
    leaving_BHPN = tensors["leaving"].transpose(-1, -2).contiguous()
    return tensors["out"], seen_BSC[:, seen_BSC.shape[1] - width :].contiguous(), leaving_BHPN


def takes_state(projected: Tensor) -> bool:
    """Whether tokens that continue a state are computed here: in float32, if no one asks for gradients."""
    return projected.dtype == torch.float32 and not torch.is_grad_enabled()


def step_native(
    projected_BX: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    window_BWC: Tensor,
    state_BHPN: Tensor,
    sizes: MixerSizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """From a row of the projection to its normed row: normed [B, I], and the window [B, W - 1, C] and state after it.

    All float32 on the CPU; the state before is [B, H, P, N]. Bits of a row do not depend on the number of rows. No gradients.
    """
    rows = len(projected_BX)
    window, state = window_BWC.contiguous(), state_BHPN.contiguous()
    made = window.new_empty(rows, sizes.inner), torch.empty_like(window), torch.empty_like(state)
    integers = {
        "rows": rows,
        "heads": sizes.heads,
        "head_dim": sizes.head_dim,
        "groups": sizes.groups,
        "state": sizes.state,
        "norm_groups": sizes.norm_groups,
        "width": conv_weight_CW.shape[1],
    }
    tensors = {
        "projected": projected_BX.contiguous(),
        "taps": conv_weight_CW,
        "conv_bias": conv_bias_C,
        "A_log": A_log_H,
        "D": D_H,
        "dt_bias": dt_bias_H,
        "norm_weight": norm_weight_I,
        "window": window,
        "entering": state,
        "next_window": made[1],
        "leaving": made[2],
        "convolved": window.new_empty(sizes.channels),
        "out": made[0],
    }
    call_native(MAMBA2_STEP, "step_forward", integers, {"epsilon": sizes.epsilon}, tensors)
    return made


@torch.library.custom_op("amfm::mamba2_native", mutates_args=())
def _forward(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    starts: Tensor | None,
    numbers: list[int],
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normed rows, and what is kept: convolved channels, y, states that enter chunks, dt and its decays, the norm's r."""
    sizes = MixerSizes.of(numbers, epsilon)
    results = _results_like(projected, sizes)
    tensors = dict(zip(("out", "convolved", "y", "states", "gates", "reciprocal"), results))
    given = _inputs(projected, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, starts)
    _call("mix_forward", projected, sizes, {**given, **tensors})
    return (results[0].to(projected.dtype), *results[1:])


@fake_of(_forward)
def _(given: Any) -> tuple[Tensor, ...]:
    results = _results_like(given.projected, MixerSizes.of(given.numbers, given.epsilon))
    return (results[0].to(given.projected.dtype), *results[1:])


@torch.library.custom_op("amfm::mamba2_native_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    starts: Tensor | None,
    convolved: Tensor,
    y: Tensor,
    states: Tensor,
    gates: Tensor,
    reciprocal: Tensor,
    numbers: list[int],
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the projection in its dtype; in float32 of four taps and the bias of each channel [5, C], of A_log,
    dt_bias and D [3, H], of the norm's weight.
    """
    sizes, new = MixerSizes.of(numbers, epsilon), y.new_empty
    rows, tokens, _ = projected.shape
    jobs, shared = rows * -(-tokens // _BLOCK), 2 * sizes.groups * sizes.state
    results = _gradients_like(projected, sizes)
    kept = {"convolved": convolved, "y": y, "states": states, "gates": gates, "reciprocal": reciprocal}
    made = dict(zip(("d_projected", "d_taps", "d_heads", "d_norm"), results)) | {
        "d_convolved": new(convolved.shape),
        "d_y": new(y.shape),
        "d_shared": new(_count_parts(rows, sizes) - 1, rows, tokens, shared),
        "taps_by_job": new(jobs, 5, sizes.channels),
        "heads_by_row": new(rows, 3, sizes.heads),
        "norm_by_job": new(jobs, sizes.inner),
    }
    given = _inputs(projected, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, starts)
    _call("mix_backward", projected, sizes, {**given, **kept, **made, "d_out": d_out.float().contiguous()})
    return (results[0].to(projected.dtype), *results[1:])


@fake_of(_backward)
def _(given: Any) -> tuple[Tensor, ...]:
    results = _gradients_like(given.projected, MixerSizes.of(given.numbers, given.epsilon))
    return (results[0].to(given.projected.dtype), *results[1:])


def _unpack(results: tuple[Tensor, ...], kept: Any) -> dict[str, Tensor | None]:
    d_projected, d_taps, d_heads, d_norm_weight = results
    width = kept.conv_weight.shape[1]
    found = {
        "projected": d_projected,
        "conv_weight": d_taps[4 - width : 4].t().contiguous(),
        "conv_bias": None if kept.conv_bias is None else d_taps[4],
        **dict(zip(("A_log", "dt_bias", "D"), d_heads)),
        "norm_weight": d_norm_weight,
    }
    return {name: None if d is None else d.to(getattr(kept, name).dtype) for name, d in found.items()}


differentiate(_forward, _backward, outputs=("out", "convolved", "y", "states", "gates", "reciprocal"), unpack=_unpack)


def _results_like(projected: Tensor, sizes: MixerSizes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what forward gives, in float32."""
    (rows, tokens, _), new = projected.shape, partial(projected.new_empty, dtype=torch.float32)
    return (
        new(rows, tokens, sizes.inner),
        new(rows, tokens, sizes.channels),
        new(rows, tokens, sizes.inner),
        new(rows, -(-tokens // CHUNK), sizes.heads, sizes.state, sizes.head_dim),
        new(2 * rows * sizes.heads * tokens + CHUNK),
        new(rows, tokens, sizes.norm_groups),
    )


def _gradients_like(projected: Tensor, sizes: MixerSizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what backward gives, in float32."""
    new = partial(projected.new_empty, dtype=torch.float32)
    return new(projected.shape), new(5, sizes.channels), new(3, sizes.heads), new(sizes.inner)


def _inputs(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    starts: Tensor | None,
) -> dict[str, Tensor | None]:
    """What both ways read, by its name in native.c, in float32: taps as rows of channels, always four, the missing ones zero."""
    channels, width = conv_weight.shape
    taps = conv_weight.new_zeros(4, channels, dtype=torch.float32)
    taps[4 - width :] = conv_weight.t()
    bias = conv_weight.new_zeros(channels) if conv_bias is None else conv_bias
    names = ("projected", "taps", "conv_bias", "A_log", "D", "dt_bias", "norm_weight")
    return dict(zip(names, (x.float() for x in (projected, taps, bias, A_log, D, dt_bias, norm_weight))), starts=starts)


def _count_parts(rows: int, sizes: MixerSizes) -> int:
    """Into how many parts the heads of a group are divided: by shape, so that sums have one order on every machine."""
    return min(sizes.heads // sizes.groups, max(1, _JOBS // (rows * sizes.groups)))


def _call(function: str, projected: Tensor, sizes: MixerSizes, tensors: dict[str, Tensor | None]) -> None:
    """Call a function of native.c, with memory for each of its threads."""
    rows, tokens, _ = projected.shape
    N, P, threads = sizes.state, sizes.head_dim, torch.get_num_threads()
    scan = 4 * CHUNK * CHUNK + CHUNK * P + 3 * CHUNK * N + N * P + 3 * CHUNK + sizes.heads // sizes.groups * N * P
    length = -(-max(scan, sizes.channels) // MULTIPLE) * MULTIPLE
    scratch = projected.new_empty(threads, length, dtype=torch.float32)
    integers = {
        "rows": rows,
        "tokens": tokens,
        "heads": sizes.heads,
        "head_dim": P,
        "groups": sizes.groups,
        "state": N,
        "norm_groups": sizes.norm_groups,
        "parts": _count_parts(rows, sizes),
        "threads": threads,
        "scratch_size": scratch.shape[1],
    }
    given = {name: tensors.get(name) for name in _TENSORS}
    given["scratch"] = scratch
    call_native(MAMBA2, function, integers, {"epsilon": sizes.epsilon}, given, parallel=find_openmp())
