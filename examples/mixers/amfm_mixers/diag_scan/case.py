"""The selective scan of the first Mamba, with 16 state numbers per channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from amfm.kernels.cases import (
    Compute,
    CountedProblem,
    Goal,
    GpuSizes,
    HostSizes,
    Inputs,
    Minimum,
    OperationCase,
    Problem,
    Sized,
    bfloat16_inputs,
    documents,
    each_pass,
    find_package,
)
from amfm_mixers.diag_scan.op import diag_bytes, diag_flops, diag_scan

CHUNK_SIZE, STATE_SIZE = 64, 16
# Sums over all tokens: a head's gradients are judged by the size of what they sum.
SUMS = {"A_log": "dt", "dt_bias": "dt"}


def selective_problem(
    inputs: Inputs, tokens: int, channels: int, state: int, text: str = "", *, rows: int = 1, lengths: tuple[int, ...] = (),
    initial: bool = False, exact: str = "reference",
) -> Problem:  # fmt: skip
    """The first Mamba's scan; `text` describes its channels and states.

    Leaves: x and dt [B, T, C], A_log [C, N] with A = -1 .. -N as Mamba starts, B and C [B, T, N], D and the bias of dt [C],
    the first state [B, C, N] where `initial`.
    """
    T, C, N = tokens, channels, state
    leaves = {"x": inputs.normal(rows, T, C), "dt": inputs.normal(rows, T, C)}
    leaves["A_log"] = torch.arange(1.0, N + 1, device=inputs.device).log().repeat(C, 1).requires_grad_()
    leaves |= {name: inputs.normal(rows, T, N, scale=0.5) for name in ("B", "C")}
    leaves |= {"D": inputs.uniform(C, low=0.5), "dt_bias": inputs.uniform(C, low=-2.0, high=-1.0)}
    if initial:
        leaves["initial"] = inputs.normal(rows, C, N, dtype=torch.float32)
    ids = documents(inputs, T, *lengths, rows=rows) if lengths else None

    def run(given: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
        x, dt, A_log, B, C, D, bias, *rest = given.values()
        start = rest[0] if rest else None
        out = diag_scan(x, dt, A_log, B, C, D, bias, document_ids_BT=ids, initial_state_BCN=start, backend=backend)
        return {"y": out.y_BTC, "final state": out.final_state_BCN}

    def peers() -> dict[str, Compute]:
        theirs = find_package("mamba_ssm.ops.selective_scan_interface")
        if theirs is None:
            return {}

        def mamba_ssm(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            x, dt, B, C = (each.transpose(1, 2) for each in (x, dt, B, C))
            out = theirs.selective_scan_fn(x, dt, -A_log.exp(), B, C, D, delta_bias=bias, delta_softplus=True)
            return out.transpose(1, 2)

        return {"mamba_ssm": mamba_ssm}

    shape = rows, T, C, N
    least = each_pass(lambda back: Minimum(diag_bytes(*shape, backward=back), diag_flops(*shape, backward=back)))
    return Problem(leaves, run, f"{rows}x{T}{text}", *least, peers, sums=SUMS, exact=exact)


def counted_problems() -> Iterator[CountedProblem]:
    """One block of channels."""
    text = f"x64, {STATE_SIZE} state numbers, chunks of {CHUNK_SIZE}"
    problem = selective_problem(bfloat16_inputs(), 512, 64, STATE_SIZE, text)
    yield CountedProblem(
        "diag_scan",
        problem,
        Goal("of the formula", problem.forward.bytes, 1.2),
        Goal("of the formula", problem.backward.bytes, 1.4),
    )


def trials() -> Iterator[Sized]:
    """The first Mamba with 16 state numbers per channel, and with few."""
    yield Sized(
        "16 states with documents", "first",
        partial(selective_problem, tokens=100, channels=24, state=16, lengths=(33, 1, 66), initial=True),
    )  # fmt: skip
    yield Sized("few states, two rows", "small", partial(selective_problem, tokens=63, channels=11, state=3, rows=2))
    yield Sized(
        "long row with documents", "long",
        partial(selective_problem, tokens=8205, channels=512, state=16, lengths=(4000, 1, 4204), exact="torch"),
    )  # fmt: skip


def _on_gpu(inputs: Inputs, sizes: GpuSizes) -> Problem:
    channels = sizes.heads * sizes.head_dim
    return selective_problem(inputs, sizes.tokens, channels, STATE_SIZE, f"x{channels}, {STATE_SIZE} state numbers")


def _on_host(inputs: Inputs, sizes: HostSizes) -> Problem:
    channels, state = sizes.heads * sizes.head_dim, sizes.selective_state
    return selective_problem(inputs, sizes.tokens, channels, state, f", {channels} channels, state {state}")


OPERATIONS = {
    "diag_scan": OperationCase(
        "diag_scan", counted_problems, trials, on_gpu={"diag_scan": _on_gpu}, on_host={"diag_scan": _on_host}
    )
}
