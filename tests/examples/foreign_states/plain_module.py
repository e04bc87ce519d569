"""A tree of plain modules with the parameters and buffers of a checkpoint, for programs without amfm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def build(keys: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> nn.Module:
    """Modules with the parameters and buffers that the keys of a checkpoint's file name, filled with noise."""
    root = nn.Module()
    for key in [key for key in keys if key.startswith(("weight/", "buffer/"))]:
        name = key.split("/")[1]
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        if key.startswith("buffer/"):
            place.register_buffer(last, torch.randn_like(keys[key]))
        else:
            place.register_parameter(last, nn.Parameter(torch.randn(shapes[name])))
    return root
