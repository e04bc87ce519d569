"""Which FlashAttention PyTorch's attention runs: its own version 2, or a newer one that is installed.

torch 2.15 can hand its attention over to FlashAttention 3 (Hopper) or 4 (Blackwell), packages of their own, and does so only where
it is asked (`torch.nn.attention.activate_flash_attention_impl`). From then on all attention of the process goes there, so the
ranks of a run ask alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.attention as torch_attention

OWN = "FA2"
# By compute capability: the version, and the module that must be installed for it.
NEWER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute.interface")}
# Of a head's channels, with gradients.
LARGEST_HEADS = {"FA4": 128}

_activate: Callable[[str], None] | None = getattr(torch_attention, "activate_flash_attention_impl", None)


def activate_newest(capability: int) -> tuple[str, str]:
    """Hand attention over to the newest FlashAttention for GPUs of a compute capability; returns which, and why no newer one.

    Nothing changes where there is none: torch is too old, the package is not installed, or it cannot be imported.
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
    """The newer FlashAttention that runs; None where PyTorch's own does."""
    current: Callable[[], Any] | None = getattr(torch_attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def largest_head() -> int:
    """The most channels of a head that the FlashAttention that runs takes, with gradients."""
    return LARGEST_HEADS.get(active() or OWN, 256)
