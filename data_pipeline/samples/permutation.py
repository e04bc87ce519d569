"""Keyed shuffles that need no memory: position in an epoch -> window, and every position can be asked for on its own.

A shuffled list of a store's windows would take gigabytes per rank and minutes at each start. A block cipher on the range of
positions is a permutation by construction, its key is the epoch, and any position costs the same. Statistical quality is
what is asked of it, and not secrecy: six rounds with a multiplicative mixer.

`permute` shuffles a whole epoch, for stores on a disk. `permute_in_blocks` keeps windows together in blocks that one ranged
request of an object store brings, and shuffles many blocks among each other: nearly as random, at a fraction of the reads.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

NUM_ROUNDS = 6
BLOCK_WINDOWS = 256  # windows that stay neighbours in block mode: what one ranged read of an object store brings
FEW_POSITIONS = 16  # up to here Python integers are faster than arrays
BLOCKS_PER_SHUFFLE = 512  # blocks whose windows are shuffled among each other

_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)
_MIX_1_INT, _MIX_2_INT, _MASK_64 = int(_MIX_1), int(_MIX_2), 2**64 - 1


def derive_key(*parts: str | int) -> bytes:
    """Make a 32-byte key out of integers and words; two lists of parts that differ anywhere give unrelated keys."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        encoded = str(part).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


@lru_cache(maxsize=4096)
def _round_keys(key: bytes) -> tuple[int, ...]:
    """Derive a 64-bit key for each round."""
    stream = hashlib.blake2b(key, digest_size=8 * NUM_ROUNDS).digest()
    return tuple(int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(NUM_ROUNDS))


def _mix(x: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Round function: every bit of x and key reaches every bit of the result (the finaliser of MurmurHash3)."""
    x = x + np.uint64(key)
    x ^= x >> _SHIFT
    x *= _MIX_1
    x ^= x >> _SHIFT
    x *= _MIX_2
    x ^= x >> _SHIFT
    return x


def _encrypt(x: npt.NDArray[np.uint64], num_bits: int, keys: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """One pass of the network over num_bits bits: each round xors one half with a function of the other, so it inverts.

    The halves may differ by one bit: with only even numbers of bits the range could be four times the positions, and cycle
    walking would take four passes on average where it takes two at most.
    """
    low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << (num_bits // 2)) - 1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    low, high = x & low_mask, x >> low_bits
    for number, key in enumerate(keys):
        if number % 2 == 0:
            low ^= _mix(high, key)
            low &= low_mask
        else:
            high ^= _mix(low, key)
            high &= high_mask
    high <<= low_bits
    high |= low
    return high


def _permute_one(x: int, size: int, num_bits: int, keys: tuple[int, ...]) -> int:
    """The same network and walk in Python integers: a micro-batch is too small for the overhead of arrays."""
    low_bits = num_bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (num_bits - low_bits)) - 1
    even_keys, odd_keys = keys[::2], keys[1::2]
    while True:
        low, high = x & low_mask, x >> low_bits
        for even, odd in zip(even_keys, odd_keys):
            mixed = (high + even) & _MASK_64
            mixed = ((mixed ^ (mixed >> 33)) * _MIX_1_INT) & _MASK_64
            mixed = ((mixed ^ (mixed >> 33)) * _MIX_2_INT) & _MASK_64
            low = (low ^ mixed ^ (mixed >> 33)) & low_mask
            mixed = (low + odd) & _MASK_64
            mixed = ((mixed ^ (mixed >> 33)) * _MIX_1_INT) & _MASK_64
            mixed = ((mixed ^ (mixed >> 33)) * _MIX_2_INT) & _MASK_64
            high = (high ^ mixed ^ (mixed >> 33)) & high_mask
        x = (high << low_bits) | low
        if x < size:
            return x


def permute(positions: npt.ArrayLike, size: int, key: bytes) -> Indices:
    """Apply the permutation of range(size) that the key names to each position; any integer shape, int64 out.

    A 6-round Feistel network (Luby and Rackoff 1988) on the smallest power of two that holds `size`; results outside
    range(size) are encrypted again until they fall inside (cycle walking: Black and Rogaway 2002, section 4), on
    average less than twice. Raises ValueError for a position outside range(size).
    """
    out = np.array(positions, dtype=np.uint64, copy=True, ndmin=1)
    shape = np.shape(positions)
    if out.size and int(out.max()) >= size:
        raise ValueError(f"position {int(out.max())} must be below the number of elements {size}")
    if size <= 1:
        return out.astype(np.int64).reshape(shape)
    num_bits = max(2, (size - 1).bit_length())
    keys = _round_keys(key)
    flat = out.reshape(-1)
    walking = np.arange(flat.size)
    while walking.size > FEW_POSITIONS:
        flat[walking] = _encrypt(flat[walking], num_bits, keys)
        walking = walking[flat[walking] >= np.uint64(size)]
    for place, position in zip(walking.tolist(), flat[walking].tolist()):
        flat[place] = _permute_one(position, size, num_bits, keys)
    return flat.astype(np.int64).reshape(shape)


@dataclass(frozen=True)
class BlockLayout:
    """How block mode cuts an epoch: blocks of neighbouring windows, gathered into nearly equal groups of blocks."""

    num_windows: int
    block_windows: int
    blocks_per_group: int

    @staticmethod
    def for_size(
        size: int, block_windows: int = BLOCK_WINDOWS, blocks_per_shuffle: int = BLOCKS_PER_SHUFFLE
    ) -> BlockLayout:
        """Even groups: a short last group would shuffle worse than the others."""
        num_blocks = max(1, size // block_windows)
        num_groups = -(-num_blocks // blocks_per_shuffle)
        return BlockLayout(size, block_windows, -(-num_blocks // num_groups))


def permute_in_blocks(positions: npt.ArrayLike, size: int, key: bytes, layout: BlockLayout | None = None) -> Indices:
    """Apply a permutation of range(size) that reads whole blocks of neighbours within a bounded stretch of positions.

    Two Feistel permutations: blocks of 256 windows are put in random order; then the positions of each group of up to
    512 consecutive blocks are shuffled. The windows after the last whole block belong to the last group.
    """
    layout = layout or BlockLayout.for_size(size)
    flat = np.array(positions, dtype=np.int64, copy=True, ndmin=1).reshape(-1)
    if flat.size and (int(flat.max()) >= size or int(flat.min()) < 0):
        raise ValueError(f"positions {int(flat.min())} to {int(flat.max())} must be in range({size})")
    num_blocks = size // layout.block_windows
    group_windows = layout.block_windows * layout.blocks_per_group
    last_group = max(0, -(-num_blocks // layout.blocks_per_group) - 1)
    groups = np.minimum(flat // group_windows, last_group)
    out = np.empty_like(flat)
    for group in np.unique(groups):
        mine = groups == group
        first = int(group) * group_windows
        group_size = size - first if group == last_group else group_windows
        out[mine] = first + permute(flat[mine] - first, group_size, derive_key(key.hex(), "group", int(group)))
    whole = out < num_blocks * layout.block_windows
    if whole.any():
        block, inside = np.divmod(out[whole], layout.block_windows)
        order = permute(block, num_blocks, derive_key(key.hex(), "blocks"))
        out[whole] = order * layout.block_windows + inside
    return out.reshape(np.shape(positions))
