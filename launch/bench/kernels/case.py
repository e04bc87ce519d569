"""One case of `amfm bench kernels --audit`, and the goal that its counted traffic is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Goal:
    """At most `limit` times `bytes`; `text` says what that is."""

    text: str
    bytes: float
    limit: float


@dataclass(frozen=True)
class AuditCase:
    """A call to count: a function of leaves, what must move and be multiplied each way, and the goals."""

    op: str
    shape: str
    leaves: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    forward: tuple[int, int]
    backward: tuple[int, int] | None
    forward_goal: Goal | None = None
    backward_goal: Goal | None = None
    # Operations left to PyTorch's own products in forward, and the bytes that those move.
    library: tuple[int, int] = (0, 0)
