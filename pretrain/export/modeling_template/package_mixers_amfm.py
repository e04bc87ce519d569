"""Mixers, routers and heads of packages by name: an export writes this file with those of its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

PACKAGE_MIXERS: dict[str, type[nn.Module]] = {}
# Of the configuration; the normed stream [B, T, D] -> logits [B, T, V].
PACKAGE_HEADS: dict[str, type[nn.Module]] = {}
# Of logits [R, E] and the section of moe: ids [R, K], E for no expert, and weights [R, K].
PACKAGE_ROUTERS: dict[str, Callable[[Tensor, dict[str, Any]], tuple[Tensor, Tensor]]] = {}
