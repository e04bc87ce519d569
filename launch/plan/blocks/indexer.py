"""What an indexer adds to a block, and the sequence length from which attention to the keys that it chooses is the faster one.

The indexer's part runs in PyTorch, in float32: scores of all keys once, without a backward pass, and those of chosen keys,
which are gathered. Attention to chosen keys is our Triton kernels', whose launches are counted here one by one: every key that
a program fetches comes from memory, where a cache may hold it. No GPU has measured them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from amfm.kernels.sparse_attention.reference import FORWARD_HEADS, SLOPE_HEADS, SUM_CHANNELS
from amfm.launch.plan.activations import FLOAT32_BYTES
from amfm.launch.plan.hardware import Hardware
from amfm.launch.plan.roofline import Roofline
from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.key_mixer_options import IndexerConfig, MlaOptions, keys_and_scores
from amfm.model.config.options import MixerOptions

LONGEST = 1 << 24
# Of a pair, in a stable sort of 64-bit numbers with their places: eight passes that read and write both.
SORTED_BYTES = 8 * 2 * 16
PLACE_BYTES = 8


@dataclass(frozen=True)
class Pair:
    """What a query and a key are: query heads and key heads, channels of keys and of values, which may be channels of the keys.

    dense: FLOPs of dense attention, whose keys of latents are expanded.
    """

    dense: float
    heads: float
    kv_heads: float
    size: int
    value_size: int
    shared: bool

    @classmethod
    def of(cls, options: MixerOptions, tensor: int = 1) -> Pair:
        """Those of the heads on one rank."""
        heads = float(getattr(options, "num_heads")) / tensor  # noqa: B009
        if isinstance(options, AttentionConfig):
            size, kv_heads = options.head_dim, max(1.0, options.num_kv_heads / tensor)
            return cls(4 * heads * size, heads, kv_heads, size, size, shared=False)
        assert isinstance(options, MlaOptions), "only attention and latent attention have indexers"
        dense = 2 * heads * (options.nope_head_dim + options.rope_head_dim + options.value_head_dim)
        latent = options.latent_size
        return cls(dense, heads, 1.0, latent + options.rope_head_dim, latent, shared=True)

    @property
    def keys(self) -> float:
        """Numbers of a key."""
        return self.kv_heads * self.size

    @property
    def numbers(self) -> float:
        """Numbers of a key and its value."""
        return self.keys + (0.0 if self.shared else self.kv_heads * self.value_size)

    @property
    def scores(self) -> float:
        """FLOPs of the product of queries and key."""
        return 2 * self.heads * self.size

    @property
    def values(self) -> float:
        """FLOPs of that of weights and value."""
        return 2 * self.heads * self.value_size


def add_indexer(line: Roofline, tokens: float, length: int, options: MixerOptions, hidden: int, tensor: int) -> None:
    """An indexer's scores and loss, and where keys are chosen attention itself; its projections are products of the block.

    Every tensor rank does all of the indexer's part.
    """
    indexer: IndexerConfig = getattr(options, "indexer")  # noqa: B009
    pair, seen = Pair.of(options, tensor), (length + 1) / 2
    heads, size = indexer.num_heads, indexer.head_dim

    def add(times: float, keys: float, flops: float, moved: float) -> None:
        line.seconds += times * tokens * keys * line.hardware.operation_seconds(flops, moved, "float32", "product")

    # A head's products are written, cut at zero and read; their sum is masked, compared and counted.
    score, written = heads * (2 * size + 2), FLOAT32_BYTES * (3 * heads + 6)
    if indexer.stage == "warm_up":
        add(line.forwards, seen, 3 * score + pair.scores, 3 * written)
        return
    read, _ = keys_and_scores(indexer, length)
    add(line.forwards, seen, score, written)
    gathered = line.element_bytes + 2 * FLOAT32_BYTES
    add(line.forwards, read, 3 * score, size * gathered + 3 * written)
    line.seconds += tokens * read * _chosen_seconds(line, pair)


def _chosen_seconds(line: Roofline, pair: Pair) -> float:
    """Seconds per query and chosen key of the kernels' launches (`kernels/sparse_attention/triton_impl.py`)."""
    e = line.element_bytes

    def launch(flops: float, moved: float, *, backward: bool = False) -> float:
        return line.clock(flops, moved + PLACE_BYTES, "mixing", backward=backward)

    # Keys are fetched once per tile of a key head's heads; weights and slopes once per tile of channels.
    wide, narrow = (ceil(pair.heads / pair.kv_heads / heads) for heads in (FORWARD_HEADS, SLOPE_HEADS))
    of_keys, of_values = (e * pair.heads * ceil(size / SUM_CHANNELS) for size in (pair.size, pair.value_size))
    both = pair.scores + pair.values
    output = launch(both, e * wide * pair.numbers)
    weights = launch(pair.scores, e * pair.keys)
    slopes = launch(both, e * (narrow * pair.numbers + 2 * pair.heads), backward=True)
    queries = launch(pair.scores, e * narrow * pair.keys + of_keys, backward=True)
    keys = launch(both, of_keys + of_values + FLOAT32_BYTES * pair.numbers, backward=True)
    # What a pair adds is read again, and the sum of its key read and written; a sort of places moves them some times.
    sums = (3 * FLOAT32_BYTES * pair.numbers + SORTED_BYTES) / line.bandwidth
    return line.forwards * (output + weights) + slopes + queries + keys + sums


def pays_from(options: MixerOptions, hidden: int, hardware: Hardware, precision: str) -> int | None:
    """The sequence length from which a block with chosen keys takes less time than a dense one, by this plan; None: not to LONGEST.

    Without the indexer's projections, which take below 1% of either.
    """
    element_bytes = {"float32": 4, "bf16": 2}[precision]

    indexer: IndexerConfig = getattr(options, "indexer")  # noqa: B009
    options = options.model_copy(update={"indexer": indexer.model_copy(update={"stage": "sparse"})})

    def is_faster(length: int) -> bool:
        sparse, dense = (Roofline(hardware, precision, element_bytes) for _ in range(2))
        add_indexer(sparse, 1.0, length, options, hidden, 1)
        flops = Pair.of(options).dense * (length + 1) / 2
        dense.mixing((flops, 2.5 * flops), (0.0, 0.0))
        return sparse.seconds < dense.seconds

    if not is_faster(LONGEST):
        return None
    low, high = 1, LONGEST
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if is_faster(middle) else (middle, high)
    return high
