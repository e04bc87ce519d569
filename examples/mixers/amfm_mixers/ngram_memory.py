"""N-gram memory (Engram): tables that a hash of the last few tokens looks up, gated by what the residual stream holds.

What short phrases mean need not be computed: it is looked up by the tokens themselves, in tables that grow without a token
passing more of them. Blocks otherwise see no tokens; they come with the layout (`PackMeta.tokens_BT`). A text that is decoded
keeps the ids of the last tokens in its state, next to the inputs of the convolution.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from amfm.model.mixers.interface import BlockState, BuildContext, MixerOutput, MixerState, SequenceMixer
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import receive_windows
from amfm.model.parallel.layers import Linear, RMSNorm, stream_shard
from amfm.model.parallel.regions import enter_tensor_region, leave_tensor_region
from amfm.model.parallel.shards import Shard, ShardSpec, divide
from amfm_mixers.options import NgramMemoryOptions

MULTIPLIER_BYTES = 5  # so that a product with an id below 2^22 fits into int64


class NgramMemoryMixer(SequenceMixer):
    """v = g W_V e, y = v + SiLU(conv(norm(v))), with e looked up and a gate g of x and norm(W_K e).

    e joins a row of each table. A table has a length n and a head: its row is the hash of the last n tokens, modulo a prime
    of its own. g = sigmoid(s sqrt(|s|) / |s|) with s = x . norm(W_K e) / sqrt(D); the convolution reads every `max_n`-th token. W_V and
    the convolution begin at zero, so that a new model is the one without these blocks. Tokens of other documents count as none.

    Source: Cheng et al. 2026, arXiv 2601.07372, section 2; without its merged ids of similar tokens, with one
    branch, and with one hash for all blocks. Each tensor rank has some columns of every row: sizes are primes, which no number
    of ranks divides, and n-grams that are read often would load one rank more than others. Every rank of `groups.tp` and
    `groups.cp` must call.
    """

    def __init__(self, options: NgramMemoryOptions, build: BuildContext) -> None:
        super().__init__()
        self.options, self.build = options, build
        width, groups = build.hidden_size, build.groups
        sizes = options.table_sizes()
        read = len(sizes) * options.head_dim
        columns = divide(options.head_dim, groups, "model.mixers.ngram_memory.head_dim")
        self.tables = nn.Parameter(torch.empty(sum(sizes), columns))
        self.key_proj = Linear(read, width, groups)
        self.value_proj = Linear(read, width, groups)
        self.key_norm, self.value_norm = (RMSNorm(width, build.norm_epsilon, build.backend, groups) for _ in range(2))
        self.conv_weight = nn.Parameter(torch.empty(width, options.conv_kernel))
        cut = ShardSpec(1, "tp", (options.head_dim,))
        self.shards = {"tables": Shard((cut,)), "conv_weight": stream_shard(groups)}
        # Whether x has this rank's share of the tokens.
        self.shares_tokens = groups.sequence_parallel and groups.tp.size() > 1
        self.multipliers = [multiplier(place) for place in range(options.max_n)]
        # Sizes of tables [n, head], and the first row of each.
        self.places: Tensor
        self.register_buffer("places", torch.empty(2, options.max_n - 1, options.num_heads).long(), persistent=False)

    def forward(self, x_BTD: Tensor, meta: PackMeta, state: BlockState = None) -> MixerOutput:
        """Mix x [B, T, D] -> y [B, T, D]; with a state it continues from there and returns the next one.

        Raises ValueError for a layout without tokens.
        """
        if meta.tokens_BT is None:
            raise ValueError("{ngram_memory} looks tokens up, and this layout has none; use meta.with_tokens(tokens)")
        ids_BT1, segments, document_ids_BT = meta.tokens_BT[..., None] + 1, meta.segments, meta.boundaries_BT()
        if segments is not None:
            assert state is None, "rows that are cut over context ranks have no decode state"
            ids_BT1, document_ids_BT = segments.as_rows(ids_BT1), segments.as_rows(meta.document_ids_BT)
            tokens_before = receive_windows(ids_BT1, self.options.max_n - 1, segments, self.build.groups)
        elif state is None:
            tokens_before = ids_BT1.new_zeros(len(x_BTD), self.options.max_n - 1, 1)
        else:
            assert isinstance(state, dict), f"a registered mixer got a {type(state).__name__}"
            tokens_before = state["tokens"]
        rows_BTR = self.rows(ids_BT1, document_ids_BT, tokens_before).view(*meta.tokens_BT.shape, -1)
        value_BTD = self.read(x_BTD, self.look_up(rows_BTR))
        normed_BTD = self.value_norm(value_BTD)
        if self.shares_tokens:
            normed_BTD = enter_tensor_region(normed_BTD, self.build.groups)
        if segments is not None:
            normed_BTD = segments.as_rows(normed_BTD)
            before_BWD = receive_windows(normed_BTD, self.options.reach(), segments, self.build.groups)
        else:
            before_BWD = self.empty_window(len(x_BTD)) if state is None else state["window"]
        mixed_BTD = self.convolve(normed_BTD, document_ids_BT, before_BWD).view(*meta.tokens_BT.shape, -1)
        if self.shares_tokens:
            group = self.build.groups.tp
            mixed_BTD = mixed_BTD.chunk(group.size(), dim=1)[group.rank()]
        following: MixerState | None = None
        if state is not None:
            following = {"tokens": last(tokens_before, ids_BT1), "window": last(before_BWD, normed_BTD)}
        return MixerOutput(value_BTD + functional.silu(mixed_BTD), following)

    def rows(self, ids_BT1: Tensor, document_ids_BT: Tensor | None, before_BW1: Tensor) -> Tensor:
        """Rows of the tables that each token reads, [B, T, tables]; ids are one more than tokens, 0: none."""
        mixed_BT1, rows = ids_BT1 * self.multipliers[0], []
        sizes, starts = self.places
        for place, factor in enumerate(self.multipliers[1:], start=1):
            mixed_BT1 = mixed_BT1 ^ (earlier(ids_BT1, place, document_ids_BT, before_BW1) * factor)
            rows.append(mixed_BT1 % sizes[place - 1] + starts[place - 1])
        return torch.cat(rows, dim=-1)

    def look_up(self, rows_BTR: Tensor) -> Tensor:
        """Join the rows, [B, T, E], of the tokens that x has. Every rank of `groups.tp` must call."""
        group, found_BTRK = self.build.groups.tp, functional.embedding(rows_BTR, self.tables)
        if group.size() > 1:
            # Zeros for the columns of other ranks.
            columns = found_BTRK.shape[-1]
            before = group.rank() * columns
            found_BTRK = functional.pad(found_BTRK, (before, self.options.head_dim - before - columns))
        return leave_tensor_region(found_BTRK.flatten(2), self.build.groups)

    def read(self, x_BTD: Tensor, found_BTE: Tensor) -> Tensor:
        """Gate what was looked up: [B, T, D]."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        score_BT1 = (x_BTD.to(wide) * self.key_norm(self.key_proj(found_BTE)).to(wide)).sum(-1, keepdim=True)
        score_BT1 = score_BT1 / math.sqrt(x_BTD.shape[-1])
        # The root's slope at 0 has no bound.
        gate_BT1 = torch.sigmoid(score_BT1.abs().clamp(min=1e-6).sqrt() * score_BT1.sign())
        value_BTD: Tensor = self.value_proj(found_BTE) * gate_BT1.to(x_BTD.dtype)
        return value_BTD

    def convolve(self, x_BTD: Tensor, document_ids_BT: Tensor | None, before_BWD: Tensor) -> Tensor:
        """Sum this token and those `max_n` apart before it, each channel by its taps; the last tap is the token's own."""
        taps = self.conv_weight.unbind(1)
        total_BTD = x_BTD * taps[-1]
        for number, tap_D in enumerate(taps[-2::-1], start=1):
            total_BTD = total_BTD + earlier(x_BTD, number * self.options.max_n, document_ids_BT, before_BWD) * tap_D
        return total_BTD

    def reset_buffers(self) -> None:
        """Compute sizes and first rows of tables, on the device of the weights."""
        sizes = torch.tensor(self.options.table_sizes(), device=self.tables.device)
        self.places = torch.stack([sizes, sizes.cumsum(0) - sizes]).unflatten(1, (-1, self.options.num_heads))

    def init_parameter(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Zeros for W_V and the convolution; the rest is left to init.py."""
        return torch.zeros(shape) if name in ("value_proj.weight", "conv_weight") else None

    def empty_window(self, num_rows: int) -> Tensor:
        """Zeros for the inputs of the convolution before a text."""
        return self.conv_weight.new_zeros(num_rows, self.options.reach(), self.build.hidden_size)

    def empty_state(self, num_rows: int) -> MixerState:
        """No tokens, int64 [B, max_n - 1, 1], and no inputs of the convolution."""
        tokens = torch.zeros(num_rows, self.options.max_n - 1, 1, dtype=torch.int64, device=self.tables.device)
        return {"tokens": tokens, "window": self.empty_window(num_rows)}

    def sequence_flops(self, sequence_length: int) -> float:
        """FLOPs per token of the scores and the gate; taps are weights."""
        return 4.0 * self.build.hidden_size


def multiplier(place: int) -> int:
    """An odd number for the token this many before another, the same in every block and process."""
    digest = hashlib.sha256(f"ngram_memory/{place}".encode()).digest()
    return int.from_bytes(digest[:MULTIPLIER_BYTES], "little") | 1


def earlier(x_BTX: Tensor, by: int, document_ids_BT: Tensor | None, before_BWX: Tensor) -> Tensor:
    """What stood `by` places before each token [B, T, X], in the same document, else zeros; before: the W >= `by` before the row.

    Those before the row are of the first token's document, or zeros.
    """
    tokens = x_BTX.shape[1]
    moved_BTX = torch.cat([before_BWX[:, before_BWX.shape[1] - by :], x_BTX], dim=1)[:, :tokens]
    if document_ids_BT is None:
        return moved_BTX
    first_B1 = document_ids_BT[:, :1].expand(-1, by)
    is_same_BT = torch.cat([first_B1, document_ids_BT], dim=1)[:, :tokens] == document_ids_BT
    return torch.where(is_same_BT[..., None], moved_BTX, torch.zeros_like(moved_BTX))


def last(before_BWX: Tensor, x_BTX: Tensor) -> Tensor:
    """The last W of those before a row and its own."""
    return torch.cat([before_BWX, x_BTX], dim=1)[:, x_BTX.shape[1] :]
