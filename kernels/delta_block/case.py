"""Delta mixers from their projections to their output: the operation that holds convolution, gates, scan and norm by head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases import (
    EPSILON,
    CountedProblem,
    GpuSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    documents,
    each_pass,
    formula_goals,
)
from amfm.kernels.common.inputs import first_tokens
from amfm.kernels.delta_block.op import DeltaSizes, block_bytes, delta_mix, scan_bytes
from amfm.kernels.delta_scan.op import delta_flops
from amfm.kernels.mamba2.rank_part import SegmentsInOrder


def gated_deltanet(
    key_heads: int = 1, heads: int = 2, key: int = 128, value: int = 128, steps: int = 1, factor: float = 1.0
) -> DeltaSizes:
    """Gated DeltaNet, and with more steps DeltaProduct: a decay a head, a gate with SiLU."""
    return DeltaSizes(key_heads, heads, key, value, steps, "softplus", False, "silu", EPSILON, factor)


def kda(heads: int = 2, key: int = 128, value: int = 128, floor: float = 0.0) -> DeltaSizes:
    """Kimi Delta Attention: a decay a key channel, with or without a floor, a gate with a sigmoid."""
    return DeltaSizes(
        heads, heads, key, value, 1, "floor" if floor else "softplus", True, "sigmoid", EPSILON, 1.0, floor
    )


def deltanet(heads: int = 2, key: int = 128, value: int = 128) -> DeltaSizes:
    """DeltaNet: no decay and no gate."""
    return DeltaSizes(heads, heads, key, value, 1, "none", False, "none", EPSILON)


def block_problem(
    inputs: Inputs, tokens: int, sizes: DeltaSizes, *, model: int = 64, width: int = 4, chunk: int = 64, rows: int = 1,
    lengths: tuple[int, ...] = (), apart: bool = False, whole: bool = False, segments: int = 0, exact: str = "reference",
) -> Problem:  # fmt: skip
    """The mixer with the product of the output's weight; products of libraries are not in the minima.

    Leaves: the parts of the projection, each apart so that its gradient is judged by its own size, or with `whole` the
    projection as it is; conv weight, A_log and bias of the decay (float32), norm weight, out weight. `apart`: raw decays and gates
    come in tensors of their own. `segments`: into how many Triton's one row is cut, which hand on their states.
    """
    widths = sizes.widths(decay=True, gate=True)
    leaves = {name: inputs.normal(rows, tokens, each) for name, each in widths.items()}
    if whole:
        names = [name for name in leaves if not (apart and name in ("decay", "gate"))]
        joined = torch.cat([leaves.pop(name) for name in names], dim=-1).detach().requires_grad_()
        leaves = {"projected": joined} | leaves
    leaves["conv_weight"] = inputs.normal(sizes.channel_count, width, scale=0.5)
    if sizes.decays:
        leaves["A_log"] = inputs.uniform(sizes.heads, low=-0.5, high=0.5)
        leaves["dt_bias"] = inputs.uniform(sizes.decays, low=-2.0, high=-1.0)
    leaves["norm_weight"] = inputs.normal(sizes.value)
    leaves["out_weight"] = inputs.normal(model, sizes.inner, scale=sizes.inner**-0.5)
    starts = first_tokens(documents(inputs, tokens, *lengths, rows=rows)) if lengths else None
    exchange = SegmentsInOrder(starts.view(segments, -1)) if segments and starts is not None else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        own = {name: given[name] for name in ("decay", "gate") if apart and name in given}
        names = [name for name in given if name in (*widths, "projected") and name not in own]
        projected = torch.cat([given[name] for name in names], dim=-1) if len(names) > 1 else given[names[0]]
        conv, norm, out = (given[name] for name in ("conv_weight", "norm_weight", "out_weight"))
        decay, gate = own.get("decay"), own.get("gate")
        place = starts
        if exchange is not None and backend == "triton":
            projected, place = projected.view(segments, -1, projected.shape[-1]), exchange.starts()
            decay, gate = (None if x is None else x.reshape(segments, -1, x.shape[-1]) for x in (decay, gate))
        mixed = delta_mix(
            projected, conv, given.get("A_log"), given.get("dt_bias"), norm, out, sizes, decay_BTX=decay, gate_BTI=gate,
            document_starts_BT=place, chunk_size=chunk, exchange=exchange if backend == "triton" else None, backend=backend,
        )  # fmt: skip
        return {"out": mixed.view(rows, tokens, -1)}

    shape = (rows, tokens, sizes.steps, sizes.key_heads, sizes.heads, sizes.key, sizes.value)

    def least(back: bool) -> Minimum:
        moved = rows * tokens * (block_bytes(sizes, backward=back) + scan_bytes(sizes, chunk, backward=back))
        return Minimum(moved, delta_flops(*shape, chunk_size=chunk, backward=back))

    # Sums over all tokens: a head's gradients are judged by the size of what they sum.
    sums = dict.fromkeys(("A_log", "dt_bias"), "decay" if "decay" in leaves else "projected")
    text = f"{rows}x{tokens}, {sizes.key_heads} key heads, {sizes.heads} heads, states of {sizes.key} x {sizes.value}"
    return Problem(leaves, run, text, *each_pass(least), sums=sums if sizes.decays else {}, exact=exact)


def counted_problems() -> Iterator[CountedProblem]:
    """Gated DeltaNet with two heads a key head, and Kimi Delta Attention."""
    for op, sizes, apart in (("delta_block", gated_deltanet(2, 4), False), ("delta_block_channels", kda(2), True)):
        problem = block_problem(bfloat16_inputs(), 256, sizes, apart=apart, whole=True)
        yield CountedProblem(
            op,
            problem,
            *formula_goals(problem, 1.25),
        )


def trials() -> Iterator[Sized]:
    """The mixers, rows cut into segments, raw numbers in the projection and apart, odd sizes."""
    packed = partial(block_problem, tokens=70, lengths=(40, 1, 29))
    yield Sized("Gated DeltaNet with documents", "first", partial(packed, sizes=gated_deltanet()))
    yield Sized("KDA with documents, gates apart", "first", partial(packed, sizes=kda(1), apart=True))
    cut = partial(block_problem, tokens=50, lengths=(20, 30), segments=2)
    yield Sized("Gated DeltaNet in two segments", "first", partial(cut, sizes=gated_deltanet(1, 2, 64, 64)))
    yield Sized("KDA in two segments", "small", partial(cut, sizes=kda(1, 64, 64), apart=True))
    yield Sized("DeltaNet", "small", partial(block_problem, tokens=35, sizes=deltanet(1, 16, 24), chunk=16, width=2))
    product = gated_deltanet(2, 2, 20, 12, steps=2, factor=2.0)
    yield Sized(
        "DeltaProduct, two rows", "small", partial(block_problem, tokens=19, sizes=product, rows=2, chunk=16, width=3)
    )
    floored = partial(block_problem, tokens=37, sizes=kda(2, 24, 16, floor=-5.0), chunk=16, lengths=(3, 34), whole=True)
    yield Sized("KDA with a floor, uneven sizes", "small", floored)
    yield Sized("one token", "small", partial(block_problem, tokens=1, sizes=gated_deltanet(1, 1, 16, 16), chunk=16))
    long = partial(block_problem, tokens=8205, model=1024, lengths=(4000, 1, 4204), exact="torch")
    yield Sized("16 key heads, 32 heads, documents", "long", partial(long, sizes=gated_deltanet(16, 32)))
    yield Sized("gates of channels", "long", partial(long, sizes=kda(8), apart=True))


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    heads, size = sizes.attention_heads, sizes.attention_dim
    return block_problem(
        inputs, sizes.tokens, gated_deltanet(heads // 2, heads, size, size), model=sizes.model, whole=True
    )


CASE = OperationCase("delta_block", counted_problems, trials, on_gpu={"delta_block": _on_gpu})
