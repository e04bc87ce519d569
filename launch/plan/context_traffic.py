"""What cutting rows costs a Mamba2 block: passing states, as this system does, beside exchanging tokens for heads."""

from __future__ import annotations

from dataclasses import dataclass

from model.config.schema import Mamba2Config
from pretrain.config.schema import RunConfig

STATE_BYTES = 4
SEGMENTS = 2  # of a row on each context rank


@dataclass(frozen=True)
class ContextTraffic:
    """Bytes that the ranks of one context group send for one Mamba2 block and micro-batch, forward and backward.

    `states`: the states and decays of two segments a row to every other rank, and the convolution's inputs to neighbours;
    free of the row's length. `heads`: the other way, an all-to-all that gives each rank all tokens of a part of the heads
    (x, B, C and dt, no group copied) and another that brings y back; it grows with the row.
    """

    sequence_length: int
    states: int
    heads: int

    @property
    def equal_length(self) -> int:
        """The row's length at which both send the same."""
        return round(self.states * self.sequence_length / self.heads)


def compare_context(config: RunConfig) -> ContextTraffic | None:
    """Both ways for the run's layout; None where rows are not cut or the model has no Mamba2 block."""
    section, train, mamba = config.parallel, config.train, config.model.mamba
    if section.context == 1 or mamba is None:
        return None
    width = 2 if train.precision == "bf16" else 4
    sizes = (train.micro_batch_size, section.context, section.tensor, width)
    return ContextTraffic(
        train.sequence_length,
        states_bytes(mamba, *sizes),
        heads_bytes(mamba, train.sequence_length, *sizes),
    )


def states_bytes(mamba: Mamba2Config, rows: int, context: int, tensor: int, width: int) -> int:
    """Sent by passing states: each rank's go to every other, windows to neighbours."""
    handed, windows = handed_states(mamba, rows, tensor), exchanged_windows(mamba, rows, context, tensor, width)
    return context * (context - 1) * handed + windows


def handed_states(mamba: Mamba2Config, rows: int, tensor: int) -> int:
    """Bytes that a rank hands to both all-gathers of a block: states and decays of two segments a row, whatever their length."""
    heads = mamba.num_heads // tensor
    return segment_states(rows, heads * mamba.head_dim * mamba.state_size) + SEGMENTS * rows * heads * STATE_BYTES


def segment_states(rows: int, numbers: int) -> int:
    """Bytes of the states of a rank's segments and of their gradients, for a state of so many numbers a row."""
    return SEGMENTS * rows * 2 * numbers * STATE_BYTES


def exchanged_windows(mamba: Mamba2Config, rows: int, context: int, tensor: int, width: int) -> int:
    """Bytes of the convolution's inputs in a group: neighbours alone, c - 1 pairs, both ways, forward and backward."""
    return 4 * (context - 1) * rows * (mamba.conv_kernel - 1) * conv_channels(mamba, tensor) * width


def heads_bytes(mamba: Mamba2Config, tokens: int, rows: int, context: int, tensor: int, width: int) -> int:
    """Sent by exchanging tokens for heads: of each token's numbers all but one part in c leave their rank, there and back."""
    numbers = conv_channels(mamba, tensor) + mamba.num_heads // tensor + mamba.inner_size() // tensor
    return 2 * rows * tokens * numbers * width * (context - 1) // context


def conv_channels(mamba: Mamba2Config, tensor: int) -> int:
    """Channels of x, B and C on a tensor rank."""
    return mamba.inner_size() // tensor + 2 * max(1, mamba.num_groups // tensor) * mamba.state_size
