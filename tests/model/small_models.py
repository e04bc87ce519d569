"""Small configurations and packed batches that the model's tests share."""

import torch

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.rope import RopeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import SingleRankGroup, single_rank_groups

MAMBA = Mamba2Config(num_heads=6, head_dim=4, state_size=5, num_groups=2, chunk_size=8)
ATTENTION = AttentionConfig(
    num_heads=6, num_kv_heads=2, head_dim=8, qk_norm=True, positions="rope", rope=RopeConfig(theta=100.0)
)
MOE = MoeConfig(num_experts=5, top_k=2, expert_hidden_size=8, shared_expert_hidden_size=10, expert_bias=True)
FEED_FORWARD = FeedForwardConfig(hidden_size=14, activation="swiglu")


def small_config(pattern="M*E-", **changes):
    fields = {
        "vocab_size": 40,
        "hidden_size": 12,
        "initializer_range": 0.3,
        "mamba": MAMBA,
        "attention": ATTENTION,
        "moe": MOE,
        "feed_forward": FEED_FORWARD,
    }
    return ModelConfig(pattern=pattern, **(fields | changes))


def small_model(config, *, dtype=torch.float64, seed=1, backend="torch"):
    model = HybridModel(config, single_rank_groups(), backend=backend, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            # Norms of one, biases of zero and D of one would hide mistakes.
            if name.endswith(
                (
                    "norm.weight",
                    "norm.bias",
                    "conv.bias",
                    "_proj.bias",
                    ".D",
                    "expert_bias",
                    ".sinks",
                    "value_proj.weight",
                    "conv_weight",
                )
            ):
                value += 0.2 * torch.randn(value.shape, generator=generator).to(value.dtype)
    return model


def packed_batch(document_lengths=((7, 1, 12, 3), (23,)), vocab_size=40, seed=0):
    """Tokens, labels (next token, -100 at each document's end), and document ids of rows packed from these lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in document_lengths]
    ids_BT = torch.stack(rows)
    tokens_BT = torch.randint(vocab_size, ids_BT.shape, generator=generator)
    labels_BT = torch.full_like(tokens_BT, -100)
    goes_on = ids_BT[:, 1:] == ids_BT[:, :-1]
    labels_BT[:, :-1] = torch.where(goes_on, tokens_BT[:, 1:], -100)
    return tokens_BT, labels_BT, ids_BT


def decode(model, tokens_BT, prefill_lengths):
    """Logits of tokens fed in pieces of these lengths, then one at a time."""
    rows, total = tokens_BT.shape
    state, pieces, start = model.empty_state(rows), [], 0
    for length in [*prefill_lengths, *[1] * (total - sum(prefill_lengths))]:
        meta = PackMeta.one_document_a_row(rows, length, start=start)
        output = model(tokens_BT[:, start : start + length], meta, state=state)
        pieces.append(output.logits_BTV)
        state, start = output.state, start + length
        assert state.length == start
    return torch.cat(pieces, 1), state


def loss_of(output):
    """Mean loss per row of labels plus the auxiliary losses: one scalar that every gradient passes."""
    return output.loss.total / 10 + sum(output.auxiliary.values())


def meta_of(ids_BT):
    return PackMeta.from_document_ids(ids_BT)


def cut_batch(document_lengths, groups, seed=0):
    """Tokens, labels and layout of what this context rank has of a packed batch."""
    tokens_BT, labels_BT, ids_BT = packed_batch(document_lengths, seed=seed)
    meta = meta_of(ids_BT).cut(groups.cp.rank(), groups.cp.size())
    if meta.segments is not None:
        tokens_BT, labels_BT = meta.segments.take(tokens_BT), meta.segments.take(labels_BT)
    return tokens_BT, labels_BT, meta


class StandInGroup(SingleRankGroup):
    """One of several ranks, without the others."""

    def __init__(self, size, rank=0):
        self.ranks = (rank, size)

    def size(self):
        return self.ranks[1]

    def rank(self):
        return self.ranks[0]
