"""PyTorch's AdamW for runs that compile nothing."""

from __future__ import annotations

import inspect

import torch


class AdamW(torch.optim.AdamW):
    """Without the graph breaks around each step, for which the first one would import torch.compile; the same numbers."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
