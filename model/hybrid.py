"""The hybrid model: embedding, the blocks of a pattern string, final norm and head.

    stream = embed(tokens)                                # [B, T, D]
    for block in pattern:
        stream = stream + block.mixer(block.norm(stream))        # times a multiplier, if set
    logits = head(final_norm(stream))

Blocks differ only in their mixer (build.py, mixers/interface.py), which mixes over the sequence (Mamba2, attention, linear
mixers) or over channels (mixture of experts, dense feed-forward); nothing here asks which one it is. Every mixer gets the `PackMeta` that keeps documents apart.

What flows between blocks is a `Stream` (block.py), and what they give besides ends in `ModelOutput`. Where the pattern has
MTP layers (mtp.py), they follow the last block in training; decoding and export do without them.

Pieces: a pipeline rank holds one or several runs of consecutive blocks. A model that is built with `pieces` has only
those, under their indices in the whole pattern, so names, initial values and checkpoints do not depend on how the model is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from amfm.kernels.linear_cross_entropy.op import CrossEntropy
from amfm.kernels.runtime.backend import resolve_backend
from amfm.kernels.runtime.compiling import prepare_to_compile
from amfm.model.block import Block, Blocks, Stream, multiply, use_at_once
from amfm.model.build import build_norm, build_stream
from amfm.model.config.checks import check_model
from amfm.model.config.kinds import kind_of
from amfm.model.config.mup import logits_multiplier
from amfm.model.config.rope import RopeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.init import initialize_parameters, named_seed
from amfm.model.loss import Head, build_head, head_choices, head_cross_entropy, head_logits
from amfm.model.mixers.interface import DecodeState
from amfm.model.mtp import Ahead, MtpDepth, pass_rows
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.layers import ColumnLinear, RMSNorm, VocabEmbedding
from amfm.model.parallel.regions import enter_tensor_region
from amfm.model.pipeline_split import Piece, whole_piece


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns.

    logits_BTV [B, T, V]: without labels, else None. loss: sums of the cross entropy with labels, else None. auxiliary: weighted
    auxiliary losses summed over blocks, by name; empty in eval mode. expert_counts: token choices of each expert, [E] int64
    by block index. state: the decode state after these tokens, when one was given. predictions_BT: the most likely token
    after each, [B, T] int64, where labels and predictions were asked for. mtp: sums of the cross entropy of each
    MTP layer; mtp_hits [D] int64, in eval mode: how many of its labels each depth finds most likely.
    """

    logits_BTV: Tensor | None
    loss: CrossEntropy | None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    state: DecodeState | None = None
    predictions_BT: Tensor | None = None
    mtp: tuple[CrossEntropy, ...] = ()
    mtp_hits: Tensor | None = None


