"""The model: embedding, blocks of the pattern, norm, head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from kernels.backend import resolve_backend
from kernels.linear_cross_entropy.op import CrossEntropy
from model.attention import AttentionMixer
from model.checks import check_model
from model.config import ModelConfig
from model.feed_forward import FeedForwardMixer
from model.groups import ProcessGroupCollection
from model.init import initialize_parameters
from model.layers import ColumnLinear, RMSNorm, VocabEmbedding
from model.loss import head_cross_entropy, head_logits
from model.mamba2 import Mamba2Mixer
from model.mixer import BlockState, DecodeState, MixerOutput
from model.moe import MoeMixer
from model.packing import PackMeta
from model.pattern import parse_pattern

MIXERS: dict[str, type[nn.Module]] = {
    "M": Mamba2Mixer,
    "*": AttentionMixer,
    "E": MoeMixer,
    "-": FeedForwardMixer,
}


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass gives.

    logits_BTV [B, T, V] without labels, else None; loss the cross entropy with labels, else None; auxiliary the weighted
    losses of the routers summed over blocks, by name (empty in eval mode); expert_counts the token choices each expert
    got, [E] int64 by block index; state the decode state after these tokens when one was given.
    """

    logits_BTV: Tensor | None
    loss: CrossEntropy | None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    state: DecodeState | None = None


class Block(nn.Module):
    """A pre-norm residual block: x + mixer(norm(x)), with the addition left to the next norm, which reads both anyway."""

    def __init__(self, letter: str, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> None:
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, backend)
        self.mixer = MIXERS[letter](config, groups, backend)

    def forward(
        self, residual_BTD: Tensor, delta_BTD: Tensor | None, meta: PackMeta, state: BlockState = None
    ) -> tuple[Tensor, MixerOutput]:
        """The stream is residual + delta. Returns it summed, and the mixer's output, which is the next delta."""
        if delta_BTD is None:
            normed_BTD = self.norm(residual_BTD)
        else:
            normed_BTD, residual_BTD = self.norm.add(delta_BTD, residual_BTD)
        return residual_BTD, self.mixer(normed_BTD.to(self.norm.weight.dtype), meta, state)


