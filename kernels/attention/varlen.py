"""Attention inside documents by PyTorch's variable-length attention, which is FlashAttention over documents laid end to end.

It works only on a GPU, for bfloat16 and float16, and its interface is young: torch 2.10 brought it, scale, windows and
grouped heads came later. Whether it can serve is found from the version and the function's own parameters, so a release
that takes other arguments is passed over instead of failing in the first step; our kernel (`triton_impl.py`) serves there.

torch 2.15 prefers cuDNN for it on Hopper and Blackwell. cuDNN builds and keeps a plan for each pair of a number of documents and
a longest document (40 ms of the host, pytorch#191576), and nearly every micro-batch brings another pair. FlashAttention
takes both as plain numbers, so only it is let in.

Which FlashAttention PyTorch's attention runs: its own version 2, or a newer one that is installed.

torch 2.15 can hand its attention over to FlashAttention 3 (Hopper) or 4 (Blackwell), packages of their own, and does so only where
it is asked (`torch.nn.attention.activate_flash_attention_impl`). From then on all attention of the process goes there, so the
ranks of a run ask alike.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.attention as torch_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from amfm.kernels.runtime.compiling import assume_constant

OWN = "FA2"
# By compute capability: the version, and the module that must be installed for it.
NEWER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute.interface")}
# Of a head's channels, with gradients.
LARGEST_HEADS = {"FA4": 128}

_activate: Callable[[str], None] | None = getattr(torch_attention, "activate_flash_attention_impl", None)


def activate_newest(capability: int) -> tuple[str, str]:
    """Hand attention over to the newest FlashAttention for GPUs of a compute capability; returns which, and why no newer one.

    Nothing changes if there is none: torch is too old, the package is not installed, or it cannot be imported.
    """
    if _activate is None:
        return OWN, f"torch {torch.__version__} cannot hand over to another; torch 2.15 can"
    if capability not in NEWER:
        return OWN, f"there is no newer one for compute capability {capability}"
    name, module = NEWER[capability]
    listed: Sequence[str] = torch_attention.list_flash_attention_impls()
    if name not in listed:
        return OWN, f"torch {torch.__version__} does not list {name}"
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return OWN, f"{name} is not installed (module {module})"
    try:
        _activate(name)
    except (ImportError, OSError, RuntimeError) as error:
        restore()
        return OWN, f"{name} is installed and cannot be used: {error}"
    return name, ""


def restore() -> None:
    """Go back to PyTorch's own."""
    if active() is not None:
        torch_attention.restore_flash_attention_impl()


def active() -> str | None:
    """The newer FlashAttention that runs; None if PyTorch's own does."""
    current: Callable[[], Any] | None = getattr(torch_attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def largest_head() -> int:
    """The most channels of a head that the FlashAttention that runs takes, with gradients."""
    return LARGEST_HEADS.get(active() or OWN, 256)


FIRST_TORCH = (2, 10)
PARAMETERS = ("cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", "enable_gqa")
_MODULE = "torch.nn.attention.varlen"
_varlen_attention: Any = None


@dataclass(frozen=True)
class DocumentEnds:
    """Documents of all rows laid end to end: `offsets` [N + 1] int32, first token of each and the end; the longest one's tokens.

    If there are more keys than queries, `offsets` are those of queries, and `key_offsets` and `longest_keys` the same of keys: a
    document's last query is that of its last key, and a document may have only keys.
    """

    offsets: Tensor
    longest: int
    key_offsets: Tensor | None = None
    longest_keys: int = 0

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> DocumentEnds:
        """Apply a function to every tensor."""
        keys = None if self.key_offsets is None else change(self.key_offsets)
        return replace(self, offsets=change(self.offsets), key_offsets=keys)


def refuse_varlen(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why PyTorch's variable-length attention does not serve such heads here; None if it does."""
    reason = _refuse_own_release()
    if reason is not None:
        return reason
    if torch.are_deterministic_algorithms_enabled():
        return "FlashAttention's gradients are added in any order, and train.deterministic asks for one"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bfloat16 or float16, not {dtype}"
    if head_dim % 8 or head_dim > largest_head():
        return f"it supports heads of up to {largest_head()} channels in multiples of 8, not {head_dim}"
    return None


@assume_constant
def _refuse_own_release() -> str | None:
    """What `_refuse_release` says of this torch, of which torch.compile need know no more."""
    return _refuse_release(torch.__version__)


@assume_constant
def _load() -> None:
    """Import PyTorch's function once: its module imports half a compiler, which a CPU has no use for.

    Its place is a global, which torch.compile reads; into an import it cannot look.
    """
    global _varlen_attention  # noqa: PLW0603
    _varlen_attention = importlib.import_module(_MODULE).varlen_attn


@functools.cache
def _refuse_release(version: str) -> str | None:
    """Why a release of torch does not have it as it is called here; None if it does."""
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    if (major, minor) < FIRST_TORCH:
        return f"torch {version} does not have it; torch 2.10 and later do"
    _load()
    missing = [name for name in PARAMETERS if name not in inspect.signature(_varlen_attention).parameters]
    return f"that of torch {version} does not accept {', '.join(missing)}" if missing else None


def attention_varlen(
    q_BTHK: Tensor, k_BSJK: Tensor, v_BSJK: Tensor, ends: DocumentEnds, scale: float, window: int | None
) -> Tensor:
    """As `attention_reference` for rows of documents: [B, T, H, K].

    Which documents there are is only in `ends`. A window leaves each query `window` keys, its own among them. FlashAttention
    lets the last query of a document see its last key, and each one before it one key less.
    """
    heads = q_BTHK.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BSJK, v_BSJK))
    key_offsets, longest_keys = (
        (ends.offsets, ends.longest) if ends.key_offsets is None else (ends.key_offsets, ends.longest_keys)
    )
    before = -1 if window is None else window - 1
    _load()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y: Tensor = _varlen_attention(
            q, k, v, ends.offsets, key_offsets, ends.longest, longest_keys,
            scale=scale, window_size=(before, 0), enable_gqa=heads != k.shape[1],
        )  # fmt: skip
    return y.view(q_BTHK.shape)
