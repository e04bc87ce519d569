"""What generation carries from token to token: a state for each block of an amfm hybrid model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.cache_utils import Cache

# Tensors, or a state for each of several mixers side by side.
BlockState = tuple[Any, ...] | None


class AmfmCache(Cache):
    """States of all blocks (None if a block has none) after `num_tokens` tokens.

    Recurrent states cannot go back to an earlier token, so that `crop` is rejected, and with it assisted generation.
    """

    def __init__(self, num_blocks: int) -> None:
        # The layers of transformers know keys and values, and one recurrent state.
        super().__init__(layers=[])
        self.states: list[BlockState] = [None] * num_blocks
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"AmfmCache(num_blocks={len(self.states)}, num_tokens={self.num_tokens})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens made the states."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys that attention sees, and the place of the first."""
        return self.num_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether tokens were read."""
        return self.num_tokens > 0

    @property
    def batch_size(self) -> int:
        """Rows of the states; -1 before the first token."""
        return next((part.shape[0] for part in tree_leaves(self.states) if isinstance(part, Tensor)), -1)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False for every block: the cache counts its tokens, so that `generate` knows which ones it has read."""
        return [False] * len(self.states)

    @property
    def is_sliding(self) -> list[bool]:
        """False for every block."""
        return [False] * len(self.states)

    @property
    def is_dummy(self) -> list[bool]:
        """False for every block."""
        return [False] * len(self.states)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back to an earlier token; removing none is fine."""
        if tokens_to_remove:
            raise ValueError("AmfmCache.crop: a recurrent state holds no earlier token; generate without an assistant")

    def reset(self) -> None:
        """Forget all tokens."""
        self.states, self.num_tokens = [None] * len(self.states), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows as beam search keeps them."""
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._change(lambda part: part[indices])

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = tree_map_only(Tensor, function, self.states)


def as_own_cache(cache: Any, num_blocks: int) -> AmfmCache:
    """Return a cache that was given. Raises TypeError for one of another class, which has no place for the states."""
    if not isinstance(cache, AmfmCache):
        raise TypeError(
            f"cache={type(cache).__name__}: the blocks keep states in an AmfmCache; leave the argument out, or pass what an "
            "earlier call returned"
        )
    if len(cache) != num_blocks:
        raise ValueError(f"cache has states of {len(cache)} blocks, the model {num_blocks}")
    return cache


def empty_rows(like: Tensor, rows: int, *dims: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros [rows, *dims] where `like` is, in its dtype if none is named.

    States are made like activations and not like weights, which may be on another device until their module runs.
    """
    return like.new_zeros(rows, *dims, dtype=dtype or like.dtype)
