"""Structured matrices of feed-forwards: kinds, sizes and rules, only from numbers; the layers are in model/structured.py.

A structured matrix is a product of two factors with fewer weights than the matrix it stands for, y = second(first(x)):

    lowrank       first [r, in], second [out, r]
    blockshuffle  first b blocks [m, in / b], m = min(in, out) / b; then each of b blocks [out / b, m] of the second reads
                  m / b numbers of every block of the first (Wei et al. 2024, arXiv 2406.16450; Dao et al. 2022, arXiv
                  2204.00595). Full rank at 1 / b of the weights of a square matrix.
    blockdense    first b blocks [r / b, in / b], second [out, r]

`out` of a stacked matrix (gate and up of SwiGLU) is that of the stack: its parts share the first factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Activation = Literal["swiglu", "swiglu_oai", "squared_relu", "geglu", "geglu_erf", "gelu", "gelu_tanh"]
ExpertActivation = Literal["swiglu", "swiglu_oai", "squared_relu", "gelu", "gelu_tanh"]
PLAIN = ("squared_relu", "gelu", "gelu_tanh")  # of one matrix, the others are gated
LinearKind = Literal["dense", "lowrank", "blockshuffle", "blockdense"]


@dataclass(frozen=True)
class Structure:
    """Kind of the matrices of a feed-forward, with the rank and the number of blocks where the kind has them."""

    kind: LinearKind = "dense"
    rank: int | None = None
    blocks: int | None = None

    def between(self, inputs: int, outputs: int) -> int:
        """Numbers per token between the two factors of a matrix [outputs, inputs]; none for a dense one."""
        if self.kind == "dense":
            return 0
        return min(inputs, outputs) if self.kind == "blockshuffle" else self.ranks()

    def shapes(self, inputs: int, segments: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the factors of matrices of these row counts, stacked, that read `inputs` numbers."""
        outputs = sum(segments)
        if self.kind == "lowrank":
            return (self.ranks(), inputs), (outputs, self.ranks())
        blocks = self.num_blocks()
        if self.kind == "blockdense":
            return (blocks, self.ranks() // blocks, inputs // blocks), (outputs, self.ranks())
        each = self.between(inputs, outputs) // blocks
        return (blocks, each, inputs // blocks), (len(segments) * blocks, segments[0] // blocks, each)

    def weights(self, inputs: int, outputs: int) -> int:
        """Weights of a matrix [outputs, inputs], each of which a token is multiplied by once."""
        if self.kind == "dense":
            return inputs * outputs
        between = self.between(inputs, outputs)
        first = inputs * between if self.kind == "lowrank" else inputs * between // self.num_blocks()
        return first + (outputs * between // self.num_blocks() if self.kind == "blockshuffle" else outputs * between)

    def ranks(self) -> int:
        """The rank, of a kind that has one."""
        assert self.rank is not None, "check_model was not called: linear_rank is missing"
        return self.rank

    def num_blocks(self) -> int:
        """The number of blocks, of a kind that has them."""
        assert self.blocks is not None, "check_model was not called: linear_blocks is missing"
        return self.blocks

    def broken_rules(self, width: int, inner: int, up_outputs: int) -> Iterator[tuple[str, str]]:
        """Yield the field and the rule that it breaks, as the end of a sentence, for matrices between these widths.

        `width`: of the residual stream; `inner`: of the feed-forward; `up_outputs`: rows of the stacked up matrix.
        """
        for field, value, kinds in (
            ("linear_rank", self.rank, ("lowrank", "blockdense")),
            ("linear_blocks", self.blocks, ("blockshuffle", "blockdense")),
        ):
            if value is not None and self.kind not in kinds:
                yield field, f"is read only by {' and '.join(kinds)}, not by {self.kind}; remove it"
            if value is None and self.kind in kinds:
                yield field, f"is needed by {self.kind}; set it"
        if self.kind == "dense" or (self.kind != "lowrank" and self.blocks is None):
            return
        least = min(width, inner)
        if self.kind != "blockshuffle":
            if self.rank is None:
                return
            if self.rank > least:
                yield "linear_rank", f"must be at most {least}, the smaller width of the matrices; lower it"
                return
        if self.kind != "lowrank":
            yield from self._broken_block_rules(width, inner, up_outputs)
            return
        # Of the two matrices the one with fewer outputs profits first; a factorisation must pay in both.
        most = min(
            (inputs * outputs - 1) // (inputs + outputs) for inputs, outputs in ((width, up_outputs), (inner, width))
        )
        if self.ranks() > most:
            yield "linear_rank", f"has as many weights as the dense matrix or more; use at most {most}, or dense"

    def _broken_block_rules(self, width: int, inner: int, up_outputs: int) -> Iterator[tuple[str, str]]:
        blocks = self.num_blocks()
        for size, what in ((width, "model.hidden_size"), (inner, "the inner width")):
            if size % blocks:
                yield "linear_blocks", f"must divide {what}={size}; use a divisor of it"
                return
        if self.kind == "blockdense" and self.ranks() % blocks:
            yield "linear_blocks", f"must divide linear_rank={self.rank}; use a divisor of it"
        if self.kind == "blockdense":
            # Both matrices: the first factor is cut, the second whole.
            for inputs, outputs in ((width, up_outputs), (inner, width)):
                if self.weights(inputs, outputs) >= inputs * outputs:
                    yield "linear_rank", "has as many weights as the dense matrix or more; lower it, or use dense"
                    return
        if self.kind == "blockshuffle":
            for least in (min(width, up_outputs), min(inner, width)):
                if least % (blocks * blocks):
                    yield (
                        "linear_blocks",
                        f"squared must divide {least}, the smaller width of a matrix, so that every block of the second "
                        "factor reads as much of each block of the first; use fewer blocks",
                    )
                    return


DENSE = Structure()


class FeedForwardPart(NamedTuple):
    """A dense feed-forward inside of a mixer, `inner` channels wide; 0: it is left out.

    place: what the names of its parameters begin with, after the mixer's. prefix: what those of its settings begin with.
    """

    place: str
    prefix: str
    structure: Structure
    inner: int
    activation: Activation

    def broken_rules(self, width: int) -> Iterator[tuple[str, str]]:
        """Yield the field and the rule that it breaks, for a stream of this width."""
        rows = (matrices_of(self.activation) - 1) * self.inner
        for field, rule in self.structure.broken_rules(width, self.inner, rows):
            yield f"{self.prefix}{field}", rule

    def dense_settings(self) -> dict[str, str | None]:
        """The settings of the same sizes with dense matrices."""
        return {
            f"{self.prefix}linear_kind": "dense",
            f"{self.prefix}linear_rank": None,
            f"{self.prefix}linear_blocks": None,
        }


def matrices_of(activation: Activation) -> int:
    """Matrices of a feed-forward: gate, up and down for gated units, up and down for plain ones."""
    return 2 if activation in PLAIN else 3


def broken_limit(activation: Activation, limit: float | None) -> Iterator[tuple[str, str]]:
    """Yield the field and its rule where an activation has a limit that it does not read."""
    if limit is not None and activation in PLAIN:
        yield (
            "activation_limit",
            f"has no effect with activation={activation}, which is not gated; use swiglu, or remove it",
        )
