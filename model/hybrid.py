"""The hybrid model: embedding, the blocks of a pattern string, final norm and head.

    stream = embed(tokens)                                # [B, T, D]
    for block in pattern:
        stream = stream + block.mixer(block.norm(stream))        # times a multiplier, if set
    logits = head(final_norm(stream))

Blocks differ in their mixer alone (build.py), which mixes over the sequence (Mamba2, attention, registered mixers) or
over channels (mixture of experts, dense feed-forward). Every mixer gets the `PackMeta` that keeps documents apart.

Residual and delta: a block does not add its output to the stream. Between blocks the stream is a pair, the residual and
the newest mixer's output (delta), because the next norm must read both and adds them in the same pass over memory. The
residual may be wider than the weights (`residual_in_fp32`). What else blocks give (auxiliary losses, expert counts, decode
states) collects in `Stream` on the way and ends in `ModelOutput`.

Pieces: a pipeline rank holds one or several runs of consecutive blocks. A model that is built with `pieces` has only
those, under their indices in the whole pattern, so names, initial values and checkpoints do not depend on how the model is
cut. Its owner calls `embed`, `pass_blocks` and `finish` itself and sends residual + delta on as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.backend import resolve_backend
from kernels.linear_cross_entropy.op import CrossEntropy
from model.build import build_mixer
from model.config.checks import check_model
from model.config.mup import logits_multiplier
from model.config.schema import ModelConfig, RopeConfig
from model.init import initialize_parameters, named_seed
from model.loss import head_cross_entropy, head_logits
from model.mixers.attention import AttentionMixer
from model.mixers.interface import BlockState, DecodeState, MixerOutput, SequenceMixer
from model.mixers.mamba2 import Mamba2Mixer
from model.moe.block import MoeMixer
from model.packing import PackMeta
from model.parallel.groups import ProcessGroupCollection
from model.parallel.layers import ColumnLinear, RMSNorm, VocabEmbedding
from model.parallel.regions import enter_tensor_region
from model.pipeline_split import Piece, whole_piece


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns.

    logits_BTV [B, T, V]: without labels, else None. loss: sums of the cross entropy with labels, else None. auxiliary: weighted
    auxiliary losses summed over blocks, by name; empty in eval mode. expert_counts: token choices of each expert, [E] int64
    by block index. state: the decode state after these tokens, when one was given. predictions_BT: the most likely token
    after each, [B, T] int64, where labels and predictions were asked for.
    """

    logits_BTV: Tensor | None
    loss: CrossEntropy | None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    state: DecodeState | None = None
    predictions_BT: Tensor | None = None


class Block(nn.Module):
    """Pre-norm residual block, x + multiplier * mixer(norm(x)); the addition is left to the next norm.

    With `recomputes` only the block's input is kept for the backward pass, which computes the rest again (Chen et al. 2016,
    arXiv 1604.06174).
    """

    def __init__(self, index: int, config: ModelConfig, groups: ProcessGroupCollection, backend: str) -> None:
        super().__init__()
        self.letter = config.letters[index]
        self.recomputes = False
        self.multiplier = config.multipliers.residual
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, backend, groups)
        self.mixer = build_mixer(index, config, groups, backend)

    def forward(
        self, residual_BTD: Tensor, delta_BTD: Tensor | None, meta: PackMeta, state: BlockState = None
    ) -> tuple[Tensor, MixerOutput]:
        """Add delta to residual, both [B, T, D], and mix: returns the sum, and the mixer's output as the next delta.

        The residual keeps its own dtype; the mixer reads the normed sum in the dtype of the weights.
        """
        if self.recomputes and torch.is_grad_enabled():
            assert state is None, "decoding has no backward pass"
            # The sum is made outside: it is what the checkpoint keeps, one tensor in place of residual and delta.
            if delta_BTD is not None:
                residual_BTD = residual_BTD + delta_BTD.to(residual_BTD.dtype)
            mixed: MixerOutput = checkpoint(self._mix, residual_BTD, meta, use_reentrant=False)
            return residual_BTD, mixed._replace(y_BTD=_multiply(mixed.y_BTD, self.multiplier))
        if delta_BTD is None:
            normed_BTD = self.norm(residual_BTD)
        else:
            normed_BTD, residual_BTD = self.norm.add(delta_BTD, residual_BTD)
        mixed = self.mixer(normed_BTD.to(self.norm.weight.dtype), meta, state)
        return residual_BTD, mixed._replace(y_BTD=_multiply(mixed.y_BTD, self.multiplier))

    def _mix(self, residual_BTD: Tensor, meta: PackMeta) -> MixerOutput:
        mixed: MixerOutput = self.mixer(self.norm(residual_BTD).to(self.norm.weight.dtype), meta)
        return mixed


