"""What every mixer takes and gives: build context, states for decoding, outputs, and the class that plugins derive from."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config.section import Section
from model.packing import PackMeta
from model.parallel.groups import ProcessGroupCollection
from model.parallel.layers import Float32Buffers


@dataclass(frozen=True)
class BuildContext:
    """Where a mixer is built: the model's sizes, its groups and backend, and its place among the sequence mixers.

    order counts the mixers before it that mix over the sequence (attention, Mamba2 and registered ones), count all of
    them: what a decay that weakens with depth reads. mixers: the options of all registered mixers.
    """

    hidden_size: int
    norm_epsilon: float
    order: int
    count: int
    groups: ProcessGroupCollection
    backend: str
    mixers: Section

    def options_of(self, name: str) -> Any:
        """The options of a registered mixer, for one that wraps it."""
        return getattr(self.mixers, name)


class SequenceMixer(Float32Buffers):
    """A registered mixer: `shards` places its own parameters, buffers keep float32."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """x [B, T, D] -> y [B, T, D]; with a state it goes on from there and returns the next one."""

    @abstractmethod
    def empty_state(self, num_rows: int) -> MixerState:
        """The state before the first token of `num_rows` rows."""

    @abstractmethod
    def sequence_flops(self, sequence_length: int) -> float:
        """Operations a token of mixing over the sequence, forward, of all heads on one rank; products with weights are counted elsewhere."""

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """The whole first value of an own parameter, float32 on the CPU; None: as init.py says for its name."""
        return None

    def reset_buffers(self) -> None:
        """Computes the buffers, on the device of the weights; `HybridModel.initialize` calls it."""


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
