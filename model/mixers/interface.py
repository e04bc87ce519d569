"""What every mixer takes and gives: build context, states for decoding, outputs, and the class that all mixers derive from.

A mixer is a function of the residual stream and the document layout that returns an addend of the residual stream; blocks own norm and
residual. States are values and not buffers of the module: the same model can decode several texts, and a state can be kept,
copied or dropped by who called. Whatever a model, an engine or pruning does to blocks besides is a method of `Mixer` with a
default that does nothing, so that they ask every block alike. A package's mixer gives the abstract methods of `SequenceMixer`
(or of `Mixer`, where a token reads no other) and gets sharded initial values, checkpoints, decoding and FLOP counts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from amfm.model.config.rope import RopeConfig
from amfm.model.config.schema import GuideConfig
from amfm.model.config.section import Section
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import Float32Buffers


@dataclass(frozen=True)
class BuildContext:
    """Where a mixer is built: the model's sizes, its groups and backend, and its place among the sequence mixers.

    order counts the mixers before it that mix over the sequence, count all of them: what a decay that weakens with depth
    reads. mixers: the options of all registered mixers. guide: of factored matrices. number, alike: blocks of its kind
    before it, and all of them, for options that say something of each.
    """

    hidden_size: int
    norm_epsilon: float
    order: int
    count: int
    groups: ProcessGroupCollection
    backend: str
    mixers: Section
    guide: GuideConfig | None = None
    number: int = 0
    alike: int = 1

    def options_of(self, name: str) -> Any:
        """Look up the options of another registered mixer, for one that wraps it."""
        return getattr(self.mixers, name)


class Mixer(Float32Buffers):
    """The mixer of a block, built from its options and a `BuildContext`; buffers keep float32.

    `shards` says how its own parameters are cut over ranks. A parameter that it does not name is replicated, with equal
    gradients on all ranks. Documents must not read each other: where `meta.boundaries_BT()` is not None, whatever looks at
    other tokens resets there. `has_in_out_updates`: low-rank updates of `in_proj` and `out_proj` are applied (model/lora.py).
    """

    has_in_out_updates: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state the tokens continue it, and the next state is returned.

        Every rank of `groups.tp` and `groups.cp` must call.
        """

    @property
    def travels(self) -> bool:
        """Whether its rows are sent to other ranks and other work may run meanwhile: then it has `steps`."""
        return False

    @property
    def is_graphable(self) -> bool:
        """Whether passes in training launch the same, with the same numbers from the host, whatever documents the rows hold.

        So that a CUDA graph can replay them on a rank that holds all of the model.
        """
        return False

    def steps(self, x_BTD: Tensor, meta: PackMeta) -> Generator[None, None, MixerOutput]:
        """Mix as `forward` does without a state, pausing where rows have set out."""
        raise NotImplementedError(f"{type(self).__name__} has no steps")

    def empty_state(self, num_rows: int) -> BlockState:
        """Build the state before the first token of `num_rows` rows: tensors [B, ...] on the device of the weights."""
        return None

    def sequence_flops(self, sequence_length: int) -> float:
        """Forward FLOPs per token of mixing over the sequence, of the heads on this rank.

        Products with weights are counted elsewhere (`model/flops.py`).
        """
        return 0.0

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw the whole initial value of an own parameter, float32 on the CPU; None: as init.py says for its name."""
        return None

    def reset_buffers(self) -> None:
        """Compute the buffers, on the device of the weights; `HybridModel.initialize` calls it."""

    def set_draw_seed(self, seed: int) -> None:
        """Take the number below 2^63 of which all draws in training are functions."""

    def set_rope(self, rope: RopeConfig) -> None:
        """Take other rotary positions, where they are those of `model.attention`. Parameters stay as they are."""

    def balance_experts(self, counts_E: Tensor) -> None:
        """Move balancing biases after a step; counts_E [E]: the choices of each expert in the whole step, of all ranks."""

    def retire_experts(self, is_retired_E: Tensor) -> None:
        """Never choose these experts again, [E] bool."""

    def note_entropies(self, sums: Tensor | None) -> None:
        """Add, in passes in training, the entropies of tokens' scores and the number of tokens to these sums [2]; None: no longer."""

    def living_bias(self) -> Tensor | None:
        """The balancing bias [E], NaN of retired experts; None if there is none."""
        return None

    def num_retired(self) -> int:
        """Experts that get no token by design. Waits for the device."""
        return 0


