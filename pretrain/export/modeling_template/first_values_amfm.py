"""First values of a new module: what transformers gives weights that no file has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .blocks_amfm import DepthwiseConv, Experts, Mamba2, MixtureOfExperts, RMSNorm
from .delta_mixers_amfm import DeltaNet
from .linear_mixers_amfm import LinearMixer


def give_first_values(module: nn.Module, deviation: float) -> None:
    """Normal ones for matrices, zeros for biases, ones for norms, decays and time steps by range; only its own weights."""
    if isinstance(module, nn.Linear | nn.Embedding):
        init.normal_(module.weight, std=deviation)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
    elif isinstance(module, RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, DepthwiseConv):
        bound = module.weight.shape[1] ** -0.5
        init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, MixtureOfExperts):
        if module.section["expert_bias"]:
            init.zeros_(module.expert_bias)
        if module.down_bias is not None:
            init.zeros_(module.down_bias)
    elif isinstance(module, Experts):
        # Of experts with biases, the biases and the channels that fill the rows are zeros: copies, as parts have no mark.
        up, down = (torch.empty_like(weight).normal_(std=deviation) for weight in (module.up, module.down))
        up[:, :, module.width :], down[:, module.width :] = 0.0, 0.0
        init.copy_(module.up, up)
        init.copy_(module.down, down)
    elif isinstance(module, LinearMixer):
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                init.normal_(parameter, std=deviation)
            else:
                init.zeros_(parameter)
    _give_states_first_values(module)
    own = getattr(module, "give_first_values", None)  # of a package's mixer
    if own is not None:
        own(deviation)
    sinks = getattr(module, "sinks", None)
    if isinstance(sinks, Tensor):
        init.zeros_(sinks)


def _give_states_first_values(module: nn.Module) -> None:
    """What recurrences have: D is one, decays uniform, time steps log-uniform."""
    if isinstance(module, Mamba2):
        init.ones_(module.D)
        init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log_())
    elif isinstance(module, DeltaNet) and module.has_decay:
        init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log_())
    bias = getattr(module, "dt_bias", None)
    if isinstance(bias, Tensor):
        # Time steps log-uniform in 0.001 to 0.1; the bias is their inverse softplus.
        step = torch.empty_like(bias).uniform_(-6.9, -2.3).exp()
        init.copy_(bias, step + torch.log(-torch.expm1(-step)))
