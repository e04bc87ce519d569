"""What an indexer adds to a block, and the row length from which attention to the keys that it chooses is the faster one.

All of it runs in PyTorch, in float32: scores of all keys once, without a backward pass, then gathered keys and values, written
and read again. So these seconds are those of reading more than of arithmetic, and not those of a kernel that would read
chosen keys where they lie. No GPU has measured them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amfm.kernels.sparse_attention.torch_impl import query_blocks
from amfm.launch.plan.activations import FLOAT32_BYTES, Storage
from amfm.launch.plan.blocks.block import PlannedBlock
from amfm.launch.plan.exchange import FLOAT32, Exchange, element_type
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.layout import Layout
from amfm.launch.plan.roofline import Roofline
from amfm.model.config.attention import AttentionConfig
from amfm.model.config.indexer import IndexerConfig, keys_and_scores
from amfm.model.config.key_mixer_options import MlaOptions
from amfm.model.config.options import MixerOptions
from amfm.pretrain.config.schema import RunConfig

LONGEST = 1 << 24


@dataclass(frozen=True)
class Pair:
    """What a query and a key cost: FLOPs of dense attention and of that to chosen keys, and the numbers read of a chosen key.

    target: FLOPs of the scores that a warm-up makes once more.
    """

    dense: float
    chosen: float
    numbers: float
    target: float

    @classmethod
    def of(cls, options: MixerOptions, tensor: int = 1) -> Pair:
        """Those of the heads on one rank."""
        if isinstance(options, AttentionConfig):
            width, keys = options.num_heads / tensor, max(1.0, options.num_kv_heads / tensor)
            products = 4 * width * options.head_dim
            return cls(products, products, 2 * keys * options.head_dim, products / 2)
        assert isinstance(options, MlaOptions), "only attention and latent attention have indexers"
        key, heads = options.nope_head_dim + options.rope_head_dim, options.num_heads / tensor
        latent = options.latent_size + options.rope_head_dim
        folded = 2 * heads * (latent + options.latent_size)
        return cls(2 * heads * (key + options.value_head_dim), folded, latent, 2 * heads * latent)


def add_indexer(line: Roofline, tokens: float, length: int, options: MixerOptions, hidden: int, tensor: int) -> None:
    """The indexer's own products, its scores and its loss, and where keys are chosen attention itself; dense attention is not here.

    Every tensor rank does all of the indexer's part.
    """
    indexer: IndexerConfig = getattr(options, "indexer")  # noqa: B009
    pair, seen, rate = Pair.of(options, tensor), (length + 1) / 2, line.hardware.float32_flops
    rate *= line.hardware.product_efficiency
    heads, size = indexer.num_heads, indexer.head_dim
    line.product(tokens, getattr(options, "query_latent_size", None) or hidden, heads * size)
    line.product(tokens, hidden, size + heads)

    def add(times: float, keys: float, flops: float, moved: float) -> None:
        line.seconds += times * tokens * keys * max(flops / rate, moved / line.bandwidth)

    # A head's products are written, cut at zero and read; their sum is masked, compared and counted.
    score, written = heads * (2 * size + 2), FLOAT32_BYTES * (3 * heads + 6)
    if indexer.stage == "warm_up":
        add(line.forwards, seen, 3 * score + pair.target, 3 * written)
        return
    read, _ = keys_and_scores(indexer, length)
    add(line.forwards, seen, score, written)
    gathered = line.element_bytes + 2 * FLOAT32_BYTES
    add(line.forwards, read, 3 * score, size * gathered + 3 * written)
    add(line.forwards + 2.5, read, pair.chosen, pair.numbers * gathered)


def pays_from(options: MixerOptions, hidden: int, hardware: Hardware, precision: str) -> int | None:
    """The row length from which a block with chosen keys takes less time than a dense one, by this plan; None: not to LONGEST."""
    element_bytes = {"float32": 4, "bf16": 2}[precision]

    indexer: IndexerConfig = getattr(options, "indexer")  # noqa: B009
    options = options.model_copy(update={"indexer": indexer.model_copy(update={"stage": "sparse"})})

    def is_faster(length: int) -> bool:
        sparse, dense = (Roofline(hardware, precision, element_bytes) for _ in range(2))
        add_indexer(sparse, 1.0, length, options, hidden, 1)
        dense.mixing(Pair.of(options).dense * (length + 1) / 2, 0.0)
        return sparse.seconds < dense.seconds

    if not is_faster(LONGEST):
        return None
    low, high = 1, LONGEST
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if is_faster(middle) else (middle, high)
    return high


def tensor_exchanges(config: RunConfig, layout: Layout, options: MixerOptions, times: int) -> Iterator[Exchange]:
    """The weights of heads, summed before the loss; under sequence parallelism the tokens that the indexer reads."""
    indexer: IndexerConfig | None = getattr(options, "indexer", None)
    if indexer is None:
        return
    length, ranks, dtype = config.train.sequence_length, layout.context, element_type(config)
    piece = length // (2 * ranks) if ranks > 1 else length
    ends = [piece * (number + 1) for number in range(2 * ranks if ranks > 1 else 1)]
    calls, numbers = 0, 0
    for seen in ends:
        if indexer.stage == "sparse":
            calls, numbers = calls + 1, numbers + piece * min(indexer.top_k, seen)
            continue
        heads = max(indexer.num_heads, int(getattr(options, "num_heads")) // layout.tensor)  # noqa: B009
        blocks = list(query_blocks(piece, layout.micro_batch_size * seen * heads))
        calls += len(blocks)
        numbers += sum((stop - start) * (seen - piece + stop) for start, stop in blocks)
    handed = layout.stage_ranks // ranks * layout.micro_batch_size * numbers * FLOAT32
    yield Exchange("tp", "all_reduce", "float32", times * calls // ranks, times * handed)
    if layout.sequence_parallel:
        share = layout.stage_ranks * (layout.tokens(config) // layout.tensor) * dtype[1]
        latent = getattr(options, "query_latent_size", None) or 0
        width = config.model.hidden_size + latent
        yield Exchange("tp", "all_gather", dtype[0], times * (2 if latent else 1), times * share * width)


def context_exchanges(config: RunConfig, layout: Layout, options: MixerOptions, times: int) -> Iterator[Exchange]:
    """The indexer's keys, gathered, and their gradients; in a warm-up also the keys that its loss reads."""
    indexer: IndexerConfig | None = getattr(options, "indexer", None)
    if indexer is None:
        return
    dtype, size = element_type(config)
    tokens = layout.stage_ranks * layout.tokens(config) * size
    again = 0.0
    if indexer.stage == "warm_up":
        again = Pair.of(options, layout.tensor).numbers / (2 if isinstance(options, AttentionConfig) else 1)
    keys = tokens * (indexer.head_dim + again)
    yield Exchange("cp", "all_gather", dtype, times * (2 if again else 1), times * keys)
    yield Exchange("cp", "reduce_scatter", dtype, times, layout.context * times * tokens * indexer.head_dim)


class PlannedLatent(PlannedBlock):
    """A block of latent attention, with or without an indexer."""

    options: MlaOptions

    def add(self, line: Roofline, layout: Layout, storage: Storage, imbalance: float) -> None:
        """As one that is built says; of chosen keys the mixing once more, as PyTorch does it."""
        super().add(line, layout, storage, imbalance)
        if self.options.indexer is not None:
            length, hidden = self.config.train.sequence_length, self.model.hidden_size
            add_indexer(line, layout.tokens(self.config), length, self.options, hidden, layout.tensor)

    def tensor_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """The crossings of its region, and what an indexer exchanges."""
        yield from super().tensor_exchanges(layout, times)
        yield from tensor_exchanges(self.config, layout, self.options, times)

    def context_exchanges(self, layout: Layout, times: int) -> Iterator[Exchange]:
        """States as of any kind, and what an indexer gathers."""
        yield from super().context_exchanges(layout, times)
        yield from context_exchanges(self.config, layout, self.options, times)
