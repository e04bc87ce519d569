"""Which library makes products where all else runs in Triton: our kernels or PyTorch's (CUTLASS, cuBLASLt).

It depends on the GPU and on the sizes, so it is found as tiles are: `amfm bench kernels --tune` verifies and times both after the
tiles that it has chosen, the answer is an entry of the GPU's table, and all ranks of a run take rank 0's. A run may also say it:
`use_product_backend`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

# `kernels.experts`; what is timed of both, and what this process was told last.
PRODUCT_BACKENDS = ("auto", "triton", "torch")
_LIBRARIES = ({"TORCH": 0}, {"TORCH": 1})
_TOLD = ["auto"]


def use_product_backend(setting: str) -> None:
    """From now on products of this process run so wherever other kernels run in Triton; "auto" asks the tuned table.

    Raises ValueError for an unknown setting.
    """
    if setting not in PRODUCT_BACKENDS:
        raise ValueError(f"kernels.experts must be one of {', '.join(PRODUCT_BACKENDS)}; got {setting!r}")
    _TOLD[:] = [setting]


@contextmanager
def product_backend(setting: str) -> Iterator[None]:
    """`use_product_backend` inside the block."""
    before = _TOLD[0]
    use_product_backend(setting)
    try:
        yield
    finally:
        _TOLD[:] = [before]


def chooses_torch(products: str, shape: Sequence[object], device: torch.device, lacks: str) -> bool:
    """Whether PyTorch makes these products, `products` being the name of their entry in the table and `shape` its key.

    lacks: what this GPU or these operands lack for it, empty for nothing. Raises ValueError if it was told to and they lack it.
    """
    if _TOLD[0] == "triton":
        return False
    if _TOLD[0] == "torch":
        if lacks and device.type == "cuda":
            raise ValueError(f"kernels.experts=torch needs {lacks}. Use kernels.experts=triton")
        return True
    if lacks:
        return False
    from amfm.kernels.runtime.tuning import CHOICE, config_for  # which imports Triton

    return bool(config_for(f"{products}_{CHOICE}", shape, _LIBRARIES, device)["TORCH"])
