"""How many bytes a model carries from token to token while decoding, counted on its empty state."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.groups import single_rank_groups
from model.hybrid import HybridModel
from model.mixer import AttentionCache


def state_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the decode state of one sequence after `num_tokens` tokens, with weights of `dtype`; allocates nothing.

    A key-value cache gets one entry a token; recurrent states and convolution windows have one size from the start.
    """
    model = HybridModel(config, single_rank_groups(), device="meta").to(dtype)
    return sum(_count(state, num_tokens) for state in model.empty_state(1).blocks)


def _count(state: object, num_tokens: int) -> int:
    if isinstance(state, AttentionCache):
        return sum(num_tokens * tensor[0, :0].new_empty(tensor.shape[2:]).nbytes for tensor in state)
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(_count(part, num_tokens) for part in state) if isinstance(state, tuple) else 0
