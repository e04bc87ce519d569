"""The scan with a gate of each key channel: GLA at a width of 2048 (K = 256, V = 512), HGRN2 (K = V = 128)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from amfm.kernels.cases import (
    CountedProblem,
    Goal,
    GpuSizes,
    HostSizes,
    Inputs,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
)
from amfm.kernels.decay_scan.case import decay_problem


def counted_problems() -> Iterator[CountedProblem]:
    """One head of HGRN2 with states kept and made again, and of GLA at a width of 2048."""
    for tokens, K, V, keep in ((512, 128, 128, True), (512, 128, 128, False), (1024, 256, 512, False)):
        problem = decay_problem(bfloat16_inputs(), tokens, 1, K, V, channels=True, keep=keep)
        yield CountedProblem(
            "decay_scan_vector_states_kept" if keep else "decay_scan_vector",
            problem,
            None if keep else Goal("of the formula", problem.forward.bytes, 2),
            Goal("of the formula", problem.backward.bytes, 5),
        )


def trials() -> Iterator[Sized]:
    """A gate per key channel: HGRN2's states, GLA's, and uneven ones."""
    yield Sized(
        "HGRN2 with documents", "first",
        partial(decay_problem, tokens=150, heads=2, key=128, value=128, channels=True, lengths=(64, 1, 85), initial=True),
    )  # fmt: skip
    yield Sized(
        "uneven sizes, states made again", "small",
        partial(decay_problem, tokens=100, heads=1, key=40, value=24, channels=True, chunk=32, keep=False),
    )  # fmt: skip
    yield Sized(
        "GLA, K = 256", "long",
        partial(decay_problem, tokens=8205, heads=4, key=256, value=512, channels=True, lengths=(5000, 3205), exact="torch"),
    )  # fmt: skip


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    size = sizes.attention_dim
    return decay_problem(inputs, sizes.tokens, sizes.attention_heads, size, size, channels=True)


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    size = sizes.head_dim
    return decay_problem(inputs, sizes.tokens, sizes.heads, size, size, rows=sizes.rows, channels=True)


CASE = OperationCase(
    "decay_scan_vector",
    counted_problems,
    trials,
    on_gpu={"decay_scan_vector": _on_gpu},
    on_host={"decay_scan_vector": _on_host},
)
