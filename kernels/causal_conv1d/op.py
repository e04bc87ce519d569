"""Short causal depthwise convolution, with SiLU or without, restarted at documents, and its one-token step.

Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.4, where it precedes the selective scan; Dao and Gu 2024
(arXiv 2405.21060) convolves x, B and C together. LFM2 (arXiv 2511.23404) gates it instead of a SiLU.

How: a token of another document counts as a zero input. The initial window counts as W - 1 tokens of the row's first
document. Triton's kernels read it where a tile begins before the row; for PyTorch's it is prepended to the row, and the
outputs of those tokens are cut off again.

`convolve_by_steps` is the definition, one token at a time, that every other form is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from amfm.kernels.causal_conv1d.torch_impl import convolve
from amfm.kernels.common.inputs import check_documents, check_float, check_shape, drop_single_document
from amfm.kernels.runtime.backend import resolve_backend

WIDTHS = (2, 3, 4)
ACTIVATIONS = ("silu", "none")


def causal_conv1d(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    document_ids_BT: Tensor | None = None,
    initial_window_BWC: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """y_t = silu(bias + sum_w weight[:, w] x_(t-W+1+w)), over inputs of the token's own document only.

    With `activation="none"` the sum itself.

    x [B, T, C]; weight [C, W] with W of 2, 3 or 4, its last column meeting the token itself; bias [C] or None.
    Document ids are integers [B, T], equal inside a document. initial_window [B, W - 1, C] holds the inputs before
    the row, oldest first; they belong to the document of the row's first token. Sums are float32 (float64 for
    float64 inputs).

    Returns y [B, T, C] in the dtype of x. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_shape("x_BTC", x_BTC, (-1, -1, -1))
    B, T, C = x_BTC.shape
    W = _check_weights(weight_CW, bias_C, C, x_BTC)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    silu = activation == "silu"
    if T == 0:
        raise ValueError("x_BTC needs at least 1 token a row; got 0")
    check_documents(document_ids_BT, B, T, x_BTC)
    if initial_window_BWC is not None:
        check_shape("initial_window_BWC", initial_window_BWC, (B, W - 1, C), x_BTC)
    backend = resolve_backend(backend, x_BTC.device, "causal_conv1d")
    wide = torch.float64 if x_BTC.dtype == torch.float64 else torch.float32
    if backend == "reference":
        y = convolve_by_steps(
            x_BTC.to(wide),
            weight_CW.to(wide),
            None if bias_C is None else bias_C.to(wide),
            document_ids_BT,
            None if initial_window_BWC is None else initial_window_BWC.to(wide),
            silu=silu,
        )
        return y.to(x_BTC.dtype)
    document_ids_BT = drop_single_document(document_ids_BT)
    if backend == "triton":
        from amfm.kernels.causal_conv1d.triton_impl import convolve_triton

        return convolve_triton(x_BTC, weight_CW, bias_C, document_ids_BT, initial_window_BWC, silu)
    if initial_window_BWC is None:
        return convolve(x_BTC, weight_CW, bias_C, document_ids_BT, silu)
    # The window's tokens get the id of the row's first token: that is the document it belongs to.
    longer = torch.cat([initial_window_BWC.to(x_BTC.dtype), x_BTC], dim=1)
    if document_ids_BT is not None:
        document_ids_BT = torch.cat([document_ids_BT[:, :1].expand(-1, W - 1), document_ids_BT], dim=1)
    return convolve(longer, weight_CW, bias_C, document_ids_BT, silu)[:, W - 1 :]


def causal_conv1d_step(
    x_BC: Tensor, window_BWC: Tensor, weight_CW: Tensor, bias_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d` for decoding: from the last W - 1 inputs to (y [B, C], the new window [B, W - 1, C]).

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_shape("x_BC", x_BC, (-1, -1))
    B, C = x_BC.shape
    W = _check_weights(weight_CW, bias_C, C, x_BC)
    check_shape("window_BWC", window_BWC, (B, W - 1, C), x_BC)
    wide = torch.float64 if x_BC.dtype == torch.float64 else torch.float32
    inputs_BWC = torch.cat([window_BWC, x_BC[:, None].to(window_BWC.dtype)], dim=1)
    total = (inputs_BWC.to(wide) * weight_CW.to(wide).t()).sum(1)
    if bias_C is not None:
        total = total + bias_C.to(wide)
    return F.silu(total).to(x_BC.dtype), inputs_BWC[:, 1:]


def _check_weights(weight_CW: Tensor, bias_C: Tensor | None, channels: int, x: Tensor) -> int:
    """Raise ValueError unless weight [C, W] and bias [C] fit x; returns W."""
    check_float("x", x)
    check_shape("weight_CW", weight_CW, (channels, -1), x)
    check_float("weight_CW", weight_CW)
    if bias_C is not None:
        check_shape("bias_C", bias_C, (channels,), x)
        check_float("bias_C", bias_C)
    width = weight_CW.shape[1]
    if width not in WIDTHS:
        raise ValueError(f"weight_CW must have a width of 2, 3 or 4; got {width}")
    return width


def convolution_flops(B: int, T: int, C: int, W: int, *, backward: bool = False) -> int:
    """Floating-point operations: W multiply-adds a value, and three times as many in backward; SiLU counts as 4."""
    return B * T * C * ((6 * W + 8) if backward else (2 * W + 4))


def convolution_bytes(B: int, T: int, C: int, *, value_bytes: int = 2, backward: bool = False) -> int:
    """Bytes that must move: x and y, or x, dy and dx; the taps are small."""
    return B * T * C * value_bytes * (3 if backward else 2)


def convolve_by_steps(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    document_ids_BT: Tensor | None,
    initial_window_BWC: Tensor | None,
    *,
    silu: bool = True,
) -> Tensor:
    """y_t = silu(bias + sum_w weight_w x_(t-W+1+w)) over the inputs of the token's own document; missing ones are 0.

    x [B, T, C], weight [C, W], bias [C] or None, initial window [B, W - 1, C] (the inputs before the row, of
    the document of its first token) -> [B, T, C], in the dtype of x. For tests: a Python step for each token
    and tap.
    """
    B, T, C = x_BTC.shape
    W = weight_CW.shape[1]
    outputs = []
    for t in range(T):
        total = x_BTC.new_zeros(B, C) if bias_C is None else bias_C.expand(B, C)
        for w in range(W):
            source = t - (W - 1) + w
            if source >= 0:
                value, document = x_BTC[:, source], source
            elif initial_window_BWC is not None:
                # The window belongs to the document of the row's first token.
                value, document = initial_window_BWC[:, source + W - 1], 0
            else:
                continue
            if document_ids_BT is not None:
                own = (document_ids_BT[:, document] == document_ids_BT[:, t])[:, None]
                value = torch.where(own, value, torch.zeros_like(value))
            total = total + weight_CW[:, w] * value
        outputs.append(F.silu(total) if silu else total)
    return torch.stack(outputs, dim=1)