class PlainMixer(Mixer):
    """Any module of x [B, T, D] -> y [B, T, D] instead of a mixer, as `block.mixer = module` makes it.

    It is not told where documents begin: give it rows of one document if it reads other tokens. Decoding keeps its inputs and
    computes all of a text again for each token, so the module must be causal.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Call the module, with all inputs so far if there is a state."""
        if not isinstance(state, dict):
            return MixerOutput(self.module(x_BTD))
        seen_BSD = torch.cat([*state.values(), x_BTD], dim=1)
        y_BSD = self.module(seen_BSD)
        return MixerOutput(y_BSD[:, -x_BTD.shape[1] :], {"seen": seen_BSD})

    def empty_state(self, num_rows: int) -> BlockState:
        """No inputs yet."""
        return {}


def as_mixer(module: Tensor | nn.Module) -> Tensor | nn.Module:
    """A module that is not a mixer as one; whatever else is set in a mixer's place stays as it is."""
    if isinstance(module, nn.Module) and not hasattr(module, "balance_experts"):
        return PlainMixer(module)
    return module


class SequenceMixer(Mixer):
    """A mixer of which a token reads others: it decodes with a state."""

    @abstractmethod
    def empty_state(self, num_rows: int) -> MixerState:
        """Build the state before the first token of `num_rows` rows: tensors [B, ...] on the device of the weights."""

    @abstractmethod
    def sequence_flops(self, sequence_length: int) -> float:
        """Forward FLOPs per token of mixing over the sequence, of the heads on this rank."""


class SoftmaxMixer(Mixer):
    """A mixer with the softmax of scores of queries and keys, whose largest log-sum-exps a run may have it note.

    num_heads: of this rank. highest_logits_H: who wants to know them puts a tensor [H] here, and forward passes in training
    raise it in place.
    """

    num_heads: int
    highest_logits_H: Tensor | None = None

    def noted_logits(self) -> Tensor | None:
        """The tensor to raise in this pass; None if no one wants to know, and outside of training."""
        return self.highest_logits_H if self.training else None

    @abstractmethod
    def scale_logits(self, factors_H: Tensor) -> dict[nn.Parameter, Tensor]:
        """The weights whose rows [rows of this rank], times these factors, multiply the scores of each head by its own."""


class MambaState(NamedTuple):
    """Of one Mamba2 block: window_BWC [B, conv_kernel - 1, channels], the last inputs of the convolution in the dtype of
    the activations, and state_BHPN [B, H, P, N] in float32. Its size does not grow with the text."""

    window_BWC: Tensor
    state_BHPN: Tensor


class AttentionCache(NamedTuple):
    """Cache of one attention block: the keys and values of all tokens so far, k_BSJK and v_BSJK [B, S, kv heads, head_dim].

    index_k_BSC: the keys of its indexer, where one chooses what is read.
    """

    k_BSJK: Tensor
    v_BSJK: Tensor
    index_k_BSC: Tensor | None = None


# Of a registered mixer: tensors [B, ...] by name.
MixerState = dict[str, Tensor]


class ParallelState(NamedTuple):
    """Of one block of parallel mixers: the state of each, in order."""

    branches: tuple[BlockState, ...]


BlockState = MambaState | AttentionCache | MixerState | ParallelState | None


class DecodeState(NamedTuple):
    """What a model carries from token to token: a state a block (None if a block has none) and the tokens seen."""

    blocks: tuple[BlockState, ...]
    length: int


class MixerOutput(NamedTuple):
    """What a mixer gives: y_BTD [B, T, D], the addend of the residual stream, before the residual multiplier.

    state: the new one where one was given. auxiliary: weighted auxiliary losses by name, scalars. expert_counts_E [E] int64:
    the choices of each expert, of MoE blocks.
    """

    y_BTD: Tensor
    state: BlockState = None
    auxiliary: dict[str, Tensor] | None = None
    expert_counts_E: Tensor | None = None
