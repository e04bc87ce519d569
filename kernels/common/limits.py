"""Which sizes the Triton scans and native code take, known without either: a configuration is compared with them before
it runs.

A model's configuration is checked on machines without a GPU or Triton, so the numbers are here and not next to
the kernels; the kernels' launchers import them from here, so there is one source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScanLimits:
    """chunk_sizes: those with a kernel, and multiples of the last. key_dim, value_dim: the largest state; None: any."""

    chunk_sizes: tuple[int, ...]
    key_dim: int
    value_dim: int | None = None

    def takes_chunk(self, chunk_size: int) -> bool:
        """Whether there is a kernel for it.

        A multiple of the largest size runs as the largest; sizes in between have no kernel.
        """
        chunk = min(chunk_size, self.chunk_sizes[-1])
        return chunk in self.chunk_sizes and chunk_size % chunk == 0

    def takes_state(self, key_dim: int, value_dim: int) -> bool:
        """Whether a head's state of these rows and columns fits."""
        return key_dim <= self.key_dim and (self.value_dim is None or value_dim <= self.value_dim)

    def check(self, chunk_size: int, key_dim: int, value_dim: int) -> None:
        """Raises ValueError for sizes without a kernel.

        The message names the size that is wrong and those that have a kernel.
        """
        if not self.takes_chunk(chunk_size):
            raise ValueError(f'backend "triton" needs a chunk_size of {self.describe_chunks()}; got {chunk_size}')
        if not self.takes_state(key_dim, value_dim):
            raise ValueError(
                f'backend "triton" holds states of up to {self.describe_state()}; got {key_dim} x {value_dim}'
            )

    def describe_chunks(self) -> str:
        """The chunk sizes in words."""
        *sizes, last = map(str, self.chunk_sizes)
        return f"{', '.join(sizes)} or a multiple of {last}" if sizes else f"a multiple of {last}"

    def describe_state(self) -> str:
        """The largest state in words."""
        return f"{self.key_dim} rows" if self.value_dim is None else f"{self.key_dim} x {self.value_dim}"


# Each program holds all K rows of a state, so registers bound K.
DECAY_LIMITS = ScanLimits((16, 32, 64, 128), 256, 256)
VECTOR_GATE_LIMITS = ScanLimits((16, 32, 64), 256)
DELTA_LIMITS = ScanLimits((16, 32, 64), 256)
VECTOR_DELTA_LIMITS = ScanLimits((16, 32, 64), 256)

NATIVE_CHUNK, NATIVE_MULTIPLE = 64, 16  # the second: of heads and states, which all processors' vectors divide


def refuse_native_sizes(chunk_size: int, state: int, head_dim: int) -> str | None:
    """Why the C code of a Mamba2 mixer does not take these sizes; None if it does."""
    if state % NATIVE_MULTIPLE == 0 == head_dim % NATIVE_MULTIPLE and chunk_size == NATIVE_CHUNK:
        return None
    return (
        f"native code takes states x heads of multiples of 16 in chunks of 64; got {state} x {head_dim} in {chunk_size}"
    )