class HybridModel(nn.Module):
    """A hybrid decoder built from a pattern string; every rank of `groups.tp` must build and call it alike.

    Parameters have torch's default dtype at first; `.bfloat16()` casts them all, and the model then computes in bf16
    except where a block says float32. On the meta device nothing is allocated or initialised: move with `to_empty` and
    call `initialize`. Raises ValueError for a configuration that breaks a rule, for groups it cannot be built on and for
    a backend that this device does not have.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: ProcessGroupCollection,
        *,
        backend: str = "torch",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_model(config)
        _check_groups(groups)
        pattern = parse_pattern(config.pattern)
        target = torch.device(device if device is not None else "cpu")
        backend = resolve_backend(backend, target)
        self.config, self.groups, self.pattern, self.backend, self.seed = config, groups, pattern, backend, seed
        with target:
            self.embedding = VocabEmbedding(config.vocab_size, config.hidden_size, groups)
            self.blocks = nn.ModuleList([Block(letter, config, groups, backend) for letter in pattern.letters])
            self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon, backend)
            self.head = None
            if not config.tie_embeddings:
                self.head = ColumnLinear(config.hidden_size, (config.vocab_size,), groups, name="model.vocab_size")
        if target.type != "meta":
            self.initialize()

    def initialize(self) -> None:
        """First values of all parameters and buffers, functions of the seed and each name alone."""
        for module in self.modules():
            if isinstance(module, (AttentionMixer, MoeMixer)):
                module.reset_buffers()
        initialize_parameters(self, self.config, self.groups, self.seed)

    def compile_blocks(self, *, compiler: str = "inductor") -> None:
        """Compiles the mixer of every block with torch.compile (`compiler` is its backend), from the next call on.

        One graph serves all blocks of a kind; rows with and without document boundaries, training and evaluation each
        have their own. What is compiled is the mixer and not the block: torch bounds the graphs of one function, and all
        kinds of blocks share theirs.
        """
        for block in self.blocks:
            cast(Block, block).mixer.compile(backend=compiler)

    def forward(
        self,
        tokens_BT: Tensor,
        meta: PackMeta,
        labels_BT: Tensor | None = None,
        state: DecodeState | None = None,
    ) -> ModelOutput:
        """Tokens [B, T] to logits, or with labels [B, T] (-100: does not count) to the loss without making logits.

        With a state (from `empty_state`, or the last output's) the tokens follow those that made it: give rows of one
        document whose positions go on, `PackMeta.one_document_a_row(rows, tokens, start=state.length)`.
        """
        if state is not None:
            _check_continues(meta, state)
        residual_BTD = self.embedding(tokens_BT)
        if self.config.residual_in_fp32:
            residual_BTD = residual_BTD.to(torch.promote_types(residual_BTD.dtype, torch.float32))
        delta_BTD: Tensor | None = None
        auxiliary: dict[str, Tensor] = {}
        expert_counts: dict[int, Tensor] = {}
        block_states: list[BlockState] = []
        for index, block in enumerate(self.blocks):
            residual_BTD, mixed = block(residual_BTD, delta_BTD, meta, None if state is None else state.blocks[index])
            delta_BTD = mixed.y_BTD
            block_states.append(mixed.state)
            if mixed.expert_counts_E is not None:
                expert_counts[index] = mixed.expert_counts_E
            for name, value in (mixed.auxiliary or {}).items():
                auxiliary[name] = auxiliary[name] + value if name in auxiliary else value
        assert delta_BTD is not None, "a pattern has at least one block"
        hidden_BTD = self.final_norm.add(delta_BTD, residual_BTD)[0].to(self.final_norm.weight.dtype)
        next_state = None if state is None else DecodeState(tuple(block_states), state.length + tokens_BT.shape[1])
        if labels_BT is None:
            return ModelOutput(
                head_logits(hidden_BTD, self.head_weight(), self.groups), None, auxiliary, expert_counts, next_state
            )
        loss = head_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.head_weight(),
            labels_BT.flatten(),
            self.groups,
            z_loss_weight=self.config.logits_z_loss_weight,
            backend=self.backend,
        )
        return ModelOutput(None, loss, auxiliary, expert_counts, next_state)

    def head_weight(self) -> Tensor:
        """The matrix [V of this rank, D] that makes logits: the head's, or the embedding's when they are tied."""
        return cast(Tensor, self.embedding.weight if self.head is None else self.head.weight)

    def empty_state(self, num_rows: int) -> DecodeState:
        """The decode state of `num_rows` rows before their first token."""
        mixers = [cast(Block, block).mixer for block in self.blocks]
        return DecodeState(
            tuple(
                mixer.empty_state(num_rows) if isinstance(mixer, (Mamba2Mixer, AttentionMixer)) else None
                for mixer in mixers
            ),
            0,
        )

    def update_expert_bias(self, counts: dict[int, Tensor]) -> None:
        """Moves the balancing bias of each MoE block, by block index, against the loads of the whole step.

        Sum `ModelOutput.expert_counts` over micro-batches and data ranks first, then call on every rank.
        """
        for index, counts_E in counts.items():
            mixer = cast(Block, self.blocks[index]).mixer
            assert isinstance(mixer, MoeMixer), f"block {index} is {self.pattern.letters[index]!r}, not 'E'"
            mixer.update_expert_bias(counts_E)


def _check_groups(groups: ProcessGroupCollection) -> None:
    """Axes that no block is cut over yet must have one rank."""
    for axis in ("cp", "ep", "pp"):
        group = getattr(groups, axis, None)
        if group is not None and group.size() > 1:
            raise ValueError(
                f"the {axis} group has {group.size()} ranks; no block is cut over it: give {axis} one rank"
            )


def _check_continues(meta: PackMeta, state: DecodeState) -> None:
    if not meta.single_document:
        raise ValueError("a decode state holds one document a row; pass rows without document boundaries")
    if meta.first_continues != (state.length > 0):
        raise ValueError(
            f"the decode state has seen {state.length} tokens but the rows {'go on' if meta.first_continues else 'begin'} "
            "a document; build them with PackMeta.one_document_a_row(rows, tokens, start=state.length)"
        )
