"""What every mixer of a block takes and gives, and what it carries from token to token while decoding."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MambaState(NamedTuple):
    """Of one Mamba2 block: window_BWC [B, conv_kernel - 1, channels], the last inputs of the convolution in the dtype of
    the activations, and state_BHPN [B, H, P, N] in float32. Its size does not grow with the text."""

    window_BWC: Tensor
    state_BHPN: Tensor


class AttentionCache(NamedTuple):
    """Of one attention block: the keys and values of all tokens so far, k_BSJK and v_BSJK [B, S, kv heads, head_dim]."""

    k_BSJK: Tensor
    v_BSJK: Tensor


# Of a registered mixer: tensors [B, ...] by name.
MixerState = dict[str, Tensor]

BlockState = MambaState | AttentionCache | MixerState | None


class DecodeState(NamedTuple):
    """What a model carries from token to token: a state a block (None where a block has none) and the tokens seen."""

    blocks: tuple[BlockState, ...]
    length: int


class MixerOutput(NamedTuple):
    """y_BTD; the block's new state when one was given; weighted auxiliary losses by name; tokens each expert got."""

    y_BTD: Tensor
    state: BlockState = None
    auxiliary: dict[str, Tensor] | None = None
    expert_counts_E: Tensor | None = None