class Blocks(nn.Module):
    """The blocks that this rank holds, registered under their index in the whole pattern.

    A ModuleList would number them from 0 on every pipeline rank, and names of parameters would depend on the cut.
    """

    def __init__(self, blocks: dict[int, Block]) -> None:
        super().__init__()
        for index, block in blocks.items():
            self.add_module(str(index), block)

    def __getitem__(self, index: int) -> Block:
        return cast(Block, self._modules[str(index)])

    def __iter__(self) -> Iterator[Block]:
        return iter(cast(dict[str, Block], self._modules).values())

    def __len__(self) -> int:
        return len(self._modules)

    def indices(self) -> list[int]:
        """Indices of the blocks held here, in order."""
        return [int(name) for name in self._modules]


@dataclass
class Stream:
    """What flows from block to block.

    residual_BTD + delta_BTD [B, T, D] is the residual stream; delta is None before the first block. auxiliary, expert_counts
    and states: what the blocks passed so far have given, as in `ModelOutput`.
    """

    residual_BTD: Tensor
    delta_BTD: Tensor | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    states: list[BlockState] = field(default_factory=list)


class HybridModel(nn.Module):
    """A hybrid decoder built from a pattern string; every rank of `groups.tp` must build and call it alike.

    With `pieces` it is what one pipeline rank holds: their blocks, the embedding with the first piece, final norm and head
    with the last (and there, when they are tied, a copy of the embedding, named in `copied_parameters`). Such a model is
    not called: its owner passes the stream from `embed` through `pass_blocks` to `finish`.

    Parameters have torch's default dtype; `.bfloat16()` casts them all, and the model then computes in bf16 except where a
    block says float32. On the meta device nothing is allocated or initialised: move with `to_empty`, then call
    `initialize`. Raises ValueError for a configuration that breaks a rule, for groups it cannot be built on and for a
    backend that this device does not have.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: ProcessGroupCollection,
        *,
        backend: str = "torch",
        seed: int = 0,
        device: torch.device | str | None = None,
        pieces: Sequence[Piece] | None = None,
    ) -> None:
        super().__init__()
        check_model(config)
        _check_groups(groups, has_pieces=pieces is not None)
        pattern = config.parsed_pattern
        target = torch.device(device if device is not None else "cpu")
        backend = resolve_backend(backend, target)
        self.config, self.groups, self.pattern, self.backend, self.seed = config, groups, pattern, backend, seed
        self.pieces = (whole_piece(config),) if pieces is None else tuple(pieces)
        has_first = any(piece.is_first for piece in self.pieces)
        has_last = any(piece.is_last for piece in self.pieces)
        indices = [index for piece in self.pieces for index in piece.blocks]
        # Called with the part whose weights a pass comes to: an engine may still be gathering them.
        self.before_use: Callable[[str], None] = use_at_once
        self.embedding: VocabEmbedding | None = None
        self.final_norm: RMSNorm | None = None
        self.head: ColumnLinear | None = None
        with target:
            if has_first or (has_last and config.tie_embeddings):
                self.embedding = VocabEmbedding(config.vocab_size, config.hidden_size, groups)
            self.blocks = Blocks({index: Block(index, config, groups, backend) for index in indices})
            if has_last:
                self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon, backend, groups)
            if has_last and not config.tie_embeddings:
                self.head = ColumnLinear(config.hidden_size, (config.vocab_size,), groups, name="model.vocab_size")
        for index, mixer in self.routed_mixers():
            mixer.draw_seed = torch.tensor(named_seed(seed, f"blocks.{index}.mixer.draws"))
        self.copied_parameters = frozenset() if has_first or self.embedding is None else frozenset({"embedding.weight"})
        if self.embedding is not None and config.tie_embeddings and not (has_first and has_last):
            # The first and the last pipeline rank each compute a part of the gradient.
            self.embedding.shards["weight"] = replace(self.embedding.shards["weight"], partial=("embd",))
        if target.type != "meta":
            self.initialize()

    def initialize(self) -> None:
        """Fill all parameters and buffers with initial values, each a function of the seed and its name."""
        for module in self.modules():
            if isinstance(module, (AttentionMixer, MoeMixer, SequenceMixer)):
                module.reset_buffers()
        initialize_parameters(self, self.config, self.groups, self.seed)

    def compile_blocks(self, *, compiler: str = "inductor") -> None:
        """Compile the mixer of every block with torch.compile, whose backend is `compiler`; takes effect at the next call.

        One graph serves all blocks of a kind; rows with and without document boundaries, training and evaluation each have
        their own. The mixer is compiled, not the block: torch limits the number of graphs a function may have, and blocks of
        all kinds share one function.
        """
        for block in self.blocks:
            block.mixer.compile(backend=compiler)

    def recompute_blocks(self, letters: Collection[str]) -> None:
        """Recompute blocks of these kinds in backward passes instead of keeping their activations, from the next call on.

        Losses and gradients do not change, in float32 not by a bit.
        """
        for block in self.blocks:
            block.recomputes = block.letter in letters

    def forward(
        self,
        tokens_BT: Tensor,
        meta: PackMeta,
        labels_BT: Tensor | None = None,
        state: DecodeState | None = None,
        *,
        predicts: bool = False,
    ) -> ModelOutput:
        """Compute logits of tokens [B, T]; with labels [B, T] (-100: masked) the loss instead, without making logits.

        predicts: beside the loss also the most likely tokens, which does make logits. state: from `empty_state` or the
        previous output; the tokens continue it, so give rows of one document whose positions go on,
        `PackMeta.one_document_a_row(rows, tokens, start=state.length)`.
        """
        if state is not None:
            _check_continues(meta, state)
        stream = self.pass_blocks(self.embed(tokens_BT), self.blocks.indices(), meta, state)
        output = self.finish(stream, labels_BT, predicts=predicts)
        if state is None:
            return output
        return replace(output, state=DecodeState(tuple(stream.states), state.length + tokens_BT.shape[1]))

    def embed(self, tokens_BT: Tensor) -> Stream:
        """Embed tokens [B, T] (int64): the stream before the first block. Every rank of `groups.tp` must call."""
        assert self.embedding is not None, "the first piece of the pipeline embeds"
        self.before_use("embedding")
        residual_BTD = _multiply(self.embedding(tokens_BT), self.config.multipliers.embedding)
        return Stream(residual_BTD.to(self.stream_dtype()))

    def stream_dtype(self) -> torch.dtype:
        """Dtype of the residual between blocks."""
        dtype = next(self.parameters()).dtype
        return torch.promote_types(dtype, torch.float32) if self.config.residual_in_fp32 else dtype

    def pass_blocks(
        self, stream: Stream, indices: Iterable[int], meta: PackMeta, state: DecodeState | None = None
    ) -> Stream:
        """Pass the stream through the blocks of these indices, adding their auxiliary losses, counts and states to it.

        Returns a new Stream; the one given is not changed. Raises ValueError where `meta` is cut for another number of
        context ranks than the model's. Every rank of `groups.tp`, `groups.cp` and the expert groups must call.
        """
        _check_cut(meta, self.groups)
        residual_BTD, delta_BTD = stream.residual_BTD, stream.delta_BTD
        auxiliary, expert_counts, states = dict(stream.auxiliary), dict(stream.expert_counts), list(stream.states)
        for index in indices:
            self.before_use(f"blocks.{index}")
            block_state = None if state is None else state.blocks[index]
            residual_BTD, mixed = self.blocks[index](residual_BTD, delta_BTD, meta, block_state)
            delta_BTD = mixed.y_BTD
            states.append(mixed.state)
            if mixed.expert_counts_E is not None:
                expert_counts[index] = mixed.expert_counts_E
            for name, value in (mixed.auxiliary or {}).items():
                auxiliary[name] = auxiliary[name] + value if name in auxiliary else value
        return Stream(residual_BTD, delta_BTD, auxiliary, expert_counts, states)

    def finish(self, stream: Stream, labels_BT: Tensor | None, *, predicts: bool = False) -> ModelOutput:
        """Apply final norm and head to the stream after the last block: logits, or with labels the loss and predictions.

        Every rank of `groups.tp` must call; all get the same result.
        """
        assert self.final_norm is not None, "the last piece of the pipeline has the head"
        assert stream.delta_BTD is not None, "a piece has at least one block"
        self.before_use("head")
        if self.head is None:
            self.before_use("embedding")
        hidden_BTD = self.final_norm.add(stream.delta_BTD, stream.residual_BTD)[0].to(self.final_norm.weight.dtype)
        # The head is linear: a factor on what it reads is the factor on the logits.
        hidden_BTD = _multiply(hidden_BTD, logits_multiplier(self.config))
        hidden_BTD = enter_tensor_region(hidden_BTD, self.groups)
        if labels_BT is None:
            logits_BTV = head_logits(hidden_BTD, self.head_weight(), self.groups)
            return ModelOutput(logits_BTV, None, stream.auxiliary, stream.expert_counts)
        loss = head_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.head_weight(),
            labels_BT.flatten(),
            self.groups,
            z_loss_weight=self.config.logits_z_loss_weight,
            backend=self.backend,
        )
        predictions_BT = None
        if predicts:
            predictions_BT = head_logits(hidden_BTD.detach(), self.head_weight(), self.groups).argmax(-1)
        return ModelOutput(None, loss, stream.auxiliary, stream.expert_counts, predictions_BT=predictions_BT)

    def head_weight(self) -> Tensor:
        """Return the output matrix [V of this rank, D]: the head's weight, or the embedding's when they are tied."""
        if self.head is not None:
            return cast(Tensor, self.head.weight)
        assert self.embedding is not None, "the last piece of the pipeline has a copy of the tied embedding"
        return cast(Tensor, self.embedding.weight)

    def empty_state(self, num_rows: int) -> DecodeState:
        """Build the decode state of `num_rows` rows before their first token."""
        mixers = [block.mixer for block in self.blocks]
        return DecodeState(
            tuple(
                mixer.empty_state(num_rows) if isinstance(mixer, (Mamba2Mixer, AttentionMixer, SequenceMixer)) else None
                for mixer in mixers
            ),
            0,
        )

    def set_rope(self, rope: RopeConfig | None) -> None:
        """Set the rotary positions of every attention block; None or the present ones change nothing.

        Parameters stay as they are: it is how a trained model goes on with longer rows. Changes `config` too.
        """
        attention = self.config.attention
        if rope is None or attention is None or attention.rope == rope:
            return
        attention = attention.model_copy(update={"rope": rope})
        self.config = self.config.model_copy(update={"attention": attention})
        for module in self.modules():
            if isinstance(module, AttentionMixer):
                module.section = attention
                module.reset_buffers()

    def update_expert_bias(self, counts: dict[int, Tensor]) -> None:
        """Move the balancing bias of each MoE block held here against the expert loads of the whole step.

        Sum `ModelOutput.expert_counts` over micro-batches and all ranks first, then call on every rank.
        """
        for index, mixer in self.routed_mixers():
            if index in counts:
                mixer.update_expert_bias(counts[index])

    def routed_mixers(self) -> Iterator[tuple[int, MoeMixer]]:
        """Iterate over the mixers of the MoE blocks held here, with their block indices."""
        for index in self.blocks.indices():
            mixer = self.blocks[index].mixer
            if isinstance(mixer, MoeMixer):
                yield index, mixer


def use_at_once(part: str) -> None:
    """What `HybridModel.before_use` does where nobody gathers weights: nothing."""


def _multiply(x: Tensor, multiplier: float) -> Tensor:
    return x if multiplier == 1.0 else x * multiplier


def _check_groups(groups: ProcessGroupCollection, *, has_pieces: bool) -> None:
    """Refuse a pipeline rank that was not told which blocks it holds."""
    if groups.pp.size() > 1 and not has_pieces:
        raise ValueError(f"the pp group has {groups.pp.size()} ranks; give the pieces of the model that this one holds")


def _check_cut(meta: PackMeta, groups: ProcessGroupCollection) -> None:
    cut = 1 if meta.segments is None else meta.segments.num_ranks
    if cut != groups.cp.size():
        raise ValueError(
            f"the rows are cut for {cut} context rank(s) and the model's cp group has {groups.cp.size()}; cut them with "
            "PackMeta.cut(groups.cp.rank(), groups.cp.size()), or build the model on single_rank_groups()"
        )


def _check_continues(meta: PackMeta, state: DecodeState) -> None:
    if not meta.single_document:
        raise ValueError("a decode state holds one document a row; pass rows without document boundaries")
    if meta.first_continues != (state.length > 0):
        raise ValueError(
            f"the decode state has seen {state.length} tokens but the rows {'go on' if meta.first_continues else 'begin'} "
            "a document; build them with PackMeta.one_document_a_row(rows, tokens, start=state.length)"
        )
