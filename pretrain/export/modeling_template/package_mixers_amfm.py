"""Mixers of packages by name: an export writes this file with those of its model."""

from __future__ import annotations

from torch import nn

PACKAGE_MIXERS: dict[str, type[nn.Module]] = {}
