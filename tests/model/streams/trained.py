"""A small model whose residual stream is read by other weights than those that it began with."""

from __future__ import annotations

import torch

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from tests.model.small_models import small_model


def trained_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> HybridModel:
    """The model of `small_model`, to whose readers of the stream random numbers are added."""
    model = small_model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".stream." in name:
                value += 0.7 * torch.randn(value.shape, generator=generator).to(value.dtype)
    return model
