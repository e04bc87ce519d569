"""Traffic of context parallelism in a Mamba2 block: passing states compared with exchanging tokens for heads.

How it works: a context rank holds two segments of each row. Passing states, as amfm does, costs an all-gather of
segment states and decays, plus the convolution's windows at segment borders: bytes that do not depend on the row's
length. Exchanging tokens for heads (an all-to-all before and after the scan) costs bytes in proportion to the length.
The length at which both are equal tells for which rows the choice pays.
"""

from __future__ import annotations

from amfm.model.config.mamba2 import Mamba2Config

STATE_BYTES = 4
SEGMENTS = 2  # of a row on each context rank


def states_bytes(mamba: Mamba2Config, rows: int, context: int, tensor: int, width: int) -> int:
    """Bytes a context group sends by passing states: states to every other rank, convolution windows to neighbours."""
    handed, windows = handed_states(mamba, rows, tensor), exchanged_windows(mamba, rows, context, tensor, width)
    return context * (context - 1) * handed + windows


def handed_states(mamba: Mamba2Config, rows: int, tensor: int) -> int:
    """Bytes that a rank hands to a block's two all-gathers: float32 states and decays of two segments per row.

    Independent of the row's length, which is the point of passing states.
    """
    heads = mamba.num_heads // tensor
    return segment_states(rows, heads * mamba.head_dim * mamba.state_size) + SEGMENTS * rows * heads * STATE_BYTES


def segment_states(rows: int, numbers: int) -> int:
    """Bytes of a rank's segment states and of their gradients in float32, for a state of `numbers` numbers per row."""
    return SEGMENTS * rows * 2 * numbers * STATE_BYTES


def exchanged_windows(mamba: Mamba2Config, rows: int, context: int, tensor: int, width: int) -> int:
    """Bytes of convolution inputs that neighbouring segments exchange in a group of c ranks: c - 1 pairs, both ways.

    The 4 counts both directions between neighbours, in forward and in backward; each window is W - 1 tokens of all
    channels.
    """
    return 4 * (context - 1) * rows * (mamba.conv_kernel - 1) * conv_channels(mamba, tensor) * width


def heads_bytes(mamba: Mamba2Config, tokens: int, rows: int, context: int, tensor: int, width: int) -> int:
    """Bytes a context group sends by exchanging tokens for heads, in forward and backward.

    Of each token's x, B, C, dt going in and y coming back, all but one part in `context` leaves its rank.
    """
    numbers = conv_channels(mamba, tensor) + mamba.num_heads // tensor + mamba.inner_size() // tensor
    return 2 * rows * tokens * numbers * width * (context - 1) // context


def conv_channels(mamba: Mamba2Config, tensor: int) -> int:
    """Channels C of the convolution on a tensor rank: x, B and C.

    A group of B and C that several tensor ranks share lies whole on each of them.
    """
    return mamba.inner_size() // tensor + 2 * max(1, mamba.num_groups // tensor) * mamba.state_size