class HybridModel(nn.Module):
    """A hybrid decoder built from a pattern string; every rank of `groups.tp` must build and call it alike.

    With `pieces` it is what one pipeline rank holds: their blocks, the embedding with the first piece, final norm and head
    and MTP layers with the last (and there, when they are tied or there are depths, a copy of the
    embedding, named in `copied_parameters`). Such a model is not called: its owner passes the residual stream from `embed` through `pass_blocks` to `finish`.

    Parameters have torch's default dtype; `.bfloat16()` casts them all, and the model then computes in bf16 except where a
    block says float32. On the meta device nothing is allocated or initialised: move with `to_empty`, then call
    `initialize`. Raises ValueError for a configuration that breaks a rule, for groups it cannot be built on and for a
    backend that this device does not have.
    `draws=False`: parameters are what memory holds, for an owner who loads every one of them.
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
        draws: bool = True,
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
        # Called with the part whose weights per pass comes to: an engine may still be gathering them.
        self.before_use: Callable[[str], None] = use_at_once
        # Called in training with what the head reads, its matrix and the labels; give auxiliary losses by name.
        self.losses_at_head: list[Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]]] = []
        self.embedding: VocabEmbedding | None = None
        self.final_norm: RMSNorm | None = None
        self.head: ColumnLinear | Head | None = None
        ends_read_embedding = config.tie_embeddings or config.num_depths > 0
        with target:
            if has_first or (has_last and ends_read_embedding):
                self.embedding = VocabEmbedding(config.vocab_size, config.hidden_size, groups)
            self.blocks = Blocks({index: Block(index, config, groups, backend) for index in indices})
            if has_last:
                self.final_norm = build_norm(config, backend, groups)
            self.final_stream = build_stream(None, config, groups) if has_last else None
            if has_last and not config.tie_embeddings:
                self.head = build_head(config) or ColumnLinear(
                    config.hidden_size, (config.vocab_size,), groups, name="model.vocab_size"
                )
            num_modules = config.num_depth_modules if has_last else 0
            self.mtp = nn.ModuleList(MtpDepth(number, config, groups, backend) for number in range(num_modules))
        for index, block in self.all_blocks():
            block.mixer.set_draw_seed(named_seed(seed, f"blocks.{index}.mixer.draws"))
        self.copied_parameters = frozenset() if has_first or self.embedding is None else frozenset({"embedding.weight"})
        if self.embedding is not None and ends_read_embedding and not (has_first and has_last):
            # The first and the last pipeline rank each compute a part of the gradient.
            self.embedding.shards["weight"] = replace(self.embedding.shards["weight"], partial=("embd",))
        if target.type != "meta":
            self.reset_buffers()
            if draws:
                initialize_parameters(self, config, groups, seed)

    def extra_repr(self) -> str:
        """Pattern and size, of what is held here."""
        return f"{self.pattern.canonical()}, {sum(value.numel() for value in self.parameters()):,} parameters"

    def initialize(self) -> None:
        """Fill all parameters and buffers with initial values, each a function of the seed and its name."""
        self.reset_buffers()
        initialize_parameters(self, self.config, self.groups, self.seed)

    def reset_buffers(self) -> None:
        """Fill all buffers with their first values."""
        for _, block in self.all_blocks():
            block.mixer.reset_buffers()

    def compile_blocks(self, *, compiler: str = "inductor") -> None:
        """Compile the mixer of every block with torch.compile, whose backend is `compiler`; takes effect at the next call.

        One graph serves all blocks of a kind; rows with and without document boundaries, training and evaluation each have
        their own. The mixer is compiled, not the block: torch limits the number of graphs a function may have, and blocks of
        all kinds share one function.
        """
        prepare_to_compile()
        for _, block in self.all_blocks():
            block.mixer.compile(backend=compiler)

    def recompute_blocks(self, letters: Collection[str]) -> None:
        """Recompute blocks of these kinds in backward passes instead of keeping their activations, from the next call on.

        Losses and gradients do not change, in float32 not by a bit.
        """
        for _, block in self.all_blocks():
            block.recomputes = block.letter in letters

    def forward(
        self,
        tokens_BT: Tensor,
        meta: PackMeta | None = None,
        labels: Tensor | None = None,
        state: DecodeState | None = None,
        *,
        predicts: bool = False,
        ahead: Sequence[Ahead] = (),
    ) -> ModelOutput:
        """Compute logits of tokens [B, T]; with labels [B, T] the loss instead, without making logits.

        labels: the token that follows each (they are not shifted here), -100: masked. meta: without it each row is one
        document. predicts: besides the loss also the most likely tokens, which does make logits. ahead: what each
        MTP layer reads and learns; without it there are no such losses. state: from `empty_state` or the
        previous output; the tokens continue it, one document per row. `meta.choices` replays choices of experts.
        """
        if meta is None:
            start = 0 if state is None else state.length
            meta = PackMeta.one_document_a_row(*tokens_BT.shape, start=start, device=tokens_BT.device)
        if state is not None:
            _check_continues(meta, state)
        stream = self.pass_blocks(self.embed(tokens_BT), self.blocks.indices(), meta.with_tokens(tokens_BT), state)
        output = self.finish(stream, labels, predicts=predicts, ahead=ahead, meta=meta)
        if state is None:
            return output
        return replace(output, state=DecodeState(tuple(stream.states), state.length + tokens_BT.shape[1]))

    def embed(self, tokens_BT: Tensor) -> Stream:
        """Embed tokens [B, T] (int64): the residual stream before the first block. Every rank of `groups.tp` must call."""
        assert self.embedding is not None, "the first piece of the pipeline embeds"
        self.before_use("embedding")
        residual_BTD = multiply(self.embedding(tokens_BT), self.config.multipliers.embedding)
        return Stream(residual_BTD.to(self.stream_dtype()))

    def stream_dtype(self) -> torch.dtype:
        """Dtype of the residual between blocks."""
        dtype = next(self.parameters()).dtype
        return torch.promote_types(dtype, torch.float32) if self.config.residual_in_fp32 else dtype

    def pass_blocks(
        self, stream: Stream, indices: Iterable[int], meta: PackMeta, state: DecodeState | None = None
    ) -> Stream:
        """Pass the residual stream through the blocks of these indices, adding their auxiliary losses, counts and states to it.

        Returns a new Stream; the one given is not changed. Raises ValueError if `meta` is cut for another number of
        context ranks than the model's. Every rank of `groups.tp`, `groups.cp` and the expert groups must call.
        """
        _check_cut(meta, self.groups)
        order = list(indices)
        states = None if state is None else state.blocks
        return pass_rows(stream, lambda: self._gathered(order), meta, states, training=self.training)

    def _gathered(self, indices: Iterable[int]) -> Iterator[tuple[int, Block]]:
        """Yield blocks with their indices, each when its weights are there."""
        for index in indices:
            self.before_use(f"blocks.{index}")
            yield index, self.blocks[index]

    def finish(
        self,
        stream: Stream,
        labels_BT: Tensor | None,
        *,
        predicts: bool = False,
        ahead: Sequence[Ahead] = (),
        meta: PackMeta | None = None,
    ) -> ModelOutput:
        """Apply final norm and head to the residual stream after the last block: logits, or with labels the loss and predictions.

        ahead, with the layout of the rows: MTP layers continue from the normed stream. Every rank
        of `groups.tp` must call, with depths those of the blocks' groups too; all get the same result.
        """
        hidden_BTD = self._norm_last(stream)
        if isinstance(self.head, Head):  # a package's, which has no matrix for what follows
            return _finish_with(self.head, hidden_BTD, labels_BT, stream, predicts)
        read_BTD = self._enter_head(hidden_BTD)
        if labels_BT is None:
            logits_BTV = head_logits(read_BTD, self.head_weight(), self.groups)
            return ModelOutput(logits_BTV, None, stream.auxiliary, stream.expert_counts)
        loss = self._loss(read_BTD, self.head_weight(), labels_BT)
        for more in self.losses_at_head if self.training else ():
            stream = replace(stream, auxiliary={**stream.auxiliary, **more(read_BTD, self.head_weight(), labels_BT)})
        predictions_BT = None
        if predicts:
            predictions_BT = head_logits(read_BTD.detach(), self.head_weight(), self.groups).argmax(-1)
        output = ModelOutput(None, loss, stream.auxiliary, stream.expert_counts, predictions_BT=predictions_BT)
        if not ahead:
            return output
        assert meta is not None, "MTP layers read the layout of the rows"
        return self._add_predictions(output, hidden_BTD, ahead, meta)

    def read_head(self, stream: Stream) -> Tensor:
        """What the head multiplies of the residual stream after the last block, [B, T, D] of all tokens; the model has a matrix for it."""
        return self._enter_head(self._norm_last(stream))

    def _norm_last(self, stream: Stream) -> Tensor:
        assert self.final_norm is not None, "the last piece of the pipeline has the head"
        assert stream.delta_BTD is not None, "a piece has at least one block"
        self.before_use("head")
        if self.head is None:
            self.before_use("embedding")
        if self.final_stream is None:
            return self.final_norm.add(stream.delta_BTD, stream.residual_BTD)[0].to(self.final_norm.weight.dtype)
        read_BTD = self.final_stream(stream.residual_BTD, stream.delta_BTD)
        return self.final_norm(read_BTD).to(self.final_norm.weight.dtype)

    def _add_predictions(
        self, output: ModelOutput, hidden_BTD: Tensor, ahead: Sequence[Ahead], meta: PackMeta
    ) -> ModelOutput:
        """Add to an output what each MTP layer gives; hidden [B, T, D]: the normed stream.

        With `detach` a depth reads embedding, hidden states and head as constants.
        """
        detaches = self.config.prediction.detach
        if detaches:
            hidden_BTD = hidden_BTD.detach()
        auxiliary, expert_counts = output.auxiliary, output.expert_counts
        losses, hits = [], []
        for number, given in enumerate(ahead):
            depth = self.mtp[number % len(self.mtp)]
            embedded_BTD = self.embed(given.tokens_BT).residual_BTD
            start = Stream(embedded_BTD.detach() if detaches else embedded_BTD, None, auxiliary, expert_counts)
            stream, hidden_BTD = depth(start, hidden_BTD, meta.with_tokens(given.tokens_BT))
            auxiliary, expert_counts = stream.auxiliary, stream.expert_counts
            read_BTD = self._enter_head(hidden_BTD)
            # Asked for each time: under ZeRO 3 a tied one is let go of where it embeds.
            head = self.head_weight().detach() if detaches else self.head_weight()
            losses.append(self._loss(read_BTD, head, given.labels_BT))
            if not self.training:
                hits.append((head_choices(read_BTD, head, self.groups) == given.labels_BT).sum())
        return replace(
            output,
            auxiliary=auxiliary,
            expert_counts=expert_counts,
            mtp=tuple(losses),
            mtp_hits=torch.stack(hits) if hits else None,
        )

    def _enter_head(self, hidden_BTD: Tensor) -> Tensor:
        """What the head multiplies, of all tokens; it is linear, so that a factor on this is the factor on the logits."""
        return enter_tensor_region(multiply(hidden_BTD, logits_multiplier(self.config)), self.groups)

    def _loss(self, read_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> CrossEntropy:
        """Sum the cross entropy of what the head reads with labels [B, T]."""
        return head_cross_entropy(
            read_BTD.flatten(0, 1),
            weight_VD,
            labels_BT.flatten(),
            self.groups,
            z_loss_weight=self.config.logits_z_loss_weight,
            backend=self.backend,
        )

    def head_weight(self) -> Tensor:
        """Return the output matrix [V of this rank, D]: the head's weight, or the embedding's when they are tied."""
        if self.head is not None:
            return cast(Tensor, self.head.weight)
        assert self.embedding is not None, "the last piece of the pipeline has a copy of the tied embedding"
        return cast(Tensor, self.embedding.weight)

    def empty_state(self, num_rows: int) -> DecodeState:
        """Build the decode state of `num_rows` rows before their first token."""
        return DecodeState(tuple(block.mixer.empty_state(num_rows) for block in self.blocks), 0)

    def set_rope(self, rope: RopeConfig | None) -> None:
        """Set the rotary positions of every block of `model.attention`, not of its variants; None or the present ones change nothing.

        Parameters stay as they are: it is how a trained model continues with longer rows. Changes `config` too.
        """
        attention = self.config.attention
        if rope is None or attention is None or attention.rope == rope:
            return
        self.config = self.config.model_copy(update={"attention": attention.model_copy(update={"rope": rope})})
        for _, block in self.all_blocks():
            if "attention" in {kind.section for kind in kind_of(block.letter).parts}:
                block.mixer.set_rope(rope)

    def update_expert_bias(self, counts: dict[int, Tensor]) -> None:
        """Move the balancing bias of each block with a router held here against the expert loads of the whole step.

        Sum `ModelOutput.expert_counts` over micro-batches and all ranks first, then call on every rank.
        """
        for index, block in self.all_blocks():
            if index in counts:
                block.mixer.balance_experts(counts[index])

    def all_blocks(self) -> Iterator[tuple[int, Block]]:
        """Iterate over the blocks held here, with their indices: the main ones, then those of multi-token prediction."""
        yield from zip(self.blocks.indices(), self.blocks)
        for depth in self.mtp:
            assert isinstance(depth, MtpDepth), "mtp holds only depths"
            yield from depth.numbered_blocks()


def _finish_with(
    head: Head, hidden_BTD: Tensor, labels_BT: Tensor | None, stream: Stream, predicts: bool
) -> ModelOutput:
    """What `finish` gives, of a package's head, whose log probabilities stand for logits."""
    found, predictions_BT = head(hidden_BTD, labels_BT), None
    if predicts and labels_BT is not None:
        predictions_BT = head(hidden_BTD.detach()).log_p_BTV.argmax(-1)
    auxiliary = stream.auxiliary | found.auxiliary
    return ModelOutput(found.log_p_BTV, found.loss, auxiliary, stream.expert_counts, predictions_BT=predictions_BT)


def _check_groups(groups: ProcessGroupCollection, *, has_pieces: bool) -> None:
    """Reject a pipeline rank that was not told which blocks it holds."""
    if groups.pp.size() > 1 and not has_pieces:
        raise ValueError(f"the pp group has {groups.pp.size()} ranks; give the model chunks that this one holds")


def _check_cut(meta: PackMeta, groups: ProcessGroupCollection) -> None:
    cut = 1 if meta.segments is None else meta.segments.num_ranks
    if cut != groups.cp.size():
        raise ValueError(
            f"the rows are cut for {cut} context rank(s) and the model's cp group has {groups.cp.size()}; cut them with "
            "PackMeta.cut(groups.cp.rank(), groups.cp.size()), or build the model on single_rank_groups()"
        )


def _check_continues(meta: PackMeta, state: DecodeState) -> None:
    if not meta.single_document:
        raise ValueError("a decode state holds one document per row; pass rows without document boundaries")
    if meta.first_continues != (state.length > 0):
        raise ValueError(
            f"the decode state has seen {state.length} tokens but the rows {'continue' if meta.first_continues else 'begin'} "
            "a document; build them with PackMeta.one_document_a_row(rows, tokens, start=state.length)"
        )
