"""Mamba2's mixer from its first projection to its output, as one operation with little to keep for backward.

How: the parts are separate operations (convolution, scan, gated norm, product), and run as such on the torch backend.
Apart they keep for backward what each reads: the projection, the convolved channels, y, and the normed y, and on the way
back gradients of slices are copied together. As one operation in Triton they keep only the projection and y, or not even y,
make the others again, take the gates inside the scan's kernels, and write every gradient into its slice of one buffer (README.md).

Source: Dao and Gu 2024 (arXiv 2405.21060), section 7. No ranks communicate here.

`mix_by_steps` is the definition, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.causal_conv1d.op import WIDTHS, causal_conv1d, convolve_by_steps
from amfm.kernels.common.inputs import check_documents, check_float, check_shape
from amfm.kernels.decay_scan.op import mamba2_by_steps, mamba2_scan
from amfm.kernels.linear.op import linear
from amfm.kernels.low_precision.recipe import recipe_of
from amfm.kernels.mamba2.rank_part import Exchange, MixerSizes
from amfm.kernels.norm.op import gated_rms_norm
from amfm.kernels.norm.torch_impl import normalize_gated
from amfm.kernels.runtime.backend import resolve_backend

__all__ = ["MixerSizes", "mamba2_mix", "mixer_bytes"]


def mamba2_mix(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor,
    sizes: MixerSizes,
    *,
    document_starts_BT: Tensor | None = None,
    chunk_size: int = 64,
    keep_states: bool = False,
    exchange: Exchange | None = None,
    backend: str = "torch",
) -> Tensor:
    """z, x, B, C, dt = projected; x, B, C = silu(conv(x, B, C)); y = scan(x, dt, B, C); norm(y silu(z)) W^T, [B, T, D].

    projected [B, T, X], X = 2 I + 2 G N + H in the order z, x, B, C, dt; conv weight [C, W], bias [C] or None; A_log, D and
    the bias of dt [H]; norm weight [I]; out weight [D, I]. Each row begins from zeros, and so does each document:
    `document_starts_BT` [B, T] int32 is the place in the row of the first token of each token's document
    (`amfm.kernels.common.inputs.first_tokens`), None if rows hold one document.

    keep_states and chunk_size as in `mamba2_scan`, but that without states, as by default, y is made again too. "native"
    keeps both; it takes float32 and the sizes of `amfm.kernels.common.limits.refuse_native_sizes`.

    With an exchange rows are segments of longer rows: it hands them windows and states of the segments before, and all ranks
    that it reaches must call, forward and backward. Only Triton takes one. Raises ValueError for shapes, dtypes or devices
    that do not fit.
    """
    _check(projected_BTX, conv_weight_CW, conv_bias_C, norm_weight_I, out_weight_DI, sizes)
    rows, tokens, _ = projected_BTX.shape
    check_documents(document_starts_BT, rows, tokens, projected_BTX, name="document_starts_BT")
    for name, vector in (("A_log_H", A_log_H), ("D_H", D_H), ("dt_bias_H", dt_bias_H)):
        check_shape(name, vector, (sizes.heads,), projected_BTX)
        check_float(name, vector)
    backend = resolve_backend(backend, projected_BTX.device, "mamba2")
    if exchange is not None and backend != "triton":
        raise ValueError(f'segments with an exchange need backend "triton"; got {backend!r}; call the parts in turn')
    weights = (conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_I, out_weight_DI)
    if backend == "reference":
        wide = torch.float64 if projected_BTX.dtype == torch.float64 else torch.float32
        bias = None if conv_bias_C is None else conv_bias_C.to(wide)
        projected, conv_weight, A_log, D, dt_bias, norm_weight, out_weight = (
            x.to(wide) for x in (projected_BTX, conv_weight_CW, A_log_H, D_H, dt_bias_H, norm_weight_I, out_weight_DI)
        )
        mixed = mix_by_steps(
            projected, conv_weight, bias, A_log, D, dt_bias, norm_weight, out_weight, sizes, document_starts_BT
        )
        return mixed.to(projected_BTX.dtype)
    if backend == "triton":
        from amfm.kernels.mamba2.triton_impl import mix_triton

        settings = sizes, document_starts_BT, chunk_size, keep_states, exchange
        if recipe_of(out_weight_DI) is None:
            return mix_triton(projected_BTX, *weights, *settings)
        # A product of few bits is a separate operation: what it keeps are the codes of the normed rows.
        return linear(mix_triton(projected_BTX, *weights[:-1], None, *settings), out_weight_DI)
    if backend == "native":
        from amfm.kernels.mamba2.native_impl import mix_native

        return linear(mix_native(projected_BTX, *weights[:-1], sizes, document_starts_BT, chunk_size), out_weight_DI)
    z_BTI, inputs_BTC, dt_BTH = projected_BTX.split(sizes.parts(), dim=-1)
    # Starts tell documents apart as ids do.
    convolved_BTC = causal_conv1d(inputs_BTC, conv_weight_CW, conv_bias_C, document_ids_BT=document_starts_BT)
    x, B, C = sizes.split(convolved_BTC)
    scanned = mamba2_scan(
        x, dt_BTH, A_log_H, B, C, D_H, dt_bias_H, document_ids_BT=document_starts_BT, chunk_size=chunk_size
    )
    normed_BTI = gated_rms_norm(
        scanned.y_BTHP.flatten(-2), z_BTI, norm_weight_I, sizes.epsilon, num_groups=sizes.norm_groups
    )
    return linear(normed_BTI, out_weight_DI)


def _check(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    out_weight: Tensor,
    sizes: MixerSizes,
) -> None:
    """Raise ValueError unless the tensors have the sizes that `sizes` says."""
    check_shape("projected_BTX", projected, (-1, -1, sum(sizes.parts())))
    check_float("projected_BTX", projected)
    if 0 in projected.shape:
        raise ValueError(f"projected_BTX needs at least 1 row of 1 token; got {list(projected.shape)}")
    check_shape("conv_weight_CW", conv_weight, (sizes.channels, -1), projected)
    check_float("conv_weight_CW", conv_weight)
    if conv_weight.shape[1] not in WIDTHS:
        raise ValueError(f"conv_weight_CW must have a width of 2, 3 or 4; got {conv_weight.shape[1]}")
    if conv_bias is not None:
        check_shape("conv_bias_C", conv_bias, (sizes.channels,), projected)
    check_shape("norm_weight_I", norm_weight, (sizes.inner,), projected)
    check_shape("out_weight_DI", out_weight, (-1, sizes.inner), projected)
    check_float("out_weight_DI", out_weight, projected)
    if sizes.heads % sizes.groups or sizes.inner % sizes.norm_groups:
        raise ValueError(
            f"the {sizes.groups} groups of B and C must divide the {sizes.heads} heads, and the {sizes.norm_groups} groups of "
            f"the norm the inner width {sizes.inner}"
        )


def mixer_bytes(B: int, T: int, sizes: MixerSizes, *, value_bytes: int = 2, backward: bool = False) -> int:
    """Bytes that must move between the products: projection read, y written and read for the norm, its result written.

    What passes the convolution goes through memory once, because a scan's program reads it 4 tokens back. Backward reads the
    gradient of the normed rows, the projection, convolved channels and y; it writes the convolved channels, their gradient
    (and reads it), the gradient of y (and reads it), the normed rows and the gradient of the projection.
    """
    inner, channels, heads = sizes.parts()
    if backward:
        return B * T * value_bytes * (2 * (inner + channels + heads) + 4 * channels + 5 * inner)
    return B * T * value_bytes * ((inner + channels + heads) + 2 * channels + 3 * inner)


def mix_by_steps(
    projected_BTX: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor,
    out_weight_DI: Tensor,
    sizes: MixerSizes,
    document_starts_BT: Tensor | None,
) -> Tensor:
    """z, x, B, C, dt of the projection; convolution of x, B and C; scan; norm of y silu(z); product with the output's weight."""
    z_BTI, inputs_BTC, dt_BTH = projected_BTX.split(sizes.parts(), dim=-1)
    convolved_BTC = convolve_by_steps(inputs_BTC, conv_weight_CW, conv_bias_C, document_starts_BT, None)
    x, B, C = sizes.split(convolved_BTC)
    y_BTHP, _, _ = mamba2_by_steps(x, dt_BTH, A_log_H, B, C, D_H, dt_bias_H, document_starts_BT, None)
    normed_BTI = normalize_gated(y_BTHP.flatten(-2), z_BTI, norm_weight_I, sizes.epsilon, sizes.norm_groups)
    return torch.nn.functional.linear(normed_BTI, out_weight_DI)
