"""Expert feed-forward by PyTorch's grouped product: the torch path on a GPU, where a loop would wait for the row
counts, and where all else runs in Triton if it is chosen (`kernels/runtime/product_backend.py`).

One call multiplies the rows of all experts, each by its expert's matrix, with the ends of experts read on the device. What
`torch_loop` does expert by expert is done for all sorted rows at once here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amfm.kernels.moe.torch_loop import BackwardInputs, activate, activation_backward, open_activation
from amfm.kernels.runtime.product_backend import chooses_torch

# Rows of operands must begin at multiples of this many bytes.
ALIGNMENT_BYTES = 16
# Older GPUs get a loop that waits for the counts, as ours does.
FIRST_CAPABILITY = 9


def multiplies_by_torch(x_RD: Tensor, up_EFD: Tensor, down_EDF: Tensor, height: int) -> bool:
    """Whether PyTorch's grouped product takes these rows; height: rows of our products' tiles, few for few rows per
    expert.

    Raises ValueError if it was told to and this GPU, dtype or width lacks it.
    """
    lacks = ""
    if not takes_grouped(x_RD, up_EFD, down_EDF):
        widths = (x_RD.shape[1], up_EFD.shape[1], down_EDF.shape[2])
        lacks = (
            f"compute capability {FIRST_CAPABILITY}.0, bfloat16, and rows of a multiple of {ALIGNMENT_BYTES} bytes; got "
            f"{x_RD.dtype} and widths {widths}"
        )
    return chooses_torch("experts", (x_RD.dtype, height), x_RD.device, lacks)


def takes_grouped(x_RD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> bool:
    """Whether PyTorch's grouped product takes these operands: on Hopper and later, in bfloat16, where rows are aligned."""
    if x_RD.device.type != "cuda" or x_RD.dtype != torch.bfloat16:
        return False
    widths = (x_RD.shape[1], up_EFD.shape[1], down_EDF.shape[2])
    aligned = all(width * x_RD.element_size() % ALIGNMENT_BYTES == 0 for width in widths)
    aligned = aligned and all(begins_aligned(operand) for operand in (x_RD, up_EFD, down_EDF))
    return aligned and torch.cuda.get_device_capability(x_RD.device)[0] >= FIRST_CAPABILITY


def begins_aligned(operand: Tensor) -> bool:
    """Whether an operand begins at a multiple of ALIGNMENT_BYTES.

    Weights are end to end in DeepSpeed's flat tensors: a matrix after an odd number of others' numbers begins anywhere. Its
    place in its storage is asked, which allocators align, and not its address: fake tensors have none.
    """
    return int(operand.storage_offset()) * operand.element_size() % ALIGNMENT_BYTES == 0


def grouped_forward(
    x_RD: Tensor,
    weights_S: Tensor | None,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Output rows in sorted order [S, D], and hidden rows [S, F] before the activation, as `torch_loop.loop_forward`."""
    rows_SD = _take(x_RD, token_ids_S)
    hidden_SF = _multiply(rows_SD, up_EFD.transpose(1, 2), offsets_E)
    active_SF = activate(hidden_SF, activation)
    if weights_S is not None:
        active_SF.mul_(weights_S[:, None])
    return _multiply(active_SF, down_EDF.transpose(1, 2), offsets_E), hidden_SF


def grouped_backward(given: BackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x in sorted order [S, D], of weights [S] (empty without them), of up and of down, as `loop_backward`."""
    dx_SD, d_weights_S, active_SF, d_hidden_SF = grouped_input_gradients(given)
    places = given.token_ids_S, given.offsets_E
    halves = grouped_weight_gradients(given.dy_RD, given.x_RD, active_SF, d_hidden_SF, *places)
    return dx_SD, d_weights_S, *halves


def grouped_input_gradients(given: BackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x in sorted order [S, D] and of weights [S] (empty without them), weighted activations, gradient of hidden rows."""
    dy_RD, x_RD, hidden_SF, weights_S, token_ids_S, offsets_E, up_EFD, down_EDF, activation = given
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    dy_SD = _take(dy_RD, token_ids_S)
    active_SF, factor_SF = open_activation(hidden_SF, activation)
    d_active_SF = _multiply(dy_SD, down_EDF, offsets_E)
    d_weights_S = x_RD.new_empty(0)
    if weights_S is not None:
        d_weights_S = torch.linalg.vecdot(d_active_SF.to(wide), active_SF.to(wide)).to(weights_S.dtype)
        d_active_SF.mul_(weights_S[:, None])
        active_SF.mul_(weights_S[:, None])
    d_hidden_SF = activation_backward(d_active_SF, hidden_SF, factor_SF, activation)
    return _multiply(d_hidden_SF, up_EFD, offsets_E), d_weights_S, active_SF, d_hidden_SF


def grouped_weight_gradients(
    dy_RD: Tensor,
    x_RD: Tensor,
    active_SF: Tensor,
    d_hidden_SF: Tensor,
    token_ids_S: Tensor | None,
    offsets_E: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of up and down, from what `grouped_input_gradients` gives of activations and hidden rows."""
    d_down_EDF = _multiply_outer(_take(dy_RD, token_ids_S), active_SF, offsets_E)
    return _multiply_outer(d_hidden_SF, _take(x_RD, token_ids_S), offsets_E), d_down_EDF


def _take(x_RD: Tensor, token_ids_S: Tensor | None) -> Tensor:
    """Rows in sorted order."""
    return x_RD if token_ids_S is None else x_RD.index_select(0, token_ids_S)


def _multiply(rows_SA: Tensor, weights_EAB: Tensor, offsets_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix: [S, B]."""
    product: Tensor = torch._grouped_mm(rows_SA, weights_EAB, offs=offsets_E)
    return product


def _multiply_outer(left_SA: Tensor, right_SB: Tensor, offsets_E: Tensor) -> Tensor:
    """left^T right over each expert's rows: [E, A, B], zeros for an expert without rows.

    The zeros are written here: that a product without terms is cleared is promised nowhere.
    """
    product: Tensor = torch._grouped_mm(left_SA.t(), right_SB, offs=offsets_E)
    is_empty_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)) == 0
    return product.masked_fill_(is_empty_E[:, None, None], 0.0)
