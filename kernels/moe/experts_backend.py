"""Which library multiplies the rows of experts where all else runs in Triton: our grouped products, or PyTorch's.

Which is faster depends on the GPU and on the rows of an expert, so it is found as tiles are: `amfm bench kernels
--tune` times both after the tiles that it has chosen, the answer is an entry of the GPU's table, and all ranks of a
run take rank 0's. A
run may also say it: `use_experts_backend`.
"""

from __future__ import annotations

from torch import Tensor

from amfm.kernels.moe.torch_grouped import ALIGNMENT_BYTES, FIRST_CAPABILITY, takes_grouped

SETTINGS = ("auto", "triton", "torch")
_CANDIDATES = ({"TORCH": 0}, {"TORCH": 1})
# What this process was told last.
_TOLD = ["auto"]


def use_experts_backend(setting: str) -> None:
    """From now on experts' products of this process run so wherever other kernels run in Triton; "auto" asks the tuned table.

    Raises ValueError for an unknown setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"kernels.experts must be one of {', '.join(SETTINGS)}; got {setting!r}")
    _TOLD[:] = [setting]


def multiplies_by_torch(x_RD: Tensor, up_EFD: Tensor, down_EDF: Tensor, height: int) -> bool:
    """Whether PyTorch's grouped product takes these rows; height: rows of our products' tiles, few for few rows per
    expert.

    Raises ValueError if it was told to and this GPU, dtype or width lacks it.
    """
    if _TOLD[0] == "triton":
        return False
    takes = takes_grouped(x_RD, up_EFD, down_EDF)
    if _TOLD[0] == "torch":
        if not takes and x_RD.device.type == "cuda":
            widths = (x_RD.shape[1], up_EFD.shape[1], down_EDF.shape[2])
            raise ValueError(
                f"kernels.experts=torch needs compute capability {FIRST_CAPABILITY}.0, bfloat16, and rows of a multiple of "
                f"{ALIGNMENT_BYTES} bytes; got {x_RD.dtype} and widths {widths}. Use kernels.experts=triton"
            )
        return True
    if not takes:
        return False
    from amfm.kernels.runtime.tuning import CHOICE, config_for

    return bool(config_for(f"experts_{CHOICE}", (x_RD.dtype, height), _CANDIDATES, x_RD.device)["TORCH"])
